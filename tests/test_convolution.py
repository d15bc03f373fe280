"""Every formulation of the convolution is the one of XLA, forward and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capsnet_jax.convolution import convolve, matrix_product, native

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
def test_values_and_gradients_are_those_of_xla(case, dtype, tolerance):
    height, width, channels, kernel_height, kernel_width, stride, features = case
    rng = np.random.default_rng(sum(case))
    with jax.enable_x64(dtype == "float64"):
        images = jnp.asarray(rng.normal(size=(3, height, width, channels)), dtype)
        kernel = jnp.asarray(rng.normal(size=(kernel_height, kernel_width, channels, features)), dtype)
        expected, expected_pull = jax.vjp(lambda *args: native(*args, stride=stride), images, kernel)
        actual, pull = jax.vjp(lambda *args: convolve(*args, stride), images, kernel)
        cotangent = jnp.asarray(rng.normal(size=expected.shape), dtype)
        results = (actual, *pull(cotangent))
        for name, ours, theirs in zip(
            ("value", "images", "kernel"), results, (expected, *expected_pull(cotangent)), strict=True
        ):
            assert ours.shape == theirs.shape, name
            assert ours.dtype == theirs.dtype == dtype, name
            assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max(), name


@pytest.mark.parametrize("formulation", [convolve, matrix_product, native])
def test_in_bfloat16_it_is_nearly_the_same_and_cotangents_are_in_bfloat16(formulation):
    rng = np.random.default_rng(7)
    images, kernel, cotangent = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((3, 10, 11, 4), (3, 4, 4, 5), (3, 4, 4, 5))
    )
    exact = [array.astype(jnp.float32) for array in (images, kernel)]
    expected, expected_pull = jax.vjp(lambda *args: native(*args, 2), *exact)
    actual, pull = jax.vjp(lambda *args: formulation(*args, 2), images, kernel)
    expected = (expected, *expected_pull(cotangent.astype(jnp.float32)))
    for ours, theirs in zip((actual, *pull(cotangent)), expected, strict=True):
        assert ours.dtype == jnp.bfloat16
        assert np.abs(ours.astype(jnp.float32) - theirs).max() <= 1e-2 * np.abs(theirs).max()


def test_under_jit_and_vmap_it_is_the_same():
    rng = np.random.default_rng(1)
    images, kernels = jnp.asarray(rng.normal(size=(2, 3, 8, 9, 2))), jnp.asarray(rng.normal(size=(2, 3, 3, 2, 4)))
    mapped = jax.jit(jax.vmap(lambda image, kernel: convolve(image, kernel, 2)))(images, kernels)
    for one, image, kernel in zip(mapped, images, kernels, strict=True):
        np.testing.assert_allclose(one, native(image, kernel, 2), rtol=1e-5, atol=1e-5)


def test_on_cpu_it_is_a_matrix_product_and_elsewhere_the_native_convolution():
    args = jnp.zeros((1, 9, 9, 2)), jnp.zeros((3, 3, 2, 4))
    traced = jax.jit(lambda *args: convolve(*args, 2)).trace(*args)
    on_cpu, on_gpu = (traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "cuda"))
    assert "stablehlo.convolution" not in on_cpu
    assert "stablehlo.convolution" in on_gpu
