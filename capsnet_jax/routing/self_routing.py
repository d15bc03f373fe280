"""Self-routing: every input capsule decides by itself where it sends its vote."""

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
    r"""A small linear classifier for each input capsule takes the place of agreement.

    $$c_{io} = \mathrm{softmax}_o(x_i W_i + b_i), \quad
      a_o = \frac{\sum_i a_i c_{io}}{\sum_i a_i}, \quad
      v_o = \frac{\sum_i a_i c_{io} u_{io}}{\sum_i a_i c_{io}}$$

    Args:
        votes: $u_{io}$, for one example.
        activations: $a_i$, of the input capsules.
        poses: $x_i$, of the input capsules.
        route_weight: $W_i$; learned, from zero, as by the authors.
        route_bias: $b_i$; learned.
        epsilon: added to both denominators, so that inputs of activation zero give zeros.

    Returns:
        The output capsules, activations that sum to 1 over the outputs, and the couplings.

    Raises:
        UsageError: votes, activations or poses are of a wrong shape.

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
