"""Losses against their twins and the oracle, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from capsnet_jax import losses
from capsnet_torch import losses as torch_losses
from parity_tests import oracle
from parity_tests.compare import TOLERANCE, assert_close

LABELS = np.array([3, 0, 4, 1, 1, 2])


def activations(dtype: str) -> np.ndarray:
    """On both sides of both margins."""
    return np.random.default_rng(8).uniform(0, 1, size=(6, 5)).astype(dtype)


def test_margin_loss_and_gradient_agree(dtype):
    values = activations(dtype)
    torch_values = torch.tensor(values, requires_grad=True)
    expected = torch_losses.margin_loss(torch_values, torch.tensor(LABELS))
    expected.sum().backward()
    labels = jnp.asarray(LABELS, "int32")
    actual = losses.margin_loss(jnp.asarray(values), labels)
    grad = jax.grad(lambda values: losses.margin_loss(values, labels).sum())(jnp.asarray(values))
    assert_close("margin loss", actual, expected.detach(), tolerance=TOLERANCE[dtype])
    assert_close("gradient", grad, torch_values.grad, tolerance=TOLERANCE[dtype])


def test_margin_loss_agrees_with_the_oracle(float64):
    values = activations(float64)
    expected = [oracle.margin_loss(row, label) for row, label in zip(values, LABELS, strict=True)]
    actual = losses.margin_loss(jnp.asarray(values), jnp.asarray(LABELS, "int32"))
    assert_close("margin loss", actual, np.array(expected), tolerance=1e-12)


def test_reconstruction_loss_agrees(dtype):
    rng = np.random.default_rng(9)
    ours, images = (rng.random((3, 7, 8, 2)).astype(dtype) for _ in range(2))
    actual = losses.reconstruction_loss(jnp.asarray(ours), jnp.asarray(images))
    channels_first = [torch.tensor(array.transpose(0, 3, 1, 2).copy()) for array in (ours, images)]
    expected = torch_losses.reconstruction_loss(*channels_first)
    assert_close("reconstruction loss", actual, expected, tolerance=TOLERANCE[dtype])
    by_hand = [
        sum((a - b) ** 2 for a, b in zip(x.ravel(), y.ravel(), strict=True)) / x.size
        for x, y in zip(ours, images, strict=True)
    ]
    assert_close("reconstruction loss", actual, np.array(by_hand, dtype), tolerance=TOLERANCE[dtype])
