"""Training: one program, reproducible steps; evaluation: every image once."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from capsnet_jax import UsageError
from capsnet_jax.config import TrainingConfig
from capsnet_jax.errors import NonFiniteLossError
from capsnet_jax.interchange.weights import to_torch
from capsnet_jax.train import evaluation
from capsnet_jax.train import loop as trainer
from capsnet_jax.train import step as training
from capsnet_jax.train.evaluation import evaluate
from capsnet_jax.train.feeding import Feed
from capsnet_jax.train.loop import check_finite, fit
from capsnet_jax.train.step import StepMetrics, create_state

CONFIG = TrainingConfig(epochs=2, batch_size=8, learning_rate=0.01)


def train(model, dataset, config=CONFIG, augment=("shift=0.2",)):
    return list(fit(model, dataset, config, augment=augment))


def test_it_learns(small_model, small_dataset):
    before = to_torch(small_model)
    progress = train(small_model, small_dataset, dataclasses.replace(CONFIG, epochs=20), augment=())
    assert progress[-1].losses["total"] < 0.5 * progress[0].losses["total"]
    assert progress[-1].test_accuracy > 0.9
    assert all(not np.array_equal(before[name], after) for name, after in to_torch(small_model).items())


@pytest.mark.parametrize("steps_per_chunk", [0, 3])
def test_a_run_compiles_once(steps_per_chunk, small_model, small_dataset, monkeypatch):
    """Two epochs of six steps, and evaluations with a last batch that is not full."""
    traces = {"train": 0, "evaluate": 0}
    compute_losses, to_unit_range = training.compute_losses, evaluation.to_unit_range

    def counted_losses(*args, **kwargs):
        traces["train"] += 1
        return compute_losses(*args, **kwargs)

    def counted_conversion(images):
        traces["evaluate"] += images.shape[0] == 5
        return to_unit_range(images)

    evaluation._compiled.cache_clear()  # programs of other tests
    monkeypatch.setattr(training, "compute_losses", counted_losses)
    monkeypatch.setattr(evaluation, "to_unit_range", counted_conversion)
    monkeypatch.setattr(trainer, "evaluate", partial(evaluate, batch_size=5))
    progress = train(small_model, small_dataset, dataclasses.replace(CONFIG, steps_per_chunk=steps_per_chunk))
    assert len(progress) == 12 / max(steps_per_chunk, 1)
    # The gradient is traced twice for a program: by itself, and as what `without_axis_of_one` calls in its place.
    assert traces == {"train": 2, "evaluate": 1}


def test_the_length_of_chunks_changes_nothing(small_dataset, small_model):
    """Shifts depend on the key and the number of the step alone."""
    weights = []
    for steps_per_chunk in (1, 2, 6):
        model = nnx.clone(small_model)
        progress = train(model, small_dataset, dataclasses.replace(CONFIG, steps_per_chunk=steps_per_chunk))
        assert [p.step for p in progress] == list(range(steps_per_chunk, 13, steps_per_chunk))
        weights.append(to_torch(model))
    for name in weights[0]:
        scale = np.abs(weights[0][name]).max()
        np.testing.assert_allclose(weights[1][name], weights[0][name], atol=1e-4 * scale)
        np.testing.assert_allclose(weights[2][name], weights[0][name], atol=1e-4 * scale)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(small_model, small_dataset):
    results = []
    for seed in (0, 0, 1):
        model = nnx.clone(small_model)
        train(model, small_dataset, dataclasses.replace(CONFIG, seed=seed, epochs=1))
        results.append(to_torch(model)["decoder.2.weight"])
    np.testing.assert_array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def test_every_epoch_sees_every_image_at_most_once_in_another_order(small_model, small_dataset, monkeypatch):
    seen = []
    send = Feed._send_indices

    def recording(self, indices):
        seen.append(indices.ravel())
        return send(self, indices)

    monkeypatch.setattr(Feed, "_send_indices", recording)
    train(small_model, small_dataset, dataclasses.replace(CONFIG, steps_per_chunk=6))
    assert [len(set(epoch)) for epoch in seen] == [48, 48]
    assert list(seen[0]) != list(seen[1])


def test_test_images_are_not_shifted(small_model, small_dataset):
    """Evaluation inside training is the plain evaluation of the same weights."""
    last = train(small_model, small_dataset)[-1]
    again = evaluate(small_model, small_dataset.test_images, small_dataset.test_labels, reconstruct=False)
    assert last.seeds[0].test == again
    assert last.test_accuracy == again.accuracy


@pytest.mark.parametrize("batch_size", [1, 5, 22, 23, 100])
def test_every_image_is_counted_once(batch_size, small_model, small_dataset):
    images, labels = small_dataset.test_images, small_dataset.test_labels
    predictions = np.asarray(small_model.encode(jnp.asarray(images) / jnp.float32(255)).activations.argmax(axis=1))
    # The last image, with which the last batch is padded, is one that the model gets right.
    labels = np.where(np.arange(len(labels)) == len(labels) - 1, predictions, labels).astype(np.int32)
    result = evaluate(small_model, images, labels, batch_size=batch_size)
    assert result[:2] == (np.sum(predictions == labels), 23)
    assert result.accuracy == np.mean(predictions == labels)


def test_the_callers_weights_survive_donation(small_model):
    before = to_torch(small_model)
    _, state = create_state(small_model, optax.adam(0.1))
    jax.tree.map(lambda array: array.delete(), state.params)
    np.testing.assert_array_equal(to_torch(small_model)["decoder.2.bias"], before["decoder.2.bias"])


def test_a_loss_that_is_not_finite_stops_with_its_step(small_model, small_dataset):
    config = dataclasses.replace(CONFIG, learning_rate=1e30, steps_per_chunk=3)
    with pytest.raises(NonFiniteLossError, match=r"The loss of step \d+ is (nan|inf)"):
        train(small_model, small_dataset, config)


def test_the_step_named_is_the_first_at_which_any_seed_is_wrong():
    seeds = (7, 8, 9)
    values = np.ones((len(StepMetrics._fields), 3, 4))
    values[0] = [[1, 2, 3, np.inf], [1, 2, np.nan, np.nan], [1, 2, 3, 4]]
    with pytest.raises(NonFiniteLossError, match="The loss of step 42 is nan, from seed 8") as error:
        check_finite(values, seeds, first_step=40)
    assert (error.value.seed, error.value.step) == (8, 42)
    check_finite(values[..., :2], seeds, first_step=40)
    values[-1, 2, 1] = np.inf
    with pytest.raises(NonFiniteLossError, match="The gradient of step 41 is inf, from seed 9"):
        check_finite(values[..., :2], seeds, first_step=40)


def test_a_batch_larger_than_the_set_is_an_error(small_model, small_dataset):
    with pytest.raises(UsageError, match="batch_size is 51, with only 50 training images"):
        fit(small_model, small_dataset, dataclasses.replace(CONFIG, batch_size=51))


def test_the_last_chunk_of_an_epoch_may_be_shorter(small_model, small_dataset):
    models = [nnx.clone(small_model) for _ in range(2)]
    config = dataclasses.replace(CONFIG, warmup_steps=19)
    progress = train(models[0], small_dataset, dataclasses.replace(config, steps_per_chunk=4))
    assert [(one.epoch, one.step, one.ends_epoch) for one in progress] == [
        (1, 4, False),
        (1, 6, True),
        (2, 10, False),
        (2, 12, True),
    ]
    # The rate is that of the last step of the chunk.
    assert [one.learning_rate for one in progress] == pytest.approx([0.002, 0.003, 0.005, 0.006])
    *_, last = train(models[1], small_dataset, config)
    assert progress[-1].losses["total"] == pytest.approx(last.losses["total"], rel=1e-5)
