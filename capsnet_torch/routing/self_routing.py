"""Self-routing; see `capsnet_jax.routing.self_routing`."""

import torch
from jaxtyping import Float
from torch import Tensor

from capsnet_torch.capsules import Routed
from capsnet_torch.routing.arguments import learns


@learns(route_weight="i d o", route_bias="i o")
def self_routing(
    votes: Float[Tensor, "b i o h"],
    activations: Float[Tensor, "b i"],
    *,
    poses: Float[Tensor, "b i d"],
    route_weight: Float[Tensor, "i d o"] | float = 0.0,
    route_bias: Float[Tensor, "i o"] | float = 0.0,
    epsilon: float = 1e-8,
) -> Routed:
    """Compute the couplings of each input capsule by a linear classifier of its pose.

    References:
        Hahn, Pyeon, Kim, "Self-Routing Capsule Networks" (2019), eq. 4 to 6.
    """
    logits = (poses[..., None] * route_weight).sum(dim=2) + route_bias
    couplings = torch.softmax(logits.expand(votes.shape[:-1]), dim=-1)
    received = activations[..., None] * couplings
    mass = received.sum(dim=1)
    means = torch.einsum("bioh,bio->boh", votes, received / (mass[:, None] + epsilon))
    return Routed(means, mass / (activations.sum(dim=1, keepdim=True) + epsilon), couplings)
