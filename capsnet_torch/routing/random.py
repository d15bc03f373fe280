"""Random routing, a baseline; see `capsnet_jax.routing.random`."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from capsnet_torch.capsules import Routed
from capsnet_torch.ops import capsule_norm, squash


def random(votes: Float[Tensor, "b i o h"], activations: Float[Tensor, "b i"], *, seed: int = 0) -> Routed:
    """Draw the couplings of each input capsule uniformly from the simplex, with NumPy, once for all examples."""
    _, num_inputs, num_outputs, _ = votes.shape
    drawn = np.random.default_rng(seed).dirichlet(np.ones(num_outputs), num_inputs)
    couplings = torch.as_tensor(drawn, dtype=votes.dtype, device=votes.device).expand(votes.shape[:-1])
    poses = squash((couplings[..., None] * votes).sum(dim=1))
    return Routed(poses, capsule_norm(poses), couplings)
