"""Dynamic routing; see `capsnet_jax.routing.dynamic`."""

import torch
from jaxtyping import Float
from torch import Tensor

from capsnet_torch.capsules import Routed
from capsnet_torch.ops import capsule_norm, squash
from capsnet_torch.routing.arguments import check_arguments, learns


@learns(prior_logits="i o", capsule_bias="o h")
def dynamic(
    votes: Float[Tensor, "b i o h"],
    activations: Float[Tensor, "b i"],
    *,
    num_iterations: int = 3,
    leaky: bool = False,
    detach: bool = False,
    prior_logits: Float[Tensor, "i o"] | float | None = None,
    capsule_bias: Float[Tensor, "o h"] | float | None = None,
) -> Routed:
    """Route by agreement, in the order of the paper: softmax, weighted sum, squash, update of the logits.

    With `leaky`, c = exp(b) / (1 + sum_o exp(b)).

    References:
        Sabour, Frosst, Hinton, "Dynamic Routing Between Capsules" (2017), procedure 1. https://arxiv.org/abs/1710.09829
        Leaky softmax and bias: https://github.com/Sarasra/models, research/capsules.
    """
    # axes: b = batch, i = input capsules, o = output capsules, h = output pose size
    check_arguments("dynamic", num_iterations=num_iterations)
    logits = torch.zeros_like(votes[..., 0])
    if prior_logits is not None:
        logits = logits + prior_logits
    for iteration in range(num_iterations):
        log_total = torch.logsumexp(logits, dim=-1, keepdim=True)
        if leaky:
            log_total = torch.logaddexp(log_total, torch.zeros_like(log_total))
        couplings = torch.exp(logits - log_total)
        preactivations = torch.einsum("bio,bioh->boh", couplings, votes)
        poses = squash(preactivations if capsule_bias is None else preactivations + capsule_bias)
        if iteration < num_iterations - 1:
            agreement = torch.einsum("bioh,boh->bio", votes, poses)
            logits = logits + (agreement.detach() if detach else agreement)
    return Routed(poses, capsule_norm(poses), couplings)
