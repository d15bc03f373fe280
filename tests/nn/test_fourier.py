"""Convolution by Fourier transforms equals XLA's for any tiling, and is chosen on CPU where it costs less."""

import re
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capsnet_jax.nn.fast.choice import Choice, choose_convolution
from capsnet_jax.nn.fast.convolution import convolve
from capsnet_jax.nn.fast.fourier import LARGEST_TILE, fourier, make_transforms, num_products, possible_tilings
from capsnet_jax.ops import convolution

# height, width, channels; kernel height, kernel width; stride; features; number of tiles along height and width
CASES = [
    (20, 20, 3, 9, 9, 2, 5, (1, 1)),
    (12, 17, 1, 5, 2, 3, 4, (3, 2)),  # tiles of 1 and 3 features, without remainder
    (11, 13, 2, 3, 4, 1, 3, (2, 4)),  # the last tiles extend beyond the 9 x 10 features
    (6, 6, 4, 6, 6, 2, 2, (1, 1)),  # one feature
    (10, 7, 2, 4, 3, 5, 3, (2, 1)),  # pixels that no kernel covers, and phases of the kernel without taps
    (9, 8, 6, 1, 3, 2, 2, (1, 2)),
]
QUICKLY_COMPILED = {"xla_backend_optimization_level": 0}
PRIMARY = (64, 20, 20, 256), (9, 9, 256, 256), 2  # the second convolution of the reference model, at batch 64


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 5e-6)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_equal_those_of_xla(case, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        images, kernel, cotangent = operands(case, dtype)
        expected = results(convolution, case, images, kernel, cotangent)
        actual = results(fourier, case, images, kernel, cotangent)
        assert_all_close(actual, expected, tolerance)
        assert [str(array.dtype) for array in actual] == [dtype] * 3


@pytest.mark.parametrize(("products_at_once", "parts"), [(17, 1), (6, 3), (0, 17)])
def test_the_number_of_products_at_once_changes_nothing(products_at_once, parts, monkeypatch):
    """All products at once, in parts of which the last is padded, and one by one."""
    case = (9, 8, 6, 3, 4, 2, 5, (2, 1))
    with jax.enable_x64(True):
        images, kernel, cotangent = operands(case, "float64")
        assert num_products(*tilings_of(case)) == 17
        bytes_of_product = (
            8 * 2**2 * images.shape[3] * (2 * len(images) + kernel.shape[3])
        )  # of 2 x 2 phases, in 2 tiles
        monkeypatch.setattr("capsnet_jax.nn.fast.fourier.SPECTRA_BYTES", products_at_once * bytes_of_product)
        program = jax.make_jaxpr(partial(fourier, stride=2, tilings=tilings_of(case)))(images, kernel)
        assert [int(length) for length in re.findall(r"\blength=(\d+)", str(program))] == [parts - 1]
        expected = results(convolution, case, images, kernel, cotangent)
        assert_all_close(results(fourier, case, images, kernel, cotangent), expected, 1e-12)


def test_vmap_changes_nothing():
    case = (8, 9, 2, 3, 3, 2, 4, (2, 1))
    with jax.enable_x64(True):
        sets = [operands(case, "float64", seed) for seed in (0, 1)]
        stacked = [jnp.stack(arrays) for arrays in zip(*sets, strict=True)]
        pulled = partial(value_and_pull, partial(fourier, stride=2, tilings=tilings_of(case)))
        mapped = jax.jit(jax.vmap(pulled), compiler_options=QUICKLY_COMPILED)(*stacked)
        for index, arrays in enumerate(sets):
            assert_all_close([array[index] for array in mapped], results(convolution, case, *arrays), 1e-12)


def test_full_size_is_accurate_in_float32():
    """With all channels of the reference model, compared with NumPy in float64."""
    rng = np.random.default_rng(1)
    images, kernel, cotangent = (
        rng.random((1, 20, 20, 256)),
        rng.uniform(-1, 1, PRIMARY[1]) / 144,
        rng.normal(size=(6, 6, 256)),
    )
    patches = np.lib.stride_tricks.sliding_window_view(images[0], (9, 9), axis=(0, 1))[::2, ::2]  # [6 6 channels 9 9]
    of_images = np.zeros_like(images)
    for row, column in np.ndindex(9, 9):
        of_images[0, row : row + 11 : 2, column : column + 11 : 2] += cotangent @ kernel[row, column].T
    expected = (
        np.tensordot(patches, kernel, [(3, 4, 2), (0, 1, 2)])[None],
        of_images,
        np.moveaxis(np.tensordot(patches, cotangent, [(0, 1), (0, 1)]), 0, 2),
    )
    choice = chosen(*PRIMARY)
    assert choice.name == "fourier"
    formulation = partial(fourier, stride=2, tilings=choice.tilings)
    arrays = [jnp.asarray(array, "float32") for array in (images, kernel, cotangent[None])]
    assert_all_close(jax.jit(partial(value_and_pull, formulation))(*arrays), expected, 5e-6)


def test_possible_tilings():
    assert [*possible_tilings(outputs=7, kernel=9, stride=2)] == [
        (7, 1, 5),
        (4, 2, 5),
        (3, 3, 5),
        (2, 4, 5),
        (1, 7, 5),
    ]
    large = [*possible_tilings(outputs=30, kernel=5, stride=1)]
    assert large[0] == (15, 2, 5)  # one tile would be of 34 pixels
    assert len([*possible_tilings(outputs=10_000, kernel=5, stride=1)]) == 20  # so that the choice is quick
    assert all(tiling.pixels == tiling.outputs + tiling.taps - 1 <= LARGEST_TILE for tiling in large)
    assert not [*possible_tilings(outputs=3, kernel=25, stride=1)]


@pytest.mark.parametrize("rows", [(1, 1), (1, 2), (2, 2), (3, 2), (4, 3)], ids=str)
@pytest.mark.parametrize("columns", [(1, 1), (2, 1), (1, 4), (4, 2)], ids=str)
def test_transforms_compute_a_convolution_with_the_expected_number_of_products(rows, columns):
    """Compared with explicit loops, for odd and even sizes, one pixel, and tiles of one feature."""
    (outputs, taps), (other_outputs, other_taps) = rows, columns
    tilings = [next(possible_tilings(outputs, taps, 1)) for outputs, taps in (rows, columns)]
    assert [(tiling.outputs, tiling.taps) for tiling in tilings] == [rows, columns]
    rng = np.random.default_rng(4)
    pixels = rng.normal(size=(outputs + taps - 1, other_outputs + other_taps - 1))
    kernel = rng.normal(size=(taps, other_taps))
    expected = np.zeros((outputs, other_outputs))
    for i, j, p, q in product(range(outputs), range(other_outputs), range(taps), range(other_taps)):
        expected[i, j] += kernel[p, q] * pixels[i + p, j + q]
    transforms = make_transforms(*tilings)
    products = (transforms.images @ pixels.ravel()) * (transforms.kernel @ kernel.ravel())
    np.testing.assert_allclose(products @ transforms.features, expected.ravel(), rtol=0, atol=1e-13)
    assert num_products(*tilings) == len(products)
    assert len(products) <= 3 * pixels.size / 2 + 2  # not 4 for each of two mirrored frequencies


def test_a_cpu_uses_fourier_transforms_where_they_cost_less():
    assert chosen(*PRIMARY).name == "fourier"
    assert chosen((64, 28, 28, 1), (9, 9, 1, 256), 1).name == "direct+patches"  # the stem of the reference model
    assert chosen((64, 20, 20, 256), (5, 5, 256, 256), 1).name == "direct"
    assert chosen((64, 20, 20, 256), (6, 6, 256, 256), 6).name == "patches"  # one tap in each phase
    assert chosen((64, 90, 90, 256), (75, 75, 256, 256), 1).name == "patches"  # no tile is that large
    assert chosen(*PRIMARY, dtype="bfloat16").name == "patches"


def test_several_cpu_devices_use_the_matrix_product(monkeypatch):
    monkeypatch.setattr("jax.device_count", lambda: 2)
    assert chosen(*PRIMARY).name == "patches"


def test_convolve_equals_xla_with_either_implementation(monkeypatch):
    """Values and gradients."""
    case = (11, 13, 8, 3, 4, 1, 3, (2, 2))
    choices = [Choice("fourier", "tested", tilings_of(case)), Choice("patches", "tested")]
    with jax.enable_x64(True):
        images, kernel, cotangent = operands(case, "float64")
        expected = results(convolution, case, images, kernel, cotangent)
        for choice in choices:
            monkeypatch.setattr(
                "capsnet_jax.nn.fast.convolution.choose_convolution", lambda *_, choice=choice, **__: choice
            )
            pulled = partial(value_and_pull, lambda images, kernel: convolve(images, kernel, 1))
            lowered = jax.jit(pulled).lower(images, kernel, cotangent)
            has_patches = "x96xf64>" in lowered.as_text()  # rows of all that is under the kernel
            assert has_patches == (choice.name == "patches")
            assert_all_close(lowered.compile(QUICKLY_COMPILED)(images, kernel, cotangent), expected, 1e-12)


def operands(case, dtype, seed=0):
    """Images, kernel, and a cotangent of the features."""
    height, width, channels, kernel_height, kernel_width, stride, features, _ = case
    rng = np.random.default_rng(sum(case[:-1]) + seed)
    outputs = (height - kernel_height) // stride + 1, (width - kernel_width) // stride + 1
    shapes = (3, height, width, channels), (kernel_height, kernel_width, channels, features), (3, *outputs, features)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def tilings_of(case):
    """The tilings with the numbers of tiles of a case."""
    (height, width, _, *kernel), stride, tiles = case[:5], case[5], case[7]
    tilings = []
    for pixels, taps, number in zip((height, width), kernel, tiles, strict=True):
        (tiling,) = (
            each for each in possible_tilings((pixels - taps) // stride + 1, taps, stride) if each.tiles == number
        )
        tilings.append(tiling)
    return tuple(tilings)


def results(formulation, case, *arrays):
    """Features and both gradients."""
    options = {"stride": case[5]} | ({"tilings": tilings_of(case)} if formulation is fourier else {})
    pulled = partial(value_and_pull, partial(formulation, **options))
    return jax.jit(pulled, compiler_options=QUICKLY_COMPILED)(*arrays)


def value_and_pull(formulation, images, kernel, cotangent):
    value, pull = jax.vjp(formulation, images, kernel)
    return value, *pull(cotangent)


def assert_all_close(actual, expected, tolerance):
    for name, ours, theirs in zip(("features", "of images", "of kernel"), actual, expected, strict=True):
        assert ours.shape == theirs.shape, name
        error = np.abs(np.asarray(ours) - np.asarray(theirs)).max() / np.abs(theirs).max()
        assert error <= tolerance, f"{name}: {error:.1e}"


def chosen(images, kernel, stride, dtype="float32"):
    """The implementation that is chosen on CPU for these shapes."""
    return choose_convolution(images, kernel, stride, dtype, platform="cpu")
