"""The one convolution of this package, in the formulation that is fast where it runs.

XLA's own convolution is what a GPU wants. On CPU, its gradient with respect to the input of a large strided kernel is
two orders of magnitude slower than the same sums written as one matrix product; and for many channels and large
kernels, products of spectra are faster still.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float

from capsnet_jax.nn.fast.fourier import Tiling, fourier, multiplications, possible_tilings

Images = Float[Array, "b height width channels"]
Kernel = Float[Array, "kernel_height kernel_width channels features"]
Features = Float[Array, "b out_height out_width features"]

# What a multiplication of spectra, or in their transforms, costs in multiplications of one large matrix product: from
# times of a dozen sizes on two cores with AVX2, rounded up, as many small tiles cost more than is counted here.
COST_OF_SPECTRA = 1.5
COST_OF_TRANSFORMS = 1.0

FEW_CHANNELS = 8  # too few for a row of a patch to be copied as one


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
        images, kernel, cpu=cheapest_on_cpu(images, kernel, stride), default=partial(native, stride=stride)
    )


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


def positions_after(size: tuple[int, int], kernel: tuple[int, int], stride: int) -> tuple[int, int]:
    """Height and width of what a convolution without padding makes of this height and width."""
    return (size[0] - kernel[0]) // stride + 1, (size[1] - kernel[1]) // stride + 1


def native(images: Images, kernel: Kernel, stride: int) -> Features:
    """The convolution of XLA: cuDNN's on a GPU."""
    return jax.lax.conv_general_dilated(
        images, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def matrix_product(images: Images, kernel: Kernel, stride: int) -> Features:
    """All patches under the kernel as the rows of one matrix, times the kernel as another."""
    taps = _taps(images, kernel, stride)
    if images.shape[3] < FEW_CHANNELS:
        # One tap after the other is copied in rows of the image; patches would be put together from single numbers.
        filters = rearrange(kernel, "height width channels features -> (height width) channels features")
        return jnp.einsum("tbhwc,tcf->bhwf", jnp.stack(taps), filters)
    filters = rearrange(kernel, "height width channels features -> (height width channels) features")
    return jnp.concatenate(taps, axis=-1) @ filters


def cheapest_on_cpu(images: Images, kernel: Kernel, stride: int) -> Callable[[Images, Kernel], Features]:
    """The formulation that a CPU should be fastest with, for arrays of these shapes."""
    batch_size, height, width, channels = images.shape
    if is_symbolic_dim(batch_size):  # of a program exported for all batch sizes, whose costs cannot be compared
        return partial(matrix_product, stride=stride)
    kernel_height, kernel_width, _, num_features = kernel.shape
    outputs = positions_after((height, width), (kernel_height, kernel_width), stride)

    def of_spectra(tilings: tuple[Tiling, Tiling]) -> float:
        of_products, of_transforms = multiplications(batch_size, channels, num_features, stride, tilings)
        return COST_OF_SPECTRA * of_products + COST_OF_TRANSFORMS * of_transforms

    direct = batch_size * math.prod(outputs) * math.prod(kernel.shape)
    tilings = product(
        possible_tilings(outputs[0], kernel_height, stride), possible_tilings(outputs[1], kernel_width, stride)
    )
    best = min(tilings, key=of_spectra, default=None)
    exact = jnp.finfo(images.dtype).bits >= 32  # in bfloat16 the transforms would lose too much
    # Across devices the gradient of each spectrum would be summed by itself, not that of the kernel.
    if best is None or not exact or jax.device_count() > 1 or of_spectra(best) >= direct:
        return partial(matrix_product, stride=stride)
    return partial(fourier, stride=stride, tilings=best)


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


def _forward(images: Images, kernel: Kernel, stride: int) -> tuple[Features, tuple[Images, Kernel]]:
    return convolve(images, kernel, stride), (images, kernel)


def _backward(stride: int, operands: tuple[Images, Kernel], cotangent: Features) -> tuple[Images, Kernel]:
    # A rule of our own, as differentiating through the choice of platform would keep both formulations' residuals.
    # The patches, 32 times the images for the reference model, are cheaper to cut again than to keep.
    def pullback(formulation: Callable[..., Features]) -> Callable[..., tuple[Images, Kernel]]:
        def pull(images: Images, kernel: Kernel, cotangent: Features) -> tuple[Images, Kernel]:
            return jax.vjp(formulation, images, kernel)[1](cotangent)

        return pull

    on_cpu = cheapest_on_cpu(*operands, stride)
    return jax.lax.platform_dependent(
        *operands, cotangent, cpu=pullback(on_cpu), default=pullback(partial(native, stride=stride))
    )


convolve.defvjp(_forward, _backward)
