"""The few functions every capsule network is made of; exact, with finite gradients, from zero to 1e15."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from capsnet_jax.errors import UsageError

Labels = Int[Array, " b"] | Int[Array, "b k"]
"""The class of each example, or the k different classes of which each example shows one object."""


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


def standardize_images(images: Float[Array, "b height width channels"]) -> Float[Array, "b height width channels"]:
    r"""Gives each image by itself the mean 0 and the deviation 1, over all of its n pixels and channels.

    $$y = \frac{x - \bar x}{\max(\sigma, 1 / \sqrt n)}$$

    Args:
        images: of any range.

    Returns:
        Images of deviation 1, or less where that of the pixels is below $1 / \sqrt n$; zero for an image of one colour.

    References:
        `tf.image.per_image_standardization`, https://www.tensorflow.org/api_docs/python/tf/image
    """
    centered = images - reduce(images, "b height width channels -> b 1 1 1", "mean")
    variance = reduce(jnp.square(centered), "b height width channels -> b 1 1 1", "mean")
    # The larger of the two is taken before the root, whose gradient at zero is infinite.
    return centered / jnp.sqrt(jnp.maximum(variance, 1 / images[0].size))


def multi_hot(labels: Labels, num_classes: int, dtype: DTypeLike) -> Float[Array, "b o"]:
    """1 for every class that is among the labels, and 0 for all others."""
    hot = jax.nn.one_hot(labels, num_classes, dtype=dtype)
    return hot if labels.ndim == 1 else reduce(hot, "b k o -> b o", "max")


def check_labels(labels: Shaped[Array | np.ndarray, "..."], num_examples: Any, num_classes: int) -> None:
    """Refuses labels that are not class indices of these examples.

    Args:
        labels: expected to be integers `[b]` or `[b k]`, in [0, num_classes). Their range is checked outside
            `jax.jit` only, where they have values.
        num_examples: b; a symbol in a program that is exported for all batch sizes.
        num_classes: number of classes.

    Raises:
        UsageError: says what was got and what was expected.
    """
    if labels.ndim not in (1, 2) or labels.shape[0] != num_examples or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise UsageError(
            f"Labels are {labels.dtype} of shape {labels.shape}; expected integers of shape ({num_examples},), or "
            f"({num_examples}, k) for k labels of each image."
        )
    if isinstance(labels, jax.core.Tracer):
        return
    wrong = np.asarray(labels)[(np.asarray(labels) < 0) | (np.asarray(labels) >= num_classes)]
    if wrong.size:
        raise UsageError(f"The label {wrong[0]} is not a class; expected 0 to {num_classes - 1}.")


def mask_by_label(poses: Float[Array, "b o h"], labels: Labels) -> Float[Array, "b o h"]:
    """Sets all capsules to zero but those of the labels.

    Args:
        poses: one capsule for each class.
        labels: class indices in [0, o), one or several for each example.

    Returns:
        The poses, zero outside the labelled classes.

    References:
        Sabour, Frosst, Hinton (2017), section 4.1.
    """
    return poses * rearrange(multi_hot(labels, poses.shape[1], poses.dtype), "b o -> b o 1")


def answers_right(activations: Float[Array, "b o"], labels: Labels) -> Bool[Array, " b"]:
    """Whether the most active capsules, as many as there are labels, are exactly those of the labels.

    Args:
        activations: one for each class. Of equal ones, that of the lower class index counts as the more active.
        labels: class indices in [0, o), one or several for each example; an answer is right if all of them are.

    References:
        Sabour, Frosst, Hinton (2017), section 6.2, for two overlapping digits.
    """
    num_labels = 1 if labels.ndim == 1 else labels.shape[1]
    _, answers = jax.lax.top_k(activations, num_labels)
    given, wanted = (multi_hot(each, activations.shape[1], activations.dtype) for each in (answers, labels))
    return (given == wanted).all(axis=1)


def convolution(
    images: Float[Array, "b height width channels"],
    kernel: Float[Array, "kernel_height kernel_width channels features"],
    stride: int,
) -> Float[Array, "b out_height out_width features"]:
    """Cross-correlates images with a kernel, without padding: the convolution of XLA.

    Args:
        images: at least as high and wide as the kernel.
        kernel: one filter for each output feature.
        stride: step of the kernel, in pixels, along both axes.

    Returns:
        The features where the kernel fits; see `positions_after` for their height and width.
    """
    return jax.lax.conv_general_dilated(
        images, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def positions_after(size: Sequence[int], kernel: Sequence[int], stride: int) -> tuple[int, int]:
    """Height and width of the result of a convolution without padding.

    Args:
        size: height and width of the images.
        kernel: height and width of the kernel.
        stride: step of the kernel along both axes.
    """
    return (size[0] - kernel[0]) // stride + 1, (size[1] - kernel[1]) // stride + 1


def to_unit_range(images: Shaped[Array, "b height width channels"]) -> Float[Array, "b height width channels"]:
    """Converts images of bytes to float32 in [0, 1]; images of floats are returned as they are."""
    return images / jnp.float32(255) if images.dtype == jnp.uint8 else images


def at_least_float32(values: Float[Array, "..."]) -> Float[Array, "..."]:
    """Casts a smaller dtype up to float32; float32 and float64 stay what they are."""
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))
