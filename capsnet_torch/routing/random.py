"""Routing by chance: a baseline whose couplings differ, and mean nothing."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from capsnet_torch.capsules import Routed
from capsnet_torch.ops import capsule_norm, squash


def random(votes: Float[Tensor, "b i o h"], activations: Float[Tensor, "b i"], *, seed: int = 0) -> Routed:
    """Couplings drawn once by NumPy, uniform on the simplex of each input capsule, the same for all of the batch."""
    _, num_inputs, num_outputs, _ = votes.shape
    drawn = np.random.default_rng(seed).dirichlet(np.ones(num_outputs), num_inputs)
    couplings = torch.as_tensor(drawn, dtype=votes.dtype, device=votes.device).expand(votes.shape[:-1])
    poses = squash((couplings[..., None] * votes).sum(dim=1))
    return Routed(poses, capsule_norm(poses), couplings)
