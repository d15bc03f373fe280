"""Norms, squash functions and label operations that all layers share; stable, with finite gradients, from 0 to 1e15."""

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
Unchecked = Shaped[Array | np.ndarray, "..."]  # an argument of any shape and dtype, which the function checks itself
"""One class index per example, or the indices of the k different classes that each example shows."""


@jax.custom_jvp
def capsule_norm(poses: Float[Array, "*capsules h"]) -> Float[Array, "*capsules"]:
    r"""Compute the Euclidean norm of each pose, $\|s\| = \sqrt{\sum_h s_h^2}$, safe at zero and at any scale.

    The gradient is $s / \|s\|$, and zero at zero, where the gradient of `jnp.linalg.norm` is NaN. Poses are divided by
    their largest component first: in float32 the plain sum of squares underflows below 1e-23 and overflows above 1e19.

    Args:
        poses: vectors along the last axis.

    Returns:
        The norms. Poses with only subnormal components count as zero, because XLA flushes subnormals on most hardware.
    """
    largest = reduce(jnp.abs(poses), "... h -> ... 1", "max")
    scale = jnp.where(largest >= jnp.finfo(poses.dtype).tiny, largest, 1)
    return jnp.sqrt(reduce(jnp.square(poses / scale), "... h -> ...", "sum")) * rearrange(scale, "... 1 -> ...")


@capsule_norm.defjvp
def _capsule_norm_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # The derivative that JAX derives would multiply by the scale before it divides by it, and underflow.
    (poses,), (tangent,) = primals, tangents
    norm = capsule_norm(poses)
    direction = poses / rearrange(jnp.where(norm > 0, norm, 1), "... -> ... 1")
    return norm, reduce(direction * tangent, "... h -> ...", "sum")


def squash(poses: Float[Array, "*capsules h"]) -> Float[Array, "*capsules h"]:
    r"""Shrink each pose to a norm in [0, 1) and keep its direction.

    $$v = \frac{\|s\|^2}{1 + \|s\|^2} \frac{s}{\|s\|}$$

    Args:
        poses: vectors along the last axis.

    Returns:
        Vectors whose norm can be read as a probability. The value and the gradient at zero are zero.

    References:
        Sabour, Frosst, Hinton, "Dynamic Routing Between Capsules" (2017), eq. 1. https://arxiv.org/abs/1710.09829
    """
    norm = rearrange(capsule_norm(poses), "... -> ... 1")
    # |s| / (1 + |s|^2) as two factors: the gradient of a single quotient overflows in float32 from 1e10 on.
    hypotenuse = jnp.sqrt(1 + jnp.square(norm))
    return (norm / hypotenuse) * (poses / hypotenuse)


def direction(poses: Float[Array, "*capsules h"]) -> Float[Array, "*capsules h"]:
    r"""Divide each pose by its norm, $s / \|s\|$; a pose of zero stays zero, with gradient zero.

    Args:
        poses: vectors along the last axis.

    Returns:
        Vectors of norm 1 or 0.
    """
    # A common factor does not change the direction, so it needs no gradient. Without it, the gradient would divide by
    # the squared norm, which underflows.
    largest = jax.lax.stop_gradient(reduce(jnp.abs(poses), "... h -> ... 1", "max"))
    scaled = poses / jnp.where(largest >= jnp.finfo(poses.dtype).tiny, largest, 1)
    norm = rearrange(capsule_norm(scaled), "... -> ... 1")
    return jnp.where(norm > 0, scaled / jnp.where(norm > 0, norm, 1), 0)


def exponential_squash(poses: Float[Array, "*capsules h"]) -> Float[Array, "*capsules h"]:
    r"""Shrink each pose to a norm in [0, 1) and keep its direction; short poses shrink less than by `squash`.

    $$v = (1 - e^{-\|s\|}) \frac{s}{\|s\|}$$

    Args:
        poses: vectors along the last axis.

    Returns:
        Vectors whose norm can be read as a probability. The value and the gradient at zero are zero.

    References:
        Mazzia, Salvetti, Chiaberge, "Efficient-CapsNet" (2021), section 3. https://arxiv.org/abs/2101.12491
    """
    return -jnp.expm1(-rearrange(capsule_norm(poses), "... -> ... 1")) * direction(poses)


