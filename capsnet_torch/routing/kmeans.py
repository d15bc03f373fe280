"""K-means routing; see `capsnet_jax.routing.kmeans`."""

import torch
from jaxtyping import Float
from torch import Tensor

from capsnet_torch.capsules import Routed
from capsnet_torch.ops import capsule_norm, direction, squash
from capsnet_torch.routing.arguments import check_arguments


def kmeans(votes: Float[Tensor, "b i o h"], activations: Float[Tensor, "b i"], *, num_iterations: int = 3) -> Routed:
    """Soft spherical k-means: assign votes to centres by a softmax of their cosines, then move the centres.

    The gradient at a vote of zero is zero, unlike the gradient of `torch.cosine_similarity`.

    References:
        https://github.com/leftthomas/CapsuleLayer, k_means_routing with the cosine similarity.
        Dhillon, Modha, "Concept Decompositions for Large Sparse Text Data Using Clustering" (2001), section 3.
    """
    check_arguments("kmeans", num_iterations=num_iterations)
    cosines = torch.zeros_like(votes[..., 0])
    for iteration in range(num_iterations):
        couplings = torch.softmax(cosines, dim=-1)
        centers = (couplings[..., None] * votes).sum(dim=1)
        if iteration < num_iterations - 1:
            cosines = (direction(votes) * direction(centers)[:, None]).sum(dim=-1)
    poses = squash(centers)
    return Routed(poses, capsule_norm(poses), couplings)
