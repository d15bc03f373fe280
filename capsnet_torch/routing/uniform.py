"""Uniform couplings, a baseline without routing; see `capsnet_jax.routing.uniform`."""

import torch
from jaxtyping import Float
from torch import Tensor

from capsnet_torch.capsules import Routed
from capsnet_torch.ops import capsule_norm, squash


def uniform(votes: Float[Tensor, "b i o h"], activations: Float[Tensor, "b i"]) -> Routed:
    """Couple every input capsule to every output capsule equally.

    References:
        Gu, Tresp, "Improving the Robustness of Capsule Networks to Image Affine Transformations" (2019), section 4.
        https://arxiv.org/abs/1911.07968
    """
    couplings = torch.full_like(votes[..., 0], 1 / votes.shape[2])
    poses = squash(torch.einsum("bio,bioh->boh", couplings, votes))
    return Routed(poses, capsule_norm(poses), couplings)
