"""Random routing: a baseline whose couplings carry no information."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from capsnet_jax.capsules import Routed
from capsnet_jax.errors import UsageError
from capsnet_jax.ops import capsule_norm, squash
from capsnet_jax.routing.arguments import check_arguments


def random(votes: Float[Array, "i o h"], activations: Float[Array, " i"], *, seed: int = 0) -> Routed:
    r"""Random couplings, the same for every example: $v_o = \mathrm{squash}(\sum_i c_{io} u_{io})$.

    The couplings of each input capsule are drawn uniformly from the simplex. They depend on the index of the capsule,
    so unlike all other algorithms here, this one depends on the order of the capsules.

    Args:
        votes: $u_{io}$ of one example.
        activations: not used.
        seed: seed of the draw, which NumPy makes, so that JAX and PyTorch draw the same couplings.

    Returns:
        The squashed output capsules, their norms as activations, and the couplings.

    Raises:
        UsageError: votes or activations have a wrong shape, or the seed is negative.
    """
    check_arguments("random", votes, activations)
    if seed < 0:
        raise UsageError(f"Routing random: seed is {seed}, and must be at least 0.")
    num_inputs, num_outputs, _ = votes.shape
    couplings = jnp.asarray(np.random.default_rng(seed).dirichlet(np.ones(num_outputs), num_inputs), votes.dtype)
    poses = squash(jnp.einsum("io,ioh->oh", couplings, votes))
    return Routed(poses, capsule_norm(poses), couplings)
