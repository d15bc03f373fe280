"""Self-routing: each input capsule computes its own couplings, without agreement."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from capsnet_jax.capsules import Routed
from capsnet_jax.errors import UsageError
from capsnet_jax.routing.arguments import check_arguments, learns


@learns(route_weight="i d o", route_bias="i o")
def self_routing(
    votes: Float[Array, "i o h"],
    activations: Float[Array, " i"],
    *,
    poses: Float[Array, "i d"],
    route_weight: Float[Array, "i d o"] | float = 0.0,
    route_bias: Float[Array, "i o"] | float = 0.0,
    epsilon: float = 1e-8,
) -> Routed:
    r"""Self-routing: a linear classifier per input capsule computes its couplings from its pose.

    $$c_{io} = \mathrm{softmax}_o(x_i W_i + b_i), \quad
      a_o = \frac{\sum_i a_i c_{io}}{\sum_i a_i}, \quad
      v_o = \frac{\sum_i a_i c_{io} u_{io}}{\sum_i a_i c_{io}}$$

    Args:
        votes: $u_{io}$ of one example.
        activations: $a_i$ of the input capsules.
        poses: $x_i$ of the input capsules.
        route_weight: learned $W_i$, initially zero as in the authors' code.
        route_bias: learned $b_i$.
        epsilon: added to both denominators, so that inputs of activation zero give zero.

    Returns:
        The output capsules, activations that sum to 1 over the output capsules, and the couplings.

    Raises:
        UsageError: votes, activations or poses have a wrong shape.

    References:
        Hahn, Pyeon, Kim, "Self-Routing Capsule Networks" (2019), eq. 4 to 6.
    """
    check_arguments("self_routing", votes, activations)
    num_inputs, num_outputs, _ = votes.shape
    if poses.ndim != 2 or poses.shape[0] != num_inputs:
        raise UsageError(f"Routing self_routing: poses are {poses.shape}; expected [i d] with i = {num_inputs}.")
    route_weight = jnp.broadcast_to(route_weight, (num_inputs, poses.shape[-1], num_outputs))
    couplings = jax.nn.softmax(jnp.einsum("id,ido->io", poses, route_weight) + route_bias, axis=1)
    shares = activations[:, None] * couplings
    mass = shares.sum(axis=0)
    routed = jnp.einsum("io,ioh->oh", shares, votes) / (mass[:, None] + epsilon)
    return Routed(routed, mass / (activations.sum() + epsilon), couplings)
