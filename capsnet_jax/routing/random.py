"""Routing by chance: a baseline whose couplings differ, and mean nothing."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from capsnet_jax.capsules import Routed
from capsnet_jax.errors import UsageError
from capsnet_jax.ops import capsule_norm, squash
from capsnet_jax.routing.arguments import check_arguments


def random(votes: Float[Array, "i o h"], activations: Float[Array, " i"], *, seed: int = 0) -> Routed:
    r"""Couplings drawn once, the same for every example: $v_o = \mathrm{squash}(\sum_i c_{io} u_{io})$.

    Each input capsule's couplings are uniform on the simplex. They belong to the number of a capsule, so that this is
    the one routing here to which the order of capsules matters.

    Args:
        votes: $u_{io}$, for one example.
        activations: not used.
        seed: of the draw, by NumPy, so that both frameworks draw alike.

    Returns:
        The squashed output capsules, their norms as activations, and the couplings.

    Raises:
        UsageError: votes or activations are of a wrong shape, or the seed is negative.
    """
    check_arguments("random", votes, activations)
    if seed < 0:
        raise UsageError(f"Routing random: seed is {seed}, and must be at least 0.")
    num_inputs, num_outputs, _ = votes.shape
    couplings = jnp.asarray(np.random.default_rng(seed).dirichlet(np.ones(num_outputs), num_inputs), votes.dtype)
    poses = squash(jnp.einsum("io,ioh->oh", couplings, votes))
    return Routed(poses, capsule_norm(poses), couplings)
