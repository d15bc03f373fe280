"""Batch normalization uses the batch in training mode, and running averages in evaluation mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from capsnet_jax import CapsNet
from capsnet_jax.config import TrainingConfig
from capsnet_jax.data import Dataset
from capsnet_jax.interchange.weights import from_torch, to_torch
from capsnet_jax.train.evaluation import Evaluation, evaluate
from capsnet_jax.train.loop import fit
from tests.conftest import IMAGE_SHAPE, SMALL, make_small_dataset

CONFIG = TrainingConfig(epochs=10, batch_size=8, learning_rate=0.01)
RUNNING = ["encoder.image2primary_capsules.2.running_mean", "encoder.image2primary_capsules.2.running_var"]


@pytest.fixture
def model() -> CapsNet:
    return CapsNet(IMAGE_SHAPE, 10, **SMALL, batch_norm=True, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def trained() -> tuple[CapsNet, Dataset, Evaluation]:
    """A trained model, its data set, and the result on test images at the end of training."""
    model = CapsNet(IMAGE_SHAPE, 10, **SMALL, batch_norm=True, rngs=nnx.Rngs(0))
    dataset = make_small_dataset()
    *_, last = fit(model, dataset, CONFIG)
    return model, dataset, last.seeds[0].test


encode = nnx.jit(lambda model, images: model.encode(images))


def images(count: int) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(1).random((count, *IMAGE_SHAPE)), jnp.float32)


def test_features_are_normalised_over_the_batch_in_training_mode_only(model):
    stem = nnx.jit(lambda model, images: model.stem(images))
    features = np.asarray(stem(model, images(30)), np.float64)
    assert np.abs(features.mean(axis=(0, 1, 2))).max() > 0.01
    model.train()
    features = np.asarray(stem(model, images(30)), np.float64)
    np.testing.assert_allclose(features.mean(axis=(0, 1, 2)), 0, atol=1e-5)
    variance = features.var(axis=(0, 1, 2))
    alive = variance > 0  # not a ReLU of zeros
    assert alive.sum() > 3
    assert np.all((variance[alive] < 1) & (variance[alive] > 0.5))  # 1 but for the epsilon, as features vary little


def test_running_averages_have_momentum_099(model):
    before = {name: to_torch(model)[name] for name in RUNNING}
    convolution = model.stem.convolutions[0]
    features = np.maximum(np.asarray(jax.jit(convolution)(images(30)), np.float64), 0)
    model.train()
    encode(model, images(30))
    for name, batch in zip(RUNNING, (features.mean(axis=(0, 1, 2)), features.var(axis=(0, 1, 2))), strict=True):
        np.testing.assert_allclose(to_torch(model)[name], 0.99 * before[name] + 0.01 * batch, rtol=1e-4)


def test_examples_are_independent_in_evaluation_mode(model):
    together = encode(model, images(5)).poses[0]
    alone = encode(model, images(5)[:1]).poses[0]
    np.testing.assert_allclose(alone, together, rtol=1e-5, atol=1e-7)


def test_running_averages_are_saved_with_the_weights(trained):
    """A copy of a trained model, made from its state_dict, evaluates to the same result as at the end of training."""
    model, dataset, result = trained
    state = to_torch(model)
    for name in RUNNING:
        assert np.abs(state[name] - (1 if name.endswith("var") else 0)).max() > 1e-3
    other = CapsNet(IMAGE_SHAPE, 10, **SMALL, batch_norm=True, rngs=nnx.Rngs(1))
    counter = {"encoder.image2primary_capsules.2.num_batches_tracked": np.array(18)}  # PyTorch keeps one
    from_torch(other, state | counter)
    assert evaluate(other, dataset.test_images, dataset.test_labels, reconstruct=False) == result


def test_evaluation_does_not_depend_on_the_batch_size(trained):
    """In training mode, batches of two would be classified differently."""
    model, dataset, _ = trained
    shown, labels = dataset.test_images, dataset.test_labels
    counted = [evaluate(model, shown, labels, batch_size=size) for size in (2, 23)]

    def predicted(model: CapsNet, start: int, stop: int) -> np.ndarray:
        return encode(model, jnp.asarray(shown[start:stop] / np.float32(255))).activations.argmax(axis=1)

    right = np.asarray(predicted(model, 0, 23)) == labels
    assert [result.num_correct for result in counted] == [right.sum()] * 2
    model = nnx.clone(model)
    model.train()
    in_pairs = np.concatenate([predicted(model, start, start + 2) for start in range(0, 22, 2)])
    assert np.sum(in_pairs == labels[:22]) != right[:22].sum()
