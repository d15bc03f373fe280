"""Inverted dot-product attention routing; see `capsnet_jax.routing.inverted_attention`."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from capsnet_torch.capsules import Routed
from capsnet_torch.routing.arguments import check_arguments, learns


@learns(gain="h", offset="h", readout="h", readout_bias="")
def inverted_attention(
    votes: Float[Tensor, "b i o h"],
    activations: Float[Tensor, "b i"],
    *,
    num_iterations: int = 3,
    gain: Float[Tensor, " h"] | float = 1.0,
    offset: Float[Tensor, " h"] | float = 0.0,
    readout: Float[Tensor, " h"] | float = 0.0,
    readout_bias: Float[Tensor, ""] | float = 0.0,
    epsilon: float = 1e-5,
) -> Routed:
    """Attend from output to input capsules, with a softmax over outputs, starting from poses of zero as in the paper.

    References:
        Tsai, Srivastava, Goh, Salakhutdinov, "Capsules with Inverted Dot-Product Attention Routing" (2020),
        algorithm 1. https://arxiv.org/abs/2002.04764
    """
    # axes: b = batch, i = input capsules, o = output capsules, h = output pose size
    check_arguments("inverted_attention", num_iterations=num_iterations)
    size = votes.shape[-1]
    queries = torch.zeros_like(votes[:, 0])
    for _ in range(num_iterations):
        logits = torch.einsum("boh,bioh->bio", queries / size**0.5, votes)
        couplings = torch.softmax(logits, dim=-1)
        gathered = (couplings[..., None] * votes).sum(dim=1)
        queries = functional.layer_norm(gathered, (size,), eps=epsilon) * gain + offset
    return Routed(queries, torch.sigmoid((readout * queries).sum(dim=-1) + readout_bias), couplings)
