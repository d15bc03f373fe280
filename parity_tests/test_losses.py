"""Margin loss, spread loss and summed reconstruction errors in JAX and PyTorch, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from capsnet_jax import UsageError
from capsnet_jax.nn import losses
from capsnet_torch import losses as torch_losses
from capsnet_verify.checks import VALUES
from parity_tests import oracle
from parity_tests.compare import assert_close

LABELS = np.array([3, 0, 4])


SEVERAL = {"one label": LABELS, "two labels": np.array([[3, 1], [0, 2], [2, 4]])}


@pytest.mark.parametrize("labels", SEVERAL.values(), ids=SEVERAL)
def test_margin_losses_agree(labels, dtype):
    activations = np.random.default_rng(0).uniform(size=(3, 5)).astype(dtype)
    weights = np.random.default_rng(1).normal(size=3).astype(dtype)
    result, pull = jax.vjp(lambda values: losses.margin_loss(values, jnp.asarray(labels)), jnp.asarray(activations))
    tensor = torch.tensor(activations, requires_grad=True)
    torch_result = torch_losses.margin_loss(tensor, torch.tensor(labels))
    torch_result.backward(torch.tensor(weights))
    assert_close("margin loss", result, torch_result.detach(), tolerance=VALUES[dtype])
    assert_close("gradient", pull(jnp.asarray(weights))[0], tensor.grad, tolerance=VALUES[dtype])
    of_oracle = [
        oracle.margin_loss(row, np.atleast_1d(wanted)) for row, wanted in zip(activations, labels, strict=True)
    ]
    assert_close("oracle", result, np.asarray(of_oracle, dtype), tolerance=VALUES[dtype])


def test_both_sides_refuse_a_spread_loss_of_several_labels():
    labels = SEVERAL["two labels"]
    with pytest.raises(UsageError, match="got 2 labels"):
        losses.spread_loss(jnp.ones((3, 5)), jnp.asarray(labels))
    with pytest.raises(ValueError, match="not for 2"):
        torch_losses.spread_loss(torch.ones(3, 5), torch.tensor(labels))


@pytest.mark.parametrize("step", [0, 150_000, 10**7])
def test_spread_losses_agree(step, dtype):
    activations = np.random.default_rng(0).uniform(size=(3, 5)).astype(dtype)
    weights = np.random.default_rng(1).normal(size=3).astype(dtype)
    margin = losses.spread_margin(step)
    precise = {"float64": 1e-14, "float32": 1e-6}[dtype]
    for counted in (margin, losses.spread_margin(jnp.asarray(step, "int32"))):  # as a training step counts
        assert float(counted) == pytest.approx(torch_losses.spread_margin(step), rel=precise)

    def loss(activations):
        return losses.spread_loss(activations, jnp.asarray(LABELS), margin=torch_losses.spread_margin(step))

    result, pull = jax.vjp(loss, jnp.asarray(activations))
    tensor = torch.tensor(activations, requires_grad=True)
    torch_result = torch_losses.spread_loss(tensor, torch.tensor(LABELS), margin=torch_losses.spread_margin(step))
    torch_result.backward(torch.tensor(weights))
    assert_close("spread loss", result, torch_result.detach(), tolerance=VALUES[dtype])
    assert_close("gradient", pull(jnp.asarray(weights))[0], tensor.grad, tolerance=VALUES[dtype])


@pytest.mark.parametrize("error", ["mean", "sum"])
def test_reconstruction_losses_agree(error, dtype):
    images, others = np.random.default_rng(2).random((2, 3, 4, 5, 2)).astype(dtype)
    result = losses.reconstruction_loss(jnp.asarray(others), jnp.asarray(images), error=error)
    channels_first = [torch.tensor(array.transpose(0, 3, 1, 2).copy()) for array in (others, images)]
    torch_result = torch_losses.reconstruction_loss(*channels_first, error=error)
    assert_close(error, result, torch_result, tolerance=VALUES[dtype])