def standardize(values: Float[Array, "*batch n"], *, epsilon: float = 1e-5) -> Float[Array, "*batch n"]:
    r"""Normalize to mean 0 and variance 1 along the last axis: layer normalization without learned weights.

    $$y = \frac{x - \bar x}{\sqrt{\overline{(x - \bar x)^2} + \epsilon}}$$

    Differs from `jax.nn.standardize`, which computes the variance as a difference of two means and so loses half of the
    digits in float32.

    Args:
        values: any array.
        epsilon: added to the variance.

    Returns:
        The normalized array, of the same shape.
    """
    centered = values - reduce(values, "... n -> ... 1", "mean")
    return centered / jnp.sqrt(reduce(jnp.square(centered), "... n -> ... 1", "mean") + epsilon)


def standardize_images(images: Float[Array, "b height width channels"]) -> Float[Array, "b height width channels"]:
    r"""Normalize each image to mean 0 and standard deviation 1 over all of its n pixels and channels.

    $$y = \frac{x - \bar x}{\max(\sigma, 1 / \sqrt n)}$$

    Args:
        images: pixels of any range.

    Returns:
        Images of standard deviation 1, or less if $\sigma < 1 / \sqrt n$. A constant image becomes zero.

    References:
        `tf.image.per_image_standardization`, https://www.tensorflow.org/api_docs/python/tf/image
    """
    centered = images - reduce(images, "b height width channels -> b 1 1 1", "mean")
    variance = reduce(jnp.square(centered), "b height width channels -> b 1 1 1", "mean")
    # The maximum comes before the square root, whose gradient at zero is infinite.
    return centered / jnp.sqrt(jnp.maximum(variance, 1 / images[0].size))


def multi_hot(labels: Labels, num_classes: int, dtype: DTypeLike) -> Float[Array, "b o"]:
    """Encode labels as one row per example, 1 for each of its classes and 0 elsewhere."""
    hot = jax.nn.one_hot(labels, num_classes, dtype=dtype)
    return hot if labels.ndim == 1 else reduce(hot, "b k o -> b o", "max")


def check_labels(labels: Unchecked, num_examples: Any, num_classes: int) -> None:
    """Check that labels are class indices, one row per example.

    Args:
        labels: integers `[b]` or `[b k]` in [0, num_classes). The range is not checked under `jax.jit`.
        num_examples: expected b; a symbolic dimension in a program that is exported for any batch size.
        num_classes: number of classes.

    Raises:
        UsageError: shape, dtype or range are wrong.
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
    """Zero the poses of all capsules except those of the labelled classes.

    Args:
        poses: one capsule per class.
        labels: class indices in [0, o), one or several per example.

    Returns:
        The masked poses.

    References:
        Sabour, Frosst, Hinton (2017), section 4.1.
    """
    return poses * rearrange(multi_hot(labels, poses.shape[1], poses.dtype), "b o -> b o 1")


def answers_right(activations: Float[Array, "b o"], labels: Labels) -> Bool[Array, " b"]:
    """Test for each example whether its k most active capsules are exactly those of its k labels.

    Args:
        activations: one per class. Ties are resolved in favour of the lower class index.
        labels: class indices in [0, o), one or several per example.

    Returns:
        True for each example whose labels are all predicted.

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
    """Convolve images without padding, by XLA's own convolution (a cross-correlation, as in all frameworks).

    Args:
        images: at least as large as the kernel.
        kernel: one filter per output feature.
        stride: step of the kernel in pixels, along both axes.

    Returns:
        The features; `positions_after` computes their height and width.
    """
    return jax.lax.conv_general_dilated(
        images, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def positions_after(size: Sequence[int], kernel: Sequence[int], stride: int) -> tuple[int, int]:
    """Compute the output height and width of a convolution without padding.

    Args:
        size: height and width of the images.
        kernel: height and width of the kernel.
        stride: step of the kernel along both axes.
    """
    return (size[0] - kernel[0]) // stride + 1, (size[1] - kernel[1]) // stride + 1


def to_unit_range(images: Shaped[Array, "b height width channels"]) -> Float[Array, "b height width channels"]:
    """Convert uint8 images to float32 in [0, 1]; floating-point images are returned unchanged."""
    return images / jnp.float32(255) if images.dtype == jnp.uint8 else images


def at_least_float32(values: Float[Array, "..."]) -> Float[Array, "..."]:
    """Cast bfloat16 and float16 to float32; float32 and float64 are returned unchanged."""
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))
