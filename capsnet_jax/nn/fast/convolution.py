"""Convolutions in the implementation that is fast where they run.

XLA's own convolution is what a GPU wants. On CPU, its gradient with respect to the input of a large strided kernel is
two orders of magnitude slower than the same sums written as one matrix product; and for many channels and large
kernels, products of spectra are faster still.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from capsnet_jax.nn.fast.choice import choose_convolution
from capsnet_jax.nn.fast.derivatives import with_backward
from capsnet_jax.nn.fast.fourier import fourier
from capsnet_jax.ops import convolution, positions_after

Images = Float[Array, "b height width channels"]
Kernel = Float[Array, "kernel_height kernel_width channels features"]
Features = Float[Array, "b out_height out_width features"]

FEW_CHANNELS = 8  # too few for a row of a patch to be copied as one


def convolve(images: Images, kernel: Kernel, stride: int) -> Features:
    """Cross-correlates images with a kernel, without padding; equal to `ops.convolution`.

    Args:
        images: at least as high and wide as the kernel.
        kernel: one filter for each output feature.
        stride: step of the kernel, in pixels, along both axes.

    Returns:
        The features where the kernel fits: out_height = (height - kernel_height) // stride + 1.
    """
    choice = choose_convolution(images.shape, kernel.shape, stride, kernel.dtype, platform="cpu")
    on_cpu: Callable[[Images, Kernel], Features]
    if choice.tilings is None:
        on_cpu = partial(matrix_product, stride=stride)
    else:
        on_cpu = partial(fourier, stride=stride, tilings=choice.tilings)
    elsewhere = partial(convolution, stride=stride)

    # A backward pass of our own, as differentiating through the choice of platform would keep both implementations'
    # intermediates. The patches, 32 times the images for the reference model, are cheaper to cut again than to keep.
    def backward(operands: tuple[Images, Kernel], cotangent: Features) -> tuple[Images, Kernel]:
        return jax.lax.platform_dependent(*operands, cotangent, cpu=_pullback(on_cpu), default=_pullback(elsewhere))

    @with_backward(backward)
    def forward(images: Images, kernel: Kernel) -> Features:
        return jax.lax.platform_dependent(images, kernel, cpu=on_cpu, default=elsewhere)

    return forward(images, kernel)


def matrix_product(images: Images, kernel: Kernel, stride: int) -> Features:
    """All patches under the kernel as the rows of one matrix, times the kernel as another."""
    taps = _taps(images, kernel, stride)
    if images.shape[3] < FEW_CHANNELS:
        # One tap after the other is copied in rows of the image; patches would be put together from single numbers.
        filters = rearrange(kernel, "height width channels features -> (height width) channels features")
        return jnp.einsum("tbhwc,tcf->bhwf", jnp.stack(taps), filters)
    filters = rearrange(kernel, "height width channels features -> (height width channels) features")
    return jnp.concatenate(taps, axis=-1) @ filters


def depthwise(
    images: Images, kernel: Float[Array, "kernel_height kernel_width 1 channels"], stride: int
) -> Float[Array, "b out_height out_width channels"]:
    """Cross-correlates each channel with a filter of its own, without padding.

    Args:
        images: at least as high and wide as the kernel.
        kernel: one filter for each channel.
        stride: step of the kernel, in pixels, along both axes.
    """
    # A channel sees too little for a matrix product.
    taps = jnp.stack(_taps(images, kernel, stride))
    weights = rearrange(kernel, "height width 1 channels -> (height width) channels")
    return jnp.einsum("tbhwc,tc->bhwc", taps, weights)


def _taps(
    images: Images, kernel: Float[Array, "kernel_height kernel_width ..."], stride: int
) -> list[Float[Array, "b out_height out_width channels"]]:
    """What each position of the kernel sees of the image under each of its taps, row by row."""
    height, width = kernel.shape[:2]
    out_height, out_width = positions_after((images.shape[1], images.shape[2]), (height, width), stride)

    def under(row: int, column: int) -> Float[Array, "b out_height out_width channels"]:
        rows = slice(row, row + stride * (out_height - 1) + 1, stride)
        columns = slice(column, column + stride * (out_width - 1) + 1, stride)
        return images[:, rows, columns]

    return [under(row, column) for row in range(height) for column in range(width)]


def _pullback(function: Callable[[Images, Kernel], Features]) -> Callable[..., tuple[Images, Kernel]]:
    def pull(images: Images, kernel: Kernel, cotangent: Features) -> tuple[Images, Kernel]:
        return jax.vjp(function, images, kernel)[1](cotangent)

    return pull
