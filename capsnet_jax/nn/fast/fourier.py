r"""Convolution by Fourier transforms, which needs fewer multiplications than the sums that define it.

A stride of s splits images and kernel into s x s phases; between phases, the convolution has stride 1. The features are
computed in tiles. A tile of features needs n x n pixels of each phase. The size n is such that the wrap-around of a
circular convolution does not reach the features. In the Fourier domain, the circular convolution is one matrix
product of channels by features for each frequency.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from capsnet_jax.nn.fast.derivatives import with_backward

Images = Float[Array, "b height width channels"]
Kernel = Float[Array, "kernel_height kernel_width channels features"]
Features = Float[Array, "b out_height out_width features"]

LARGEST_TILE = 24  # in pixels of a phase; the cost of the transforms grows with the fourth power
SPECTRA_BYTES = 32 * 2**20  # size of the spectra that are multiplied at once, which should fit into a cache


class Tiling(NamedTuple):
    """How one axis is divided into tiles.

    Attributes:
        outputs: number of features per tile.
        tiles: number of tiles.
        taps: number of kernel taps per phase.
    """

    outputs: int
    tiles: int
    taps: int

    @property
    def pixels(self) -> int:
        """Number of pixels of each phase per tile."""
        return self.outputs + self.taps - 1


class Transforms(NamedTuple):
    r"""Real matrices A, B, C that compute the features of a tile as $C^\top (A x \odot B k)$.

    Attributes:
        images: A, applied to the pixels x of a tile.
        kernel: B, applied to the taps k of one phase of the kernel.
        features: C, whose transpose computes the features.
    """

    images: Float[Array | np.ndarray, "*parts products pixels"]
    kernel: Float[Array | np.ndarray, "*parts products taps"]
    features: Float[Array | np.ndarray, "*parts products outputs"]


def fourier(images: Images, kernel: Kernel, stride: int, tilings: tuple[Tiling, Tiling]) -> Features:
    """Convolve images without padding.

    Args:
        images: at least as large as the kernel.
        kernel: one filter per feature.
        stride: stride of the kernel, in pixels, along both axes.
        tilings: how height and width are divided into tiles; see `possible_tilings`.
    """
    # The backward pass that JAX derives would store all spectra, and transpose every term of its sums.
    forward = with_backward(partial(_backward, stride, tilings))(partial(_forward, stride, tilings))
    return forward(images, kernel)


def _forward(stride: int, tilings: tuple[Tiling, Tiling], images: Images, kernel: Kernel) -> Features:
    pixels, taps = _phases_of_images(images, stride, *tilings), _phases_of_kernel(kernel, stride, *tilings)
    rows, columns = tilings

    def features_of(part: Transforms) -> Float[Array, "outputs b f"]:
        products = jnp.einsum("pbc,pcf->pbf", *_spectra(part, pixels, taps))
        return jnp.einsum("po,pbf->obf", part.features, products)

    features = _sum_over_parts(features_of, _parts(tilings, pixels, taps))
    features = rearrange(features, "(i j) (m n b) f -> b (m i) (n j) f", i=rows.outputs, m=rows.tiles, n=columns.tiles)
    height, width = ((images.shape[axis + 1] - kernel.shape[axis]) // stride + 1 for axis in (0, 1))
    return features[:, :height, :width]


def _backward(
    stride: int, tilings: tuple[Tiling, Tiling], operands: tuple[Images, Kernel], cotangent: Features
) -> tuple[Images, Kernel]:
    rows, columns = tilings
    pixels, pull_pixels = jax.vjp(lambda images: _phases_of_images(images, stride, *tilings), operands[0])
    taps, pull_taps = jax.vjp(lambda kernel: _phases_of_kernel(kernel, stride, *tilings), operands[1])
    cotangent = rearrange(
        fit(cotangent, (1, 2), (rows.outputs * rows.tiles, columns.outputs * columns.tiles)),
        "b (m i) (n j) f -> (i j) (m n b) f",
        m=rows.tiles,
        n=columns.tiles,
    )

    def gradients_of(part: Transforms) -> tuple[Float[Array, "pixels b c"], Float[Array, "taps c f"]]:
        spectra_of_pixels, spectra_of_taps = _spectra(part, pixels, taps)
        products = jnp.einsum("po,obf->pbf", part.features, cotangent)
        of_pixels = jnp.einsum("pbf,pcf->pbc", products, spectra_of_taps)
        of_taps = jnp.einsum("pbc,pbf->pcf", spectra_of_pixels, products)
        return jnp.einsum("pn,pbc->nbc", part.images, of_pixels), jnp.einsum("pt,pcf->tcf", part.kernel, of_taps)

    of_pixels, of_taps = _sum_over_parts(gradients_of, _parts(tilings, pixels, taps))
    return *pull_pixels(of_pixels), *pull_taps(of_taps)


def possible_tilings(outputs: int, kernel: int, stride: int) -> Iterator[Tiling]:
    """Yield the ways to divide an axis of this many features into tiles, as few tiles as possible of each size."""
    taps = -(-kernel // stride)
    for size in range(min(outputs, LARGEST_TILE - taps + 1), 0, -1):
        tiles = -(-outputs // size)
        if size == -(-outputs // tiles):  # otherwise, as many smaller tiles suffice
            yield Tiling(size, tiles, taps)


def num_products(rows: Tiling, columns: Tiling) -> int:
    """Count real products per spectrum: 3 for a pair of mirrored frequencies, 1 for a self-mirrored frequency."""
    height, width = rows.pixels, columns.pixels
    unpaired = (2 - height % 2) * (2 - width % 2)
    return unpaired + 3 * (height * width - unpaired) // 2


def multiplications(
    channels: int, num_features: int, stride: int, tilings: tuple[Tiling, Tiling]
) -> tuple[int, int, int]:
    """Count the multiplications of `fourier`.

    Returns:
        Those of spectra for each image, those in the transforms of each image and its features, and those in the
        transform of the kernel.
    """
    rows, columns = tilings
    tiles, inputs, products = rows.tiles * columns.tiles, stride**2 * channels, num_products(*tilings)
    of_image = tiles * (inputs * rows.pixels * columns.pixels + num_features * rows.outputs * columns.outputs)
    of_kernel = inputs * num_features * rows.taps * columns.taps
    return products * tiles * inputs * num_features, products * of_image, products * of_kernel


@cache
def make_transforms(rows: Tiling, columns: Tiling) -> Transforms:
    """Compute the real matrices of the discrete Fourier transforms of real images and kernels, and of the inverse."""
    size = (rows.pixels, columns.pixels)
    triples = []
    for frequency in np.ndindex(*size):
        mirrored = tuple(-index % length for index, length in zip(frequency, size, strict=True))
        if mirrored < frequency:  # the conjugate of a frequency that was already added, as the input is real
            continue
        turns = sum(
            index * np.arange(length).reshape(shape) / length
            for index, length, shape in zip(frequency, size, ((-1, 1), (1, -1)), strict=True)
        )
        wave = np.exp(-2j * np.pi * turns)
        tap = wave.conj()[: rows.taps, : columns.taps]
        back = wave.conj()[: rows.outputs, : columns.outputs] / wave.size
        if mirrored == frequency:
            triples.append((wave.real, tap.real, back.real))
            continue
        # A complex product as three real ones: (a + bi) (c + di) = t - b (c + d) + (t + a (d - c)) i, t = c (a + b).
        real, imaginary = 2 * back.real, -2 * back.imag
        triples += [
            (wave.real + wave.imag, tap.real, real + imaginary),
            (wave.real, tap.imag - tap.real, imaginary),
            (wave.imag, tap.real + tap.imag, -real),
        ]
    return Transforms(*(rearrange(list(of), "products i j -> products (i j)") for of in zip(*triples, strict=True)))


def _parts(
    tilings: tuple[Tiling, Tiling], pixels: Float[Array, "pixels b c"], taps: Float[Array, "taps c f"]
) -> Transforms:
    """Split the matrices into zero-padded parts of equal size, each with at most `SPECTRA_BYTES` of spectra."""
    matrices = make_transforms(*tilings)
    bytes_of_product = taps.dtype.itemsize * taps.shape[1] * (pixels.shape[1] + taps.shape[2])
    products = len(matrices.images)
    parts = -(-products // max(SPECTRA_BYTES // bytes_of_product, 1))

    def cut(matrix: Array | np.ndarray) -> Array:
        padded = np.pad(matrix, ((0, -products % parts), (0, 0)))
        return jnp.asarray(rearrange(padded, "(parts p) n -> parts p n", parts=parts), taps.dtype)

    return Transforms(*(cut(matrix) for matrix in matrices))


def _sum_over_parts(function: Callable[[Transforms], Any], parts: Transforms) -> Any:
    """Sum a function over all parts. The first part is outside the loop, because adding to zeros takes time."""
    first, others = (jax.tree.map(lambda matrices, at=at: matrices[at], parts) for at in (0, slice(1, None)))

    def add(total: Any, part: Transforms) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(part)), None

    total, _ = jax.lax.scan(add, function(first), others)
    return total


def _spectra(
    part: Transforms, pixels: Float[Array, "pixels b c"], taps: Float[Array, "taps c f"]
) -> tuple[Float[Array, "p b c"], Float[Array, "p c f"]]:
    return jnp.einsum("pn,nbc->pbc", part.images, pixels), jnp.einsum("pt,tcf->pcf", part.kernel, taps)


def _phases_of_images(
    images: Images, stride: int, rows: Tiling, columns: Tiling
) -> Float[Array, "pixels tiles_b phases_c"]:
    """Arrange images with tiles along the batch axis, the pixels of a tile along one axis, and phases as channels."""
    height, width = (axis.outputs * axis.tiles + axis.taps - 1 for axis in (rows, columns))
    phases = rearrange(
        fit(images, (1, 2), (stride * height, stride * width)),
        "b (i p) (j q) c -> i j b (p q c)",
        p=stride,
        q=stride,
    )
    tiles = [
        phases[top : top + rows.pixels, left : left + columns.pixels]
        for top in range(0, rows.outputs * rows.tiles, rows.outputs)
        for left in range(0, columns.outputs * columns.tiles, columns.outputs)
    ]
    return rearrange(tiles, "tiles i j b c -> (i j) (tiles b) c")


def _phases_of_kernel(kernel: Kernel, stride: int, rows: Tiling, columns: Tiling) -> Float[Array, "taps phases_c f"]:
    whole = fit(kernel, (0, 1), (stride * rows.taps, stride * columns.taps))
    return rearrange(whole, "(i p) (j q) c f -> (i j) (p q c) f", p=stride, q=stride)


def fit(array: Array, axes: tuple[int, int], sizes: tuple[int, int]) -> Array:
    """Crop or zero-pad two axes at their end."""
    padding = [(0, 0, 0)] * array.ndim
    for axis, size in zip(axes, sizes, strict=True):
        padding[axis] = (0, size - array.shape[axis], 0)
    return jax.lax.pad(array, jnp.zeros((), array.dtype), padding)
