"""Dynamic routing between capsules."""

import torch
from jaxtyping import Float
from torch import Tensor

from capsnet_torch.capsules import Routed
from capsnet_torch.ops import capsule_norm, squash


def dynamic(votes: Float[Tensor, "b i o h"], activations: Float[Tensor, "b i"], *, num_iterations: int = 3) -> Routed:
    """Routing by agreement, for a batch, in the order of the paper.

    References:
        Sabour, Frosst, Hinton, "Dynamic Routing Between Capsules" (2017), procedure 1. https://arxiv.org/abs/1710.09829
    """
    # axes: b = batch, i = input capsules, o = output capsules, h = output pose size
    if num_iterations < 1:
        raise ValueError(f"num_iterations is {num_iterations}, and must be at least 1.")
    logits = torch.zeros_like(votes[..., 0])
    for iteration in range(num_iterations):
        couplings = torch.softmax(logits, dim=-1)
        poses = squash(torch.einsum("bio,bioh->boh", couplings, votes))
        if iteration < num_iterations - 1:
            logits = logits + torch.einsum("bioh,boh->bio", votes, poses)
    return Routed(poses, capsule_norm(poses), couplings)
