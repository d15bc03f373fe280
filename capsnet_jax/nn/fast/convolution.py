"""Convolutions, by the fastest implementation on each platform.

On GPU, XLA's own convolution is best, unless the kernel is larger than the output: its gradients then multiply many
zeros. If blocks of pixels become channels first, kernel and stride are smaller. On CPU, XLA's own convolution is best
for small kernels and for few channels. Its gradient with respect to the images is slow for large kernels: one matrix
product computes the same sums two orders of magnitude faster. For many channels and large kernels, Fourier transforms
are faster still.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from capsnet_jax.nn.fast.choice import FEW_CHANNELS, choose_convolution
from capsnet_jax.nn.fast.derivatives import with_backward
from capsnet_jax.nn.fast.fourier import fit, fourier
from capsnet_jax.ops import convolution, positions_after

Images = Float[Array, "b height width channels"]
Kernel = Float[Array, "kernel_height kernel_width channels features"]
Features = Float[Array, "b out_height out_width features"]


def convolve(images: Images, kernel: Kernel, stride: int) -> Features:
    """Convolve images without padding; equal to `ops.convolution`.

    Args:
        images: at least as large as the kernel.
        kernel: one filter per output feature.
        stride: stride of the kernel, in pixels, along both axes.

    Returns:
        The features; out_height = (height - kernel_height) // stride + 1.
    """
    on_cpu, elsewhere = (_implementation(images, kernel, stride, platform) for platform in ("cpu", "gpu"))

    # Differentiating through `platform_dependent` would store the intermediates of both implementations. The patches,
    # 32 times the size of the images for the reference model, are also cheaper to recompute than to store.
    def backward(operands: tuple[Images, Kernel], cotangent: Features) -> tuple[Images, Kernel]:
        return jax.lax.platform_dependent(*operands, cotangent, cpu=_pullback(on_cpu), default=_pullback(elsewhere))

    @with_backward(backward)
    def forward(images: Images, kernel: Kernel) -> Features:
        return jax.lax.platform_dependent(images, kernel, cpu=on_cpu, default=elsewhere)

    return forward(images, kernel)


def _implementation(images: Images, kernel: Kernel, stride: int, platform: str) -> Callable[[Images, Kernel], Features]:
    choice = choose_convolution(images.shape, kernel.shape, stride, kernel.dtype, platform=platform)
    if choice.tilings is not None:
        return partial(fourier, stride=stride, tilings=choice.tilings)
    functions: dict[str, Callable[..., Features]] = {
        "xla": convolution,
        "direct": direct,
        "direct+patches": partial(direct, gradient_of_images=by_patches),
        "space_to_depth": space_to_depth,
        "patches": matrix_product,
    }
    return partial(functions[choice.name], stride=stride)


def by_convolution(images: Images, kernel: Kernel, cotangent: Features, *, stride: int) -> Images:
    """Compute the gradient of a convolution with respect to the images by XLA's own convolution."""
    sizes = zip(images.shape[1:3], kernel.shape[:2], cotangent.shape[1:3], strict=True)
    # Zeros around and between the features, so that each pixel meets all positions that saw it.
    zeros = [(size - 1, full - 1 - (positions - 1) * stride, stride - 1) for full, size, positions in sizes]
    features = jax.lax.pad(cotangent, jnp.zeros((), cotangent.dtype), [(0, 0, 0), *zeros, (0, 0, 0)])
    turned = rearrange(kernel[::-1, ::-1], "height width channels features -> height width features channels")
    return convolution(features, turned, stride=1)


def by_patches(images: Images, kernel: Kernel, cotangent: Features, *, stride: int) -> Images:
    """Compute the gradient of a convolution with respect to the images by the transpose of `matrix_product`."""
    (of_images,) = jax.linear_transpose(lambda images: matrix_product(images, kernel, stride), images)(cotangent)
    return of_images


