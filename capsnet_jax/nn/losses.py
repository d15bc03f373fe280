"""Losses of capsule networks; each returns one value per example."""

import jax
import jax.numpy as jnp
from einops import reduce
from jaxtyping import Array, Float, Int

from capsnet_jax.errors import UsageError
from capsnet_jax.ops import Unchecked, check_labels, multi_hot

Images = Float[Array, "b height width channels"]


def margin_loss(
    activations: Float[Array, "b o"],
    labels: Unchecked,
    *,
    present: float = 0.9,
    absent: float = 0.1,
    absent_weight: float = 0.5,
) -> Float[Array, " b"]:
    r"""Compute the margin loss: push activations of labelled classes above one margin, and all others below another.

    $$\sum_o T_o \max(0, m^+ - a_o)^2 + \lambda (1 - T_o) \max(0, a_o - m^-)^2$$

    Args:
        activations: $a_o$, in [0, 1].
        labels: class indices in [0, o), one or several per example; $T_o$ is 1 for these classes and 0 for the others.
        present: margin $m^+$ of labelled classes.
        absent: margin $m^-$ of the other classes.
        absent_weight: $\lambda$, weight of the other classes.

    Returns:
        The loss of each example, summed over classes.

    Raises:
        UsageError: labels have a wrong shape or dtype or, outside `jax.jit`, are out of range.

    References:
        Sabour, Frosst, Hinton, "Dynamic Routing Between Capsules" (2017), eq. 4. https://arxiv.org/abs/1710.09829

    Examples:
        >>> import jax.numpy as jnp
        >>> from capsnet_jax import margin_loss
        >>> activations = jnp.array([[0.95, 0.05], [0.4, 0.3]])
        >>> [round(float(loss), 3) for loss in margin_loss(activations, jnp.array([0, 0]))]  # 0.5^2 + 0.5 * 0.2^2
        [0.0, 0.27]
    """
    check_labels(labels, *activations.shape)
    targets = multi_hot(jnp.asarray(labels), activations.shape[1], activations.dtype)
    too_short = jnp.square(jax.nn.relu(present - activations))
    too_long = jnp.square(jax.nn.relu(activations - absent))
    return reduce(targets * too_short + absent_weight * (1 - targets) * too_long, "b o -> b", "sum")


def spread_loss(
    activations: Float[Array, "b o"], labels: Unchecked, *, margin: Float[Array, ""] | float = 0.9
) -> Float[Array, " b"]:
    r"""Compute the spread loss: push the activation of the label above all others by a margin.

    $$\sum_{o \ne t} \max(0, m - (a_t - a_o))^2$$

    Args:
        activations: $a_o$, in [0, 1].
        labels: class indices $t$ in [0, o), one per example.
        margin: $m$; training schedules it with `spread_margin`.

    Returns:
        The loss of each example, summed over the other classes.

    Raises:
        UsageError: labels have a wrong shape or dtype or, outside `jax.jit`, are out of range; or there are several per
            example, for which this loss is not defined.

    References:
        Hinton, Sabour, Frosst, "Matrix Capsules with EM Routing" (2018), eq. 3.

    Examples:
        >>> import jax.numpy as jnp
        >>> from capsnet_jax import spread_loss
        >>> loss = spread_loss(jnp.array([[0.9, 0.4, 0.1]]), jnp.array([0]), margin=0.7)
        >>> round(float(loss[0]), 3)  # (0.7 - 0.5)^2; class 2 is further away than the margin
        0.04
    """
    check_labels(labels, *activations.shape)
    if labels.ndim > 1:
        raise UsageError(
            f"The spread loss got {labels.shape[1]} labels for each image, and is defined for one; expected "
            "the margin loss."
        )
    is_label = jax.nn.one_hot(labels, activations.shape[1], dtype=activations.dtype)
    of_label = reduce(is_label * activations, "b o -> b 1", "sum")
    too_close = jnp.square(jax.nn.relu(margin - (of_label - activations)))
    return reduce((1 - is_label) * too_close, "b o -> b", "sum")


def spread_margin(step: Int[Array, ""] | int) -> Float[Array, ""]:
    r"""Compute the margin of the spread loss at a training step, $0.2 + 0.79\,\sigma(\min(10, t / 50000 - 4))$.

    A small margin early in training keeps capsules from dying.

    References:
        The authors' schedule, https://github.com/google-research/google-research/tree/master/capsule_em
    """
    done = jnp.asarray(step, float)  # an int32 would become float32 even where everything else is float64
    return 0.2 + 0.79 * jax.nn.sigmoid(jnp.minimum(10.0, done / 50000 - 4))


def reconstruction_loss(reconstructions: Images, images: Images, *, error: str = "mean") -> Float[Array, " b"]:
    """Compute the squared error of reconstructed images.

    Args:
        reconstructions: images made by the decoder.
        images: original images, with pixels in [0, 1].
        error: "mean" over the pixels and channels of an image, or their "sum".

    Returns:
        The error of each example.

    Examples:
        >>> import jax.numpy as jnp
        >>> from capsnet_jax import reconstruction_loss
        >>> loss = reconstruction_loss(jnp.zeros((2, 28, 28, 1)), jnp.full((2, 28, 28, 1), 0.5))
        >>> loss.tolist()
        [0.25, 0.25]
    """
    return reduce(jnp.square(reconstructions - images), "b height width channels -> b", error)
