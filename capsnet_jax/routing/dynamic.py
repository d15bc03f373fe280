"""Dynamic routing: routing by agreement."""

import jax
import jax.numpy as jnp
from einops import reduce
from jaxtyping import Array, Float

from capsnet_jax.capsules import Routed
from capsnet_jax.ops import capsule_norm, squash
from capsnet_jax.routing.arguments import check_arguments, learns


@learns(prior_logits="i o", capsule_bias="o h")
def dynamic(
    votes: Float[Array, "i o h"],
    activations: Float[Array, " i"],
    *,
    num_iterations: int = 3,
    leaky: bool = False,
    detach: bool = False,
    prior_logits: Float[Array, "i o"] | float | None = None,
    capsule_bias: Float[Array, "o h"] | float | None = None,
) -> Routed:
    r"""Dynamic routing: an input capsule sends more to the output capsules whose poses agree with its votes.

    Starting from logits $b_{io} = 0$, repeat `num_iterations` times:

    $$c_{io} = \frac{e^{b_{io}}}{\sum_k e^{b_{ik}}}, \quad
      v_o = \mathrm{squash}\Bigl(\sum_i c_{io} u_{io}\Bigr), \quad
      b_{io} \leftarrow b_{io} + u_{io} \cdot v_o$$

    Args:
        votes: $u_{io}$, vote of input capsule i for output capsule o, of one example.
        activations: not used; the activation of a squashed capsule is already in the norm of its votes.
        num_iterations: number of times the output capsules are computed. 1 is the same as `uniform`.
        leaky: add one more term of logit zero to the softmax, so that an input capsule may send a share nowhere. The
            couplings then sum to less than 1. In the authors' code, primary capsules leak, too: with the preset
            `official`, set primary_scale to 1 / 33.
        detach: treat all but the last iteration as constants in the gradient.
        prior_logits: learned initial logits, instead of zero; section 2 of the paper.
        capsule_bias: learned bias, added before squash in every iteration, as in the authors' code.

    Returns:
        The squashed output capsules, their norms as activations, and the couplings of the last iteration.

    Raises:
        UsageError: votes or activations have a wrong shape, or `num_iterations` is less than 1.

    References:
        Sabour, Frosst, Hinton, "Dynamic Routing Between Capsules" (2017), procedure 1. https://arxiv.org/abs/1710.09829
        Leaky softmax and bias: https://github.com/Sarasra/models, research/capsules.
    """
    # axes: i = input capsules, o = output capsules, h = output pose size
    check_arguments("dynamic", votes, activations, num_iterations=num_iterations)
    num_outputs = votes.shape[1]
    constant = jax.lax.stop_gradient if detach else lambda array: array
    bias = 0 if capsule_bias is None else capsule_bias
    logits = jnp.zeros_like(votes[..., 0])
    if prior_logits is None:
        couplings = jnp.full_like(logits, 1 / (num_outputs + leaky))
        # A plain sum: with constant couplings, XLA would take long to fold constants in the einsum.
        poses = squash(reduce(votes, "i o h -> o h", "sum") / (num_outputs + leaky) + bias)
    else:
        logits += prior_logits
        couplings = _softmax(logits, leaky)
        poses = squash(jnp.einsum("io,ioh->oh", couplings, votes) + bias)
    for _ in range(num_iterations - 1):
        logits += constant(jnp.einsum("ioh,oh->io", votes, poses))
        couplings = _softmax(logits, leaky)
        poses = squash(jnp.einsum("io,ioh->oh", couplings, votes) + bias)
    return Routed(poses, capsule_norm(poses), couplings)


def _softmax(logits: Float[Array, "i o"], leaky: bool) -> Float[Array, "i o"]:
    if leaky:
        logits = jnp.pad(logits, ((0, 0), (1, 0)))
    return jax.nn.softmax(logits, axis=1)[:, int(leaky) :]