def direct(
    images: Images, kernel: Kernel, stride: int, gradient_of_images: Callable[..., Images] = by_convolution
) -> Features:
    """Convolve by XLA's own convolution, and compute the gradient of the kernel as one with the same order of axes.

    JAX would leave the axes as they are and name them in another order. XLA for CPU computes such convolutions about a
    hundred times more slowly in loops, in which training accumulates gradients or runs several steps.

    Args:
        images: at least as large as the kernel.
        kernel: one filter per output feature.
        stride: stride of the kernel, in pixels, along both axes.
        gradient_of_images: `(images, kernel, cotangent, stride=...) -> cotangent of the images`.
    """

    def backward(operands: tuple[Images, Kernel], cotangent: Features) -> tuple[Images, Kernel]:
        images, kernel = operands
        # Here the cotangent is the kernel, and the examples are its channels.
        of_taps = jax.lax.conv_general_dilated(
            rearrange(images, "b height width channels -> channels height width b"),
            rearrange(cotangent, "b height width features -> height width b features"),
            window_strides=(1, 1),
            padding="VALID",
            rhs_dilation=(stride, stride),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        of_taps = rearrange(of_taps, "channels height width features -> height width channels features")
        height, width = kernel.shape[:2]  # a stride may leave pixels at the border that no tap sees
        return gradient_of_images(images, kernel, cotangent, stride=stride), of_taps[:height, :width]

    return with_backward(backward)(partial(convolution, stride=stride))(images, kernel)


def space_to_depth(images: Images, kernel: Kernel, stride: int) -> Features:
    """Convolve blocks of stride x stride pixels, whose pixels have become channels, with stride 1.

    The kernel is padded with zeros to whole blocks.
    """
    kernel_size, (rows, columns) = kernel.shape[:2], positions_after(images.shape[1:3], kernel.shape[:2], stride)
    height, width = (-(-size // stride) for size in kernel_size)
    taps = fit(kernel, (0, 1), (height * stride, width * stride))
    pixels = fit(images, (1, 2), ((rows - 1 + height) * stride, (columns - 1 + width) * stride))
    return convolution(
        rearrange(pixels, "b (i p) (j q) c -> b i j (p q c)", p=stride, q=stride),
        rearrange(taps, "(i p) (j q) c f -> i j (p q c) f", p=stride, q=stride),
        stride=1,
    )


def matrix_product(images: Images, kernel: Kernel, stride: int) -> Features:
    """Convolve by one matrix product: all patches under the kernel as rows, times the flattened kernel."""
    taps = _taps(images, kernel, stride)
    if images.shape[3] < FEW_CHANNELS:
        # Each tap is a copy of rows of the image; a patch would be assembled from single numbers.
        filters = rearrange(kernel, "height width channels features -> (height width) channels features")
        return jnp.einsum("tbhwc,tcf->bhwf", jnp.stack(taps), filters)
    filters = rearrange(kernel, "height width channels features -> (height width channels) features")
    return jnp.concatenate(taps, axis=-1) @ filters


def depthwise(
    images: Images, kernel: Float[Array, "kernel_height kernel_width 1 channels"], stride: int
) -> Float[Array, "b out_height out_width channels"]:
    """Convolve each channel with its own filter, without padding.

    Args:
        images: at least as large as the kernel.
        kernel: one filter per channel.
        stride: stride of the kernel, in pixels, along both axes.
    """
    if images.shape[1:3] == kernel.shape[:2]:
        return rearrange(jnp.einsum("bhwc,hwc->bc", images, kernel[:, :, 0]), "b c -> b 1 1 c")
    # One input channel is too little for a matrix product.
    taps = jnp.stack(_taps(images, kernel, stride))
    weights = rearrange(kernel, "height width 1 channels -> (height width) channels")
    return jnp.einsum("tbhwc,tc->bhwc", taps, weights)


def _taps(
    images: Images, kernel: Float[Array, "kernel_height kernel_width ..."], stride: int
) -> list[Float[Array, "b out_height out_width channels"]]:
    """The pixel under each tap of the kernel, at all output positions; taps are in row-major order."""
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
