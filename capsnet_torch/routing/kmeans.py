"""Routing as clustering of directions."""

import torch
from jaxtyping import Float
from torch import Tensor

from capsnet_torch.capsules import Routed
from capsnet_torch.ops import capsule_norm, direction, squash


def kmeans(votes: Float[Tensor, "b i o h"], activations: Float[Tensor, "b i"], *, num_iterations: int = 3) -> Routed:
    """Soft spherical k-means, for a batch: assign all votes by their cosines, then move all centers.

    Unlike `torch.cosine_similarity`, the cosine with a vote of zero has the gradient zero.

    References:
        https://github.com/leftthomas/CapsuleLayer, k_means_routing with the cosine similarity.
        Dhillon, Modha, "Concept Decompositions for Large Sparse Text Data Using Clustering" (2001), section 3.
    """
    if num_iterations < 1:
        raise ValueError(f"num_iterations is {num_iterations}, and must be at least 1.")
    cosines = torch.zeros_like(votes[..., 0])
    for iteration in range(num_iterations):
        couplings = torch.softmax(cosines, dim=-1)
        centers = (couplings[..., None] * votes).sum(dim=1)
        if iteration < num_iterations - 1:
            cosines = (direction(votes) * direction(centers)[:, None]).sum(dim=-1)
    poses = squash(centers)
    return Routed(poses, capsule_norm(poses), couplings)
