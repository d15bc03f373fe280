r"""A convolution as products of spectra: fewer multiplications than the sums that define it.

A stride of s splits images and kernel into s x s phases, between which a convolution has stride 1. Features are
computed in tiles, for each of which a tile of n x n pixels of each phase is needed; what a circular convolution of that
size wraps around is none of the features of the tile. The Fourier transform makes of it one product of channels by
features for each frequency.
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

LARGEST_TILE = 24  # in pixels of a phase, as the cost of the transforms grows with the fourth power
SPECTRA_BYTES = 32 * 2**20  # of what is multiplied at once: it is best found in a cache


class Tiling(NamedTuple):
    """How an axis is cut.

    Attributes:
        outputs: number of features of a tile.
        tiles: number of tiles.
        taps: number of taps of the kernel in each phase.
    """

    outputs: int
    tiles: int
    taps: int

    @property
    def pixels(self) -> int:
        """Number of pixels of a tile in each phase."""
        return self.outputs + self.taps - 1


class Transforms(NamedTuple):
    r"""Real matrices with which the features of a tile are $C^\top (A x \odot B k)$.

    Attributes:
        images: A, from the pixels of a tile.
        kernel: B, from the taps of a phase of the kernel.
        features: C, to the features of the tile.
    """

    images: Float[Array | np.ndarray, "*parts products pixels"]
    kernel: Float[Array | np.ndarray, "*parts products taps"]
    features: Float[Array | np.ndarray, "*parts products outputs"]


def fourier(images: Images, kernel: Kernel, stride: int, tilings: tuple[Tiling, Tiling]) -> Features:
    """Cross-correlates images with a kernel, without padding.

    Args:
        images: at least as high and wide as the kernel.
        kernel: one filter for each feature.
        stride: step of the kernel, in pixels, along both axes.
        tilings: how height and width are cut; see `possible_tilings`.
    """
    # A backward pass of our own: the one derived would keep all spectra, and transpose what it adds up.
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
        _fit(cotangent, (1, 2), (rows.outputs * rows.tiles, columns.outputs * columns.tiles)),
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
    """The ways to cut an axis of so many features, for a kernel of this size."""
    taps = -(-kernel // stride)
    for tiles in range(1, outputs + 1):
        tiling = Tiling(-(-outputs // tiles), tiles, taps)
        if tiling.pixels <= LARGEST_TILE:
            yield tiling


def num_products(rows: Tiling, columns: Tiling) -> int:
    """Number of real products of a spectrum: 3 for two mirrored frequencies, 1 for one that is its own mirror image."""
    height, width = rows.pixels, columns.pixels
    unpaired = (2 - height % 2) * (2 - width % 2)
    return unpaired + 3 * (height * width - unpaired) // 2


def multiplications(
    batch_size: int, channels: int, num_features: int, stride: int, tilings: tuple[Tiling, Tiling]
) -> tuple[int, int]:
    """How many `fourier` does, in products of spectra and in transforms."""
    rows, columns = tilings
    tiles, inputs = rows.tiles * columns.tiles * batch_size, stride**2 * channels
    transforms = (
        tiles * inputs * rows.pixels * columns.pixels
        + inputs * num_features * rows.taps * columns.taps
        + tiles * num_features * rows.outputs * columns.outputs
    )
    return num_products(*tilings) * tiles * inputs * num_features, num_products(*tilings) * transforms


@cache
def make_transforms(rows: Tiling, columns: Tiling) -> Transforms:
    """The discrete Fourier transforms of real images, of a real kernel, and back, as real matrices."""
    size = (rows.pixels, columns.pixels)
    triples = []
    for frequency in np.ndindex(*size):
        mirrored = tuple(-index % length for index, length in zip(frequency, size, strict=True))
        if mirrored < frequency:  # the spectrum of real numbers there is the conjugate of the one here
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
        # A complex product in three real ones: (a + bi) (c + di) = t - b (c + d) + (t + a (d - c)) i, t = c (a + b).
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
    """The matrices, in parts of equal size that make no more than `SPECTRA_BYTES` of spectra; filled up with zeros."""
    matrices = make_transforms(*tilings)
    bytes_of_product = taps.dtype.itemsize * taps.shape[1] * (pixels.shape[1] + taps.shape[2])
    products = len(matrices.images)
    parts = -(-products // max(SPECTRA_BYTES // bytes_of_product, 1))

    def cut(matrix: Array | np.ndarray) -> Array:
        padded = np.pad(matrix, ((0, -products % parts), (0, 0)))
        return jnp.asarray(rearrange(padded, "(parts p) n -> parts p n", parts=parts), taps.dtype)

    return Transforms(*(cut(matrix) for matrix in matrices))


def _sum_over_parts(function: Callable[[Transforms], Any], parts: Transforms) -> Any:
    """The sum of what a function gives for each part; the first by itself, as adding to zeros takes longer."""
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
    """Tiles along the batch axis, the pixels of a tile as one axis, and the phases as channels."""
    height, width = (axis.outputs * axis.tiles + axis.taps - 1 for axis in (rows, columns))
    phases = rearrange(
        _fit(images, (1, 2), (stride * height, stride * width)),
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
    whole = _fit(kernel, (0, 1), (stride * rows.taps, stride * columns.taps))
    return rearrange(whole, "(i p) (j q) c f -> (i j) (p q c) f", p=stride, q=stride)


def _fit(array: Array, axes: tuple[int, int], sizes: tuple[int, int]) -> Array:
    """Cuts off or appends zeros along two axes."""
    padding = [(0, 0, 0)] * array.ndim
    for axis, size in zip(axes, sizes, strict=True):
        padding[axis] = (0, size - array.shape[axis], 0)
    return jax.lax.pad(array, jnp.zeros((), array.dtype), padding)
