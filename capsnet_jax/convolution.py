"""The one convolution of this package, in the formulation that is fast where it runs.

XLA's own convolution is what a GPU wants. On CPU, its gradient with respect to the input of a large strided kernel is
two orders of magnitude slower than the same sums written as one matrix product.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

Images = Float[Array, "b height width channels"]
Kernel = Float[Array, "kernel_height kernel_width channels features"]
Features = Float[Array, "b out_height out_width features"]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(images: Images, kernel: Kernel, stride: int) -> Features:
    """Cross-correlates images with a kernel, without padding.

    Args:
        images: at least as high and wide as the kernel.
        kernel: one filter for each output feature.
        stride: step of the kernel, in pixels, along both axes.

    Returns:
        The features where the kernel fits: out_height = (height - kernel_height) // stride + 1.
    """
    return jax.lax.platform_dependent(
        images, kernel, cpu=partial(matrix_product, stride=stride), default=partial(native, stride=stride)
    )


def native(images: Images, kernel: Kernel, stride: int) -> Features:
    """The convolution of XLA: cuDNN's on a GPU."""
    return jax.lax.conv_general_dilated(
        images, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def matrix_product(images: Images, kernel: Kernel, stride: int) -> Features:
    """All patches under the kernel as the rows of one matrix, times the kernel as another."""
    kernel_height, kernel_width, _, _ = kernel.shape
    out_height = (images.shape[1] - kernel_height) // stride + 1
    out_width = (images.shape[2] - kernel_width) // stride + 1

    def under(row: int, column: int) -> Images:
        """What each position of the kernel sees of the image under one of its taps."""
        rows = slice(row, row + stride * (out_height - 1) + 1, stride)
        columns = slice(column, column + stride * (out_width - 1) + 1, stride)
        return images[:, rows, columns]

    taps = [under(row, column) for row in range(kernel_height) for column in range(kernel_width)]
    patches = jnp.concatenate(taps, axis=-1)
    return patches @ rearrange(kernel, "height width channels features -> (height width channels) features")


def _forward(images: Images, kernel: Kernel, stride: int) -> tuple[Features, tuple[Images, Kernel]]:
    return convolve(images, kernel, stride), (images, kernel)


def _backward(stride: int, operands: tuple[Images, Kernel], cotangent: Features) -> tuple[Images, Kernel]:
    # A rule of our own, as differentiating through the choice of platform would keep both formulations' residuals.
    # The patches, 32 times the images for the reference model, are cheaper to cut again than to keep.
    def pullback(formulation: Callable[..., Features]) -> Callable[..., tuple[Images, Kernel]]:
        def pull(images: Images, kernel: Kernel, cotangent: Features) -> tuple[Images, Kernel]:
            return jax.vjp(partial(formulation, stride=stride), images, kernel)[1](cotangent)

        return pull

    return jax.lax.platform_dependent(*operands, cotangent, cpu=pullback(matrix_product), default=pullback(native))


convolve.defvjp(_forward, _backward)
