"""Losses compared with values computed by hand or by explicit loops."""

import jax.numpy as jnp
import numpy as np
import pytest

from capsnet_jax import UsageError
from capsnet_jax.nn.losses import margin_loss, reconstruction_loss, spread_loss, spread_margin


def test_margin_loss_by_hand():
    activations = jnp.array([[0.5, 0.3, 0.05], [0.95, 0.1, 0.0]])
    # The label is 0.4 below 0.9 and one class 0.2 above 0.1; then the label is 0.9 below and one class 0.85 above.
    expected = [0.4**2 + 0.5 * 0.2**2, 0.9**2 + 0.5 * 0.85**2]
    np.testing.assert_allclose(margin_loss(activations, jnp.array([0, 2])), expected, rtol=1e-6)


def test_margin_loss_of_several_labels():
    activations = np.random.default_rng(5).uniform(size=(3, 5))
    labels = [[4, 1], [0, 3], [2, 4]]
    expected = [
        sum(max(0, 0.9 - row[o]) ** 2 if o in wanted else 0.5 * max(0, row[o] - 0.1) ** 2 for o in range(5))
        for row, wanted in zip(activations, labels, strict=True)
    ]
    ours = margin_loss(jnp.asarray(activations, jnp.float32), jnp.array(labels))
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_margin_loss_with_other_margins_and_weight():
    loss = margin_loss(jnp.array([[0.5, 0.4]]), jnp.array([0]), present=0.8, absent=0.2, absent_weight=2.0)
    np.testing.assert_allclose(loss, [0.3**2 + 2 * 0.2**2], rtol=1e-6)


def test_margin_loss_is_zero_inside_the_margins():
    assert margin_loss(jnp.array([[0.95, 0.05, 0.1]]), jnp.array([0]))[0] == 0


def test_reconstruction_loss_is_a_mean_over_pixels_and_channels():
    images = jnp.zeros((2, 2, 3, 2))
    loss = reconstruction_loss(images.at[0, 1, 2, 0].set(0.6), images)
    np.testing.assert_allclose(loss, [0.36 / 12, 0], rtol=1e-6)


def test_spread_loss_equals_explicit_loops():
    activations = np.random.default_rng(3).uniform(size=(2, 4))
    labels, margin = [2, 0], 0.7
    expected = [
        sum(max(0.0, margin - (row[label] - row[o])) ** 2 for o in range(4) if o != label)
        for row, label in zip(activations, labels, strict=True)
    ]
    ours = spread_loss(jnp.asarray(activations, jnp.float32), jnp.array(labels), margin=margin)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_spread_loss_refuses_several_labels():
    with pytest.raises(UsageError, match="spread loss got 2 labels for each image, and is defined for one"):
        spread_loss(jnp.ones((3, 5)), jnp.array([[4, 1], [0, 3], [2, 4]]))


def test_the_spread_margin_grows_from_a_fifth_to_one():
    margins = [float(spread_margin(step)) for step in (0, 200_000, 10**9)]
    np.testing.assert_allclose(margins, [0.2 + 0.79 / (1 + np.exp(4)), 0.2 + 0.79 / 2, 0.99], rtol=1e-4)


def test_the_summed_error_is_the_mean_times_the_number_of_pixels():
    images, others = jnp.asarray(np.random.default_rng(4).random((2, 3, 4, 5, 2)), jnp.float32)
    mean = reconstruction_loss(others, images)
    np.testing.assert_allclose(reconstruction_loss(others, images, error="sum"), 40 * mean, rtol=1e-5)
