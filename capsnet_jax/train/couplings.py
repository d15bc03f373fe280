"""What couplings tell: how evenly input capsules are shared out among output capsules."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Shaped

from capsnet_jax.ops import to_unit_range

IMAGES_AT_ONCE = 250  # as in evaluation; the votes of the reference model for these are 184 MB


def coupling_entropy(couplings: Float[Array, "*batch i o"]) -> Float[Array, "*batch i"]:
    r"""How evenly each input capsule is shared out: 1 if all outputs get the same, and 0 if one gets all.

    $$-\frac{1}{\ln O} \sum_o p_o \ln p_o, \quad p_o = \frac{c_o}{\sum_k c_k}$$

    Args:
        couplings: negative ones, which a learned prior can make, count as 0. An input capsule without any has no
            preference, and counts as shared out evenly.
    """
    couplings = jnp.maximum(couplings, 0)
    total = couplings.sum(axis=-1, keepdims=True)
    num_outputs = couplings.shape[-1]
    shares = jnp.where(total > 0, couplings / jnp.where(total > 0, total, 1), 1 / num_outputs)
    return jax.scipy.special.entr(shares).sum(axis=-1) / math.log(max(num_outputs, 2))


def make_coupling_entropy(graphdef: nnx.GraphDef) -> Callable[..., Float[Array, ""]]:
    """A compiled function `(state of the model, images) -> coupling entropy`.

    It is that of the last capsule layer, as a mean over its input capsules and the images; see `coupling_entropy`.
    """

    @jax.jit
    def mean_entropy(state: nnx.State, images: Shaped[Array, "images height width channels"]) -> Float[Array, ""]:
        model = nnx.merge(graphdef, state)
        model.eval()

        def entropy(image: Shaped[Array, "height width channels"]) -> Float[Array, ""]:
            return coupling_entropy(model.route(to_unit_range(image[None]))[-1].couplings).mean()

        return jax.lax.map(entropy, images, batch_size=min(IMAGES_AT_ONCE, len(images))).mean()

    return mean_entropy
