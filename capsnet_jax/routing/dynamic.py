"""Dynamic routing between capsules."""

import jax
import jax.numpy as jnp
from einops import reduce
from jaxtyping import Array, Float

from capsnet_jax.capsules import Routed
from capsnet_jax.errors import UsageError
from capsnet_jax.ops import capsule_norm, squash


def dynamic(votes: Float[Array, "i o h"], activations: Float[Array, " i"], *, num_iterations: int = 3) -> Routed:
    r"""Routing by agreement: an input capsule sends more to those outputs that its vote agrees with.

    From logits $b_{io} = 0$, `num_iterations` times:

    $$c_{io} = \frac{e^{b_{io}}}{\sum_k e^{b_{ik}}}, \quad
      v_o = \mathrm{squash}\Bigl(\sum_i c_{io} u_{io}\Bigr), \quad
      b_{io} \leftarrow b_{io} + u_{io} \cdot v_o$$

    Args:
        votes: $u_{io}$, what input capsule i predicts for output capsule o, for one example.
        activations: not used: a squashed capsule's activation is already in the length of its votes.
        num_iterations: number of times the output capsules are computed; 1 is a plain mean of the votes.

    Returns:
        The squashed output capsules, their norms as activations, and the couplings of the last iteration.

    Raises:
        UsageError: `num_iterations` is less than 1.

    References:
        Sabour, Frosst, Hinton, "Dynamic Routing Between Capsules" (2017), procedure 1. https://arxiv.org/abs/1710.09829
    """
    # axes: i = input capsules, o = output capsules, h = output pose size
    if num_iterations < 1:
        raise UsageError(f"num_iterations is {num_iterations}, and must be at least 1.")
    num_outputs = votes.shape[1]
    logits = jnp.zeros_like(votes[..., 0])
    couplings = jnp.full_like(logits, 1 / num_outputs)
    # Written as a sum: as an einsum with constant couplings, XLA folds constants at length during compilation.
    poses = squash(reduce(votes, "i o h -> o h", "sum") / num_outputs)
    for _ in range(num_iterations - 1):
        logits += jnp.einsum("ioh,oh->io", votes, poses)
        couplings = jax.nn.softmax(logits, axis=1)
        poses = squash(jnp.einsum("io,ioh->oh", couplings, votes))
    return Routed(poses, capsule_norm(poses), couplings)
