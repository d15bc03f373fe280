"""The few functions every capsule network is made of; exact, with finite gradients, from zero to 1e15."""

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from jaxtyping import Array, Float, Int


@jax.custom_jvp
def capsule_norm(poses: Float[Array, "*capsules h"]) -> Float[Array, "*capsules"]:
    r"""Euclidean norm of each pose, $\|s\| = \sqrt{\sum_h s_h^2}$, with gradient $s / \|s\|$, and zero at zero.

    The pose is divided by its largest component first: in float32 the plain sum of squares is zero below 1e-23 and
    infinite above 1e19. The gradient of the plain norm at zero is NaN.

    Args:
        poses: vectors along the last axis, of any length.

    Returns:
        The lengths, in the units of the poses. Poses with subnormal components only count as zero, as XLA flushes
        those on most hardware.
    """
    largest = reduce(jnp.abs(poses), "... h -> ... 1", "max")
    scale = jnp.where(largest >= jnp.finfo(poses.dtype).tiny, largest, 1)
    return jnp.sqrt(reduce(jnp.square(poses / scale), "... h -> ...", "sum")) * rearrange(scale, "... 1 -> ...")


@capsule_norm.defjvp
def _capsule_norm_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # A rule of our own, as the one derived would multiply by the scale before it divides by it, and underflow.
    (poses,), (tangent,) = primals, tangents
    norm = capsule_norm(poses)
    direction = poses / rearrange(jnp.where(norm > 0, norm, 1), "... -> ... 1")
    return norm, reduce(direction * tangent, "... h -> ...", "sum")


def squash(poses: Float[Array, "*capsules h"]) -> Float[Array, "*capsules h"]:
    r"""Shrinks each pose to a norm in [0, 1) and keeps its direction.

    $$v = \frac{\|s\|^2}{1 + \|s\|^2} \frac{s}{\|s\|}$$

    Args:
        poses: vectors along the last axis, of any length.

    Returns:
        Vectors whose norm can be read as a probability. The value and the gradient at zero are zero.

    References:
        Sabour, Frosst, Hinton, "Dynamic Routing Between Capsules" (2017), eq. 1. https://arxiv.org/abs/1710.09829
    """
    norm = rearrange(capsule_norm(poses), "... -> ... 1")
    # |s| / (1 + |s|^2) as two factors: as one quotient its gradient overflows in float32 from 1e10 on.
    hypotenuse = jnp.sqrt(1 + jnp.square(norm))
    return (norm / hypotenuse) * (poses / hypotenuse)


def direction(poses: Float[Array, "*capsules h"]) -> Float[Array, "*capsules h"]:
    r"""Each pose divided by its length, $s / \|s\|$; a pose of zero stays zero, with gradient zero.

    Args:
        poses: vectors along the last axis, of any length.

    Returns:
        Vectors of length 1 or 0.
    """
    # The direction does not depend on a common factor, so this one may count as a constant. Without it, the gradient
    # divides by the square of the length, which underflows.
    largest = jax.lax.stop_gradient(reduce(jnp.abs(poses), "... h -> ... 1", "max"))
    scaled = poses / jnp.where(largest >= jnp.finfo(poses.dtype).tiny, largest, 1)
    norm = rearrange(capsule_norm(scaled), "... -> ... 1")
    return jnp.where(norm > 0, scaled / jnp.where(norm > 0, norm, 1), 0)


def exponential_squash(poses: Float[Array, "*capsules h"]) -> Float[Array, "*capsules h"]:
    r"""Shrinks each pose to a norm in [0, 1) and keeps its direction; less than `squash` does to short poses.

    $$v = (1 - e^{-\|s\|}) \frac{s}{\|s\|}$$

    Args:
        poses: vectors along the last axis, of any length.

    Returns:
        Vectors whose norm can be read as a probability. The value at zero is zero; so is the gradient that is given
        there, as a zero vector has no direction.

    References:
        Mazzia, Salvetti, Chiaberge, "Efficient-CapsNet" (2021), section 3. https://arxiv.org/abs/2101.12491
    """
    return -jnp.expm1(-rearrange(capsule_norm(poses), "... -> ... 1")) * direction(poses)


def standardize(values: Float[Array, "*batch n"], *, epsilon: float = 1e-5) -> Float[Array, "*batch n"]:
    r"""Layer normalisation without weights, along the last axis.

    $$y = \frac{x - \bar x}{\sqrt{\overline{(x - \bar x)^2} + \epsilon}}$$

    `jax.nn.standardize` takes the variance as a difference of two means, which in float32 costs half of the digits.

    Args:
        values: of any size.
        epsilon: added to the variance.
    """
    centered = values - reduce(values, "... n -> ... 1", "mean")
    return centered / jnp.sqrt(reduce(jnp.square(centered), "... n -> ... 1", "mean") + epsilon)


def mask_by_label(poses: Float[Array, "b o h"], labels: Int[Array, " b"]) -> Float[Array, "b o h"]:
    """Sets all capsules to zero but the one of the label.

    Args:
        poses: one capsule for each class.
        labels: class indices in [0, o).

    Returns:
        The poses, zero outside the labelled class.

    References:
        Sabour, Frosst, Hinton (2017), section 4.1.
    """
    return poses * jax.nn.one_hot(labels, poses.shape[1], dtype=poses.dtype)[..., None]
