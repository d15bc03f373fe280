"""Five steps of Adam from shared weights on shared batches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

from capsnet_jax.training import create_state, make_train_step
from capsnet_jax.weights import to_torch
from capsnet_torch.training import train_step as torch_train_step
from parity_tests.compare import assert_close
from parity_tests.pair import IMAGE_SHAPE, NUM_CLASSES, RECONSTRUCTION_WEIGHT, Pair, make_pair, to_channels_first

STEPS, BATCH, LEARNING_RATE = 5, 4, 1e-2


def trajectories(pair: Pair) -> tuple[list[float], list[float], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Losses of every step and weights after the last one, on both sides."""
    optimizer = optax.adam(LEARNING_RATE)
    graphdef, state = create_state(pair.jax_model, optimizer)
    step = jax.jit(make_train_step(graphdef, optimizer, reconstruction_weight=RECONSTRUCTION_WEIGHT))
    torch_optimizer = torch.optim.Adam(pair.torch_model.parameters(), LEARNING_RATE)
    rng = np.random.default_rng(10)
    losses, torch_losses = [], []
    for _ in range(STEPS):
        images = rng.random((BATCH, *IMAGE_SHAPE)).astype(pair.images.dtype)
        labels = rng.integers(0, NUM_CLASSES, BATCH)
        state, ours = step(state, jnp.asarray(images), jnp.asarray(labels, "int32"))
        theirs = torch_train_step(
            pair.torch_model,
            torch_optimizer,
            to_channels_first(images),
            torch.tensor(labels),
            reconstruction_weight=RECONSTRUCTION_WEIGHT,
        )
        losses.append(float(ours.total))
        torch_losses.append(theirs.total.item())
    weights = to_torch(nnx.merge(graphdef, state.params, state.batch_stats))
    return losses, torch_losses, weights, {name: array.numpy() for name, array in pair.torch_model.state_dict().items()}


def test_losses_and_weights_agree_in_float64(float64):
    pair = make_pair(float64)
    before = to_torch(pair.jax_model)
    losses, torch_losses, weights, torch_weights = trajectories(pair)
    assert_close("losses", losses, torch_losses, tolerance=1e-9)
    assert losses[-1] != losses[0]
    for name in weights:
        assert_close(name, weights[name], torch_weights[name], tolerance=1e-9)
        # The steps are large enough for a wrong optimizer to show.
        assert np.abs(weights[name] - before[name]).max() > LEARNING_RATE


def test_losses_agree_in_float32():
    """Weights are not compared: Adam divides rounding errors by small gradients, and they part by a whole step."""
    losses, torch_losses, _, _ = trajectories(make_pair("float32"))
    assert_close("losses", losses, torch_losses, tolerance=1e-4)
