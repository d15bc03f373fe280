"""What capsule networks minimise."""

import jax
import jax.numpy as jnp
from einops import reduce
from jaxtyping import Array, Float, Int

from capsnet_jax.errors import UsageError
from capsnet_jax.ops import Labels, multi_hot

Images = Float[Array, "b height width channels"]


def margin_loss(
    activations: Float[Array, "b o"],
    labels: Labels,
    *,
    present: float = 0.9,
    absent: float = 0.1,
    absent_weight: float = 0.5,
) -> Float[Array, " b"]:
    r"""Wants the capsules of the labels longer than one margin, and all others shorter than another.

    $$\sum_o T_o \max(0, m^+ - a_o)^2 + \lambda (1 - T_o) \max(0, a_o - m^-)^2$$

    Args:
        activations: $a_o$, in [0, 1].
        labels: class indices in [0, o), one or several for each example; $T_o$ is 1 for each of them and 0 elsewhere.
        present: $m^+$, the margin of a label's capsule.
        absent: $m^-$, the margin of all others.
        absent_weight: $\lambda$, the weight of the others.

    Returns:
        The loss of each example, summed over classes.

    References:
        Sabour, Frosst, Hinton, "Dynamic Routing Between Capsules" (2017), eq. 4. https://arxiv.org/abs/1710.09829
    """
    targets = multi_hot(labels, activations.shape[1], activations.dtype)
    too_short = jnp.square(jax.nn.relu(present - activations))
    too_long = jnp.square(jax.nn.relu(activations - absent))
    return reduce(targets * too_short + absent_weight * (1 - targets) * too_long, "b o -> b", "sum")


def spread_loss(
    activations: Float[Array, "b o"], labels: Labels, *, margin: Float[Array, ""] | float = 0.9
) -> Float[Array, " b"]:
    r"""Wants the capsule of the label more active than every other, by a margin.

    $$\sum_{o \ne t} \max(0, m - (a_t - a_o))^2$$

    Args:
        activations: $a_o$, in [0, 1].
        labels: class indices $t$ in [0, o), one for each example.
        margin: $m$; see `spread_margin`.

    Returns:
        The loss of each example, summed over the other classes.

    Raises:
        UsageError: examples have several labels, for which this loss is not defined.

    References:
        Hinton, Sabour, Frosst, "Matrix Capsules with EM Routing" (2018), eq. 3.
    """
    if labels.ndim > 1:
        raise UsageError(
            f"The spread loss got {labels.shape[1]} labels for each image, and is defined for one; expected margin."
        )
    is_label = jax.nn.one_hot(labels, activations.shape[1], dtype=activations.dtype)
    of_label = reduce(is_label * activations, "b o -> b 1", "sum")
    too_close = jnp.square(jax.nn.relu(margin - (of_label - activations)))
    return reduce((1 - is_label) * too_close, "b o -> b", "sum")


def spread_margin(step: Int[Array, ""] | int) -> Float[Array, ""]:
    r"""The margin of the spread loss in a training step, $0.2 + 0.79\,\sigma(\min(10, t / 50000 - 4))$.

    A small one at first, so that no capsules die; the authors' schedule,
    https://github.com/google-research/google-research/tree/master/capsule_em
    """
    done = jnp.asarray(step, float)  # an int32 would become float32, where everything else is float64
    return 0.2 + 0.79 * jax.nn.sigmoid(jnp.minimum(10.0, done / 50000 - 4))


def reconstruction_loss(reconstructions: Images, images: Images, *, error: str = "mean") -> Float[Array, " b"]:
    """Squared error of each example: the "mean" over its pixels and channels, or their "sum"."""
    return reduce(jnp.square(reconstructions - images), "b height width channels -> b", error)
