"""Functions of `ops` against those of PyTorch and the oracle, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from capsnet_jax import ops
from capsnet_torch import ops as torch_ops
from capsnet_verify.checks import VALUES
from parity_tests import oracle
from parity_tests.compare import assert_close

SHAPE = (4, 5, 6)


def poses(dtype: str, scale: float) -> np.ndarray:
    return (scale * np.random.default_rng(3).normal(size=SHAPE)).astype(dtype)


@pytest.mark.parametrize("scale", [0.05, 1, 20])
@pytest.mark.parametrize("name", ["capsule_norm", "squash", "direction", "exponential_squash"])
def test_values_and_gradients_agree(name, scale, dtype):
    values = poses(dtype, scale)
    weights = np.random.default_rng(4).normal(size=SHAPE[: 3 - (name == "capsule_norm")]).astype(dtype)
    result, pull = jax.vjp(getattr(ops, name), jnp.asarray(values))
    torch_values = torch.tensor(values, requires_grad=True)
    torch_result = getattr(torch_ops, name)(torch_values)
    torch_result.backward(torch.tensor(weights))
    assert_close(name, result, torch_result.detach(), tolerance=VALUES[dtype])
    assert_close(f"gradient of {name}", pull(jnp.asarray(weights))[0], torch_values.grad, tolerance=VALUES[dtype])


def test_squash_agrees_with_the_oracle(float64):
    values = poses(float64, 0.7)
    expected = np.stack([[oracle.squash(vector) for vector in row] for row in values])
    assert_close("squash", ops.squash(jnp.asarray(values)), expected, tolerance=1e-12)


@pytest.mark.parametrize("name", ["squash", "direction", "exponential_squash"])
def test_both_sides_give_zero_for_zero(name, dtype):
    zeros = np.zeros((2, 3), dtype)
    function, torch_function = getattr(ops, name), getattr(torch_ops, name)
    torch_zeros = torch.tensor(zeros, requires_grad=True)
    torch_function(torch_zeros).sum().backward()
    np.testing.assert_array_equal(torch_zeros.grad, zeros)
    np.testing.assert_array_equal(jax.grad(lambda x: function(x).sum())(jnp.asarray(zeros)), zeros)
    np.testing.assert_array_equal(function(jnp.asarray(zeros)), zeros)


@pytest.mark.parametrize("labels", [[3, 0, 4, 1], [[3, 1], [0, 2], [4, 0], [1, 4]]], ids=["one label", "two labels"])
def test_mask_by_label_agrees(labels, dtype):
    values, labels = poses(dtype, 1), np.array(labels)
    masked = ops.mask_by_label(jnp.asarray(values), jnp.asarray(labels, "int32"))
    expected = torch_ops.mask_by_label(torch.tensor(values), torch.tensor(labels))
    np.testing.assert_array_equal(masked, expected)
    examples = np.arange(4) if labels.ndim == 1 else np.arange(4)[:, None]
    np.testing.assert_array_equal(masked[examples, labels], values[examples, labels])
    assert np.count_nonzero(masked) == labels.size * SHAPE[2]


@pytest.mark.parametrize("num_labels", [1, 2, 3])
def test_right_answers_agree_even_with_equal_activations(num_labels):
    rng = np.random.default_rng(num_labels)
    activations = (rng.integers(0, 4, (300, 5)) / 4).astype(np.float32)
    labels = np.stack([rng.permutation(5)[:num_labels] for _ in range(300)])
    labels = labels[:, 0] if num_labels == 1 else labels
    right = ops.answers_right(jnp.asarray(activations), jnp.asarray(labels, "int32"))
    np.testing.assert_array_equal(right, torch_ops.answers_right(torch.tensor(activations), torch.tensor(labels)))
    assert 10 < right.sum() < 290


def test_standardized_images_agree(dtype):
    """Values and gradients for images with full contrast, with hardly any, and of a single colour."""
    rng = np.random.default_rng(5)
    images = rng.random((3, 4, 6, 2)) * np.array([1, 0.01, 0])[:, None, None, None] + 0.25
    images, weights = images.astype(dtype), rng.normal(size=images.shape).astype(dtype)
    result, pull = jax.vjp(ops.standardize_images, jnp.asarray(images))
    channels_first = torch.tensor(images.transpose(0, 3, 1, 2).copy(), requires_grad=True)
    torch_result = torch_ops.standardize_images(channels_first)
    torch_result.backward(torch.tensor(weights.transpose(0, 3, 1, 2).copy()))
    grads = channels_first.grad.permute(0, 2, 3, 1)
    assert_close("images", result, torch_result.detach().permute(0, 2, 3, 1), tolerance=VALUES[dtype])
    assert_close("gradient", pull(jnp.asarray(weights))[0], grads, tolerance=VALUES[dtype])
    np.testing.assert_array_equal(result[2], 0)
