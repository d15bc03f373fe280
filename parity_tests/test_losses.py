"""The spread loss and summed reconstruction errors on both sides, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from capsnet_jax import losses
from capsnet_torch import losses as torch_losses
from parity_tests.compare import TOLERANCE, assert_close

LABELS = np.array([3, 0, 4])


@pytest.mark.parametrize("step", [0, 150_000, 10**7])
def test_spread_losses_agree(step, dtype):
    activations = np.random.default_rng(0).uniform(size=(3, 5)).astype(dtype)
    weights = np.random.default_rng(1).normal(size=3).astype(dtype)
    margin = losses.spread_margin(step)
    assert float(margin) == pytest.approx(torch_losses.spread_margin(step), rel=1e-6)

    def loss(activations):
        return losses.spread_loss(activations, jnp.asarray(LABELS), margin=torch_losses.spread_margin(step))

    ours, pull = jax.vjp(loss, jnp.asarray(activations))
    tensor = torch.tensor(activations, requires_grad=True)
    theirs = torch_losses.spread_loss(tensor, torch.tensor(LABELS), margin=torch_losses.spread_margin(step))
    theirs.backward(torch.tensor(weights))
    assert_close("spread loss", ours, theirs.detach(), tolerance=TOLERANCE[dtype])
    assert_close("gradient", pull(jnp.asarray(weights))[0], tensor.grad, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("error", ["mean", "sum"])
def test_reconstruction_losses_agree(error, dtype):
    images, others = np.random.default_rng(2).random((2, 3, 4, 5, 2)).astype(dtype)
    ours = losses.reconstruction_loss(jnp.asarray(others), jnp.asarray(images), error=error)
    channels_first = [torch.tensor(array.transpose(0, 3, 1, 2).copy()) for array in (others, images)]
    theirs = torch_losses.reconstruction_loss(*channels_first, error=error)
    assert_close(error, ours, theirs, tolerance=TOLERANCE[dtype])
