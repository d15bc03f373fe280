"""Every implementation of the convolution equals that of XLA, in values and gradients."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capsnet_jax.nn.fast.choice import choose_convolution
from capsnet_jax.nn.fast.convolution import by_patches, convolve, depthwise, direct, matrix_product, space_to_depth
from capsnet_jax.ops import convolution, positions_after

# height, width, channels; kernel height, kernel width; stride; features
CASES = [
    (20, 20, 3, 9, 9, 2, 5),
    (11, 13, 2, 3, 4, 1, 3),
    (12, 17, 1, 5, 2, 3, 4),
    (6, 6, 4, 6, 6, 2, 2),
    (7, 8, 3, 1, 1, 2, 6),
    (10, 7, 2, 4, 3, 5, 3),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 5e-6)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_equal_those_of_xla(case, dtype, tolerance):
    height, width, channels, kernel_height, kernel_width, stride, features = case
    rng = np.random.default_rng(sum(case))
    with jax.enable_x64(dtype == "float64"):
        images = jnp.asarray(rng.normal(size=(3, height, width, channels)), dtype)
        kernel = jnp.asarray(rng.normal(size=(kernel_height, kernel_width, channels, features)), dtype)
        outputs = positions_after((height, width), (kernel_height, kernel_width), stride)
        cotangent = jnp.asarray(rng.normal(size=(3, *outputs, features)), dtype)
        expected = value_and_pull(convolution, stride, images, kernel, cotangent)
        with_patches = partial(direct, gradient_of_images=by_patches)
        for formulation in (convolve, direct, with_patches, space_to_depth):
            actual = value_and_pull(formulation, stride, images, kernel, cotangent)
            for name, ours, theirs in zip(("value", "images", "kernel"), actual, expected, strict=True):
                assert ours.shape == theirs.shape, (name, formulation)
                assert ours.dtype == theirs.dtype == dtype, (name, formulation)
                assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max(), (name, formulation)


@pytest.mark.parametrize("formulation", [convolve, direct, matrix_product, space_to_depth, convolution])
def test_bfloat16_is_close_to_float32_and_keeps_its_dtype(formulation):
    rng = np.random.default_rng(7)
    images, kernel, cotangent = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((3, 10, 11, 4), (3, 4, 4, 5), (3, 4, 4, 5))
    )
    exact = [array.astype(jnp.float32) for array in (images, kernel, cotangent)]
    expected = value_and_pull(convolution, 2, *exact)
    for ours, theirs in zip(value_and_pull(formulation, 2, images, kernel, cotangent), expected, strict=True):
        assert ours.dtype == jnp.bfloat16
        assert np.abs(ours.astype(jnp.float32) - theirs).max() <= 1e-2 * np.abs(theirs).max()


@pytest.mark.parametrize("kernel_size", [(3, 2), (8, 7)], ids=["smaller", "as large as the images"])
def test_depthwise_equals_xla_with_a_group_for_each_channel(kernel_size):
    rng = np.random.default_rng(5)
    with jax.enable_x64(True):
        images, kernel = jnp.asarray(rng.normal(size=(3, 8, 7, 5))), jnp.asarray(rng.normal(size=(*kernel_size, 1, 5)))
        cotangent = jnp.asarray(rng.normal(size=(3, *positions_after((8, 7), kernel_size, 2), 5)))

        def grouped(images, kernel, stride):
            names = ("NHWC", "HWIO", "NHWC")
            strides = (stride, stride)
            return jax.lax.conv_general_dilated(
                images, kernel, strides, "VALID", dimension_numbers=names, feature_group_count=5
            )

        expected = value_and_pull(grouped, 2, images, kernel, cotangent)
        for ours, theirs in zip(value_and_pull(depthwise, 2, images, kernel, cotangent), expected, strict=True):
            assert ours.shape == theirs.shape
            assert np.abs(ours - theirs).max() <= 1e-12 * np.abs(theirs).max()


def test_jit_and_vmap_change_nothing():
    rng = np.random.default_rng(1)
    images, kernels = jnp.asarray(rng.normal(size=(2, 3, 8, 9, 2))), jnp.asarray(rng.normal(size=(2, 3, 3, 2, 4)))
    mapped = jax.jit(jax.vmap(lambda image, kernel: convolve(image, kernel, 2)))(images, kernels)
    for one, image, kernel in zip(mapped, images, kernels, strict=True):
        np.testing.assert_allclose(one, convolution(image, kernel, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("images", "kernel", "stride", "implementation"),
    [
        ((28, 28, 1), (9, 9, 1, 256), 1, "xla"),
        ((20, 20, 64), (3, 3, 64, 128), 2, "xla"),
        ((20, 20, 256), (9, 9, 256, 256), 2, "space_to_depth"),
        ((24, 20, 8), (9, 9, 8, 16), 2, "space_to_depth"),  # as large as the output along one axis only
        ((14, 14, 64), (9, 9, 64, 64), 2, "patches"),  # 5 x 5 blocks of kernel, and 3 x 3 outputs
        ((6, 6, 64), (4, 4, 64, 72), 1, "patches"),
    ],
    ids=str,
)
def test_other_platforms_convolve_with_kernels_no_larger_than_the_output(images, kernel, stride, implementation):
    assert choose_convolution((7, *images), kernel, stride, "float32", platform="gpu").name == implementation
    shapes = [(7, *images), kernel]
    traced = jax.jit(partial(convolve, stride=stride)).trace(*(jax.ShapeDtypeStruct(one, "float32") for one in shapes))
    lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    outputs = positions_after(images[:2], kernel[:2], stride)
    assert ("stablehlo.convolution" in lowered) == (implementation != "patches")
    if implementation == "space_to_depth":
        size = "x".join(str(-(-side // stride)) for side in kernel[:2])
        assert (
            f"tensor<{size}x{stride**2 * kernel[2]}x{kernel[3]}xf32>) -> tensor<7x{outputs[0]}x{outputs[1]}x" in lowered
        )


# Images and kernel, with stride 2. The second is that of the reference model: Fourier transforms on one CPU device.
@pytest.mark.parametrize("shapes", [((1, 13, 13, 8), (6, 6, 8, 4)), ((64, 20, 20, 256), (9, 9, 256, 256))], ids=str)
@pytest.mark.parametrize("num_devices", [1, 2])
def test_large_kernels_are_matrix_products_on_cpu_and_convolutions_elsewhere(shapes, num_devices, monkeypatch):
    monkeypatch.setattr("jax.device_count", lambda: num_devices)
    arguments = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    traced = jax.jit(jax.grad(lambda *args: convolve(*args, 2).sum(), argnums=(0, 1))).trace(*arguments)
    on_cpu, on_gpu = (traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "cuda"))
    assert "stablehlo.convolution" in on_gpu
    assert "stablehlo.convolution" not in on_cpu
    assert "stablehlo.dot_general" in on_cpu
    by_patches = f"x{math.prod(shapes[1][:3])}xf32>" in on_cpu  # matrix of patches
    assert by_patches == (num_devices == 2 or shapes[1] == (6, 6, 8, 4))


def test_small_kernels_are_convolutions_on_cpu_with_their_axes_in_the_order_that_is_fast_in_loops():
    shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((7, 14, 11, 6), (5, 5, 6, 8))]
    gradient = jax.grad(lambda *operands: jnp.square(convolve(*operands, 2)).sum(), argnums=(0, 1))
    lowered = jax.jit(gradient).trace(*shapes).lower(lowering_platforms=("cpu",)).as_text()
    convolutions = re.findall(r"stablehlo.convolution\(.*?dim_numbers = (.*?), window", lowered)
    assert len(convolutions) >= 3
    assert set(convolutions) == {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}


def value_and_pull(formulation, stride, images, kernel, cotangent):
    """Features and both gradients."""

    def pulled(images, kernel, cotangent):
        value, pull = jax.vjp(lambda *args: formulation(*args, stride), images, kernel)
        return value, *pull(cotangent)

    return jax.jit(pulled, compiler_options={"xla_backend_optimization_level": 0})(images, kernel, cotangent)
