"""Inverted dot-product attention routing."""

import jax
import jax.numpy as jnp
from einops import reduce
from jaxtyping import Array, Float

from capsnet_jax.capsules import Routed
from capsnet_jax.ops import standardize
from capsnet_jax.routing.arguments import check_arguments, learns


@learns(gain="h", offset="h", readout="h", readout_bias="")
def inverted_attention(
    votes: Float[Array, "i o h"],
    activations: Float[Array, " i"],
    *,
    num_iterations: int = 3,
    gain: Float[Array, " h"] | float = 1.0,
    offset: Float[Array, " h"] | float = 0.0,
    readout: Float[Array, " h"] | float = 0.0,
    readout_bias: Float[Array, ""] | float = 0.0,
    epsilon: float = 1e-5,
) -> Routed:
    r"""Inverted dot-product attention: attention with a softmax over the queries, which are the output capsules.

    Starting from $v_o = \mathrm{LN}(\sum_i u_{io} / O)$, repeat `num_iterations` - 1 times:

    $$c_{io} = \mathrm{softmax}_o \frac{u_{io} \cdot v_o}{\sqrt h}, \quad
      v_o = \mathrm{LN}\Bigl(\sum_i c_{io} u_{io}\Bigr)$$

    Args:
        votes: $u_{io}$ of one example.
        activations: not used.
        num_iterations: number of times the output capsules are computed; the paper counts one fewer.
        gain: learned gain of the layer norm LN.
        offset: learned offset of the layer norm.
        readout: learned weight $w$ of the activations.
        readout_bias: learned bias $\beta$ of the activations.
        epsilon: added to the variance in the layer norm.

    Returns:
        The normalized output capsules, the activations $\sigma(w \cdot v_o + \beta)$, and the couplings of the last
        iteration. The norms of normalized poses are all alike, so they cannot serve as activations; like the paper,
        this reads activations with one linear function shared by all output capsules.

    Raises:
        UsageError: votes or activations have a wrong shape, or `num_iterations` is less than 1.

    References:
        Tsai, Srivastava, Goh, Salakhutdinov, "Capsules with Inverted Dot-Product Attention Routing" (2020),
        algorithm 1, sequential rather than concurrent routing. https://arxiv.org/abs/2002.04764
    """
    check_arguments("inverted_attention", votes, activations, num_iterations=num_iterations)
    num_outputs, size = votes.shape[1:]

    def layer_norm(poses: Float[Array, "o h"]) -> Float[Array, "o h"]:
        return standardize(poses, epsilon=epsilon) * gain + offset

    couplings = jnp.full_like(votes[..., 0], 1 / num_outputs)
    poses = layer_norm(reduce(votes, "i o h -> o h", "sum") / num_outputs)
    for _ in range(num_iterations - 1):
        # Scaled before the product; see self_attention.
        couplings = jax.nn.softmax(jnp.einsum("ioh,oh->io", votes, poses / size**0.5), axis=1)
        poses = layer_norm(jnp.einsum("io,ioh->oh", couplings, votes))
    logits = reduce(poses * readout, "o h -> o", "sum") + readout_bias
    return Routed(poses, jax.nn.sigmoid(logits), couplings)
