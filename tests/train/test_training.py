"""The training loop learns, is reproducible, compiles once and stops at a loss that is not finite."""

import dataclasses
from functools import partial

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from capsnet_jax import CapsNet, UsageError
from capsnet_jax.config import TrainingConfig
from capsnet_jax.errors import NonFiniteLossError
from capsnet_jax.interchange.weights import to_torch
from capsnet_jax.train import evaluation, loop, step
from capsnet_jax.train.evaluation import evaluate
from capsnet_jax.train.feeding import Feed
from capsnet_jax.train.loop import Trainer, check_finite, fit
from capsnet_jax.train.progress import Progress
from capsnet_jax.train.step import StepMetrics, create_state
from tests.conftest import IMAGE_SHAPE, SMALL, make_small_dataset

# Two epochs of six steps, in chunks of four and two steps.
CONFIG = TrainingConfig(epochs=2, batch_size=8, learning_rate=0.01, steps_per_chunk=4, warmup_steps=19)


def new_trainer(**changes) -> Trainer:
    """A trainer whose initial weights are the same for every seed."""
    config = dataclasses.replace(CONFIG, **changes)
    model = CapsNet(IMAGE_SHAPE, 10, **SMALL, routing="uniform", rngs=nnx.Rngs(0))  # quick to compile
    return Trainer(lambda seed: model, make_small_dataset(), config, augment=("shift=0.2",))


@pytest.fixture(scope="module")
def compiled() -> Trainer:
    """A trainer that shares its compiled programs with all others made by its `with_seeds`."""
    return new_trainer()


@pytest.fixture(scope="module")
def trained(compiled) -> tuple[Trainer, list[Progress]]:
    trainer = compiled.with_seeds((0,))
    return trainer, list(trainer.run())


def test_fit_learns_and_updates_the_model(small_model, small_dataset):
    before = to_torch(small_model)
    config = TrainingConfig(epochs=20, batch_size=8, learning_rate=0.01)
    first, *_, last = fit(small_model, small_dataset, config)
    assert last.losses["total"] < 0.5 * first.losses["total"]
    assert last.test_accuracy > 0.9
    assert all(not np.array_equal(before[name], after) for name, after in to_torch(small_model).items())
    again = evaluate(small_model, small_dataset.test_images, small_dataset.test_labels, reconstruct=False)
    assert last.seeds[0].test == again


@pytest.mark.parametrize("steps_per_chunk", [3, pytest.param(0, marks=pytest.mark.exhaustive)])
def test_a_run_compiles_once(steps_per_chunk, monkeypatch):
    """Two epochs of six steps, and evaluations whose last batch is padded."""
    traces = {"train": 0, "evaluate": 0}
    compute_losses, to_unit_range = step.compute_losses, evaluation.to_unit_range

    def counted_losses(*args, **kwargs):
        traces["train"] += 1
        return compute_losses(*args, **kwargs)

    def counted_conversion(images):
        traces["evaluate"] += images.shape[0] == 5
        return to_unit_range(images)

    evaluation._compiled.cache_clear()  # programs of other tests
    trainer = new_trainer(steps_per_chunk=steps_per_chunk)
    monkeypatch.setattr(step, "compute_losses", counted_losses)
    monkeypatch.setattr(evaluation, "to_unit_range", counted_conversion)
    monkeypatch.setattr(loop, "evaluate", partial(evaluate, batch_size=5))
    assert len(list(trainer.run())) == 12 / max(steps_per_chunk, 1)
    # The gradient is traced twice for a program: by itself, and as what `without_axis_of_one` calls in its place.
    assert traces == {"train": 2, "evaluate": 1}


def test_progress_has_position_and_learning_rate_of_each_chunk(trained):
    _, progress = trained
    assert [(one.epoch, one.step, one.ends_epoch) for one in progress] == [
        (1, 4, False),
        (1, 6, True),
        (2, 10, False),
        (2, 12, True),
    ]
    # The rate is that of the last step of the chunk; step 20 would be the first at the peak.
    assert [one.learning_rate for one in progress] == pytest.approx([0.002, 0.003, 0.005, 0.006])


@pytest.mark.parametrize("steps_per_chunk", [1, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (2, 6))])
def test_the_length_of_chunks_does_not_change_the_result(steps_per_chunk, trained):
    """Shifts depend only on the key and the number of the step."""
    trainer, progress = trained
    other = new_trainer(steps_per_chunk=steps_per_chunk)
    *_, last = other.run()
    assert last.losses["total"] == pytest.approx(progress[-1].losses["total"], rel=1e-5)
    expected = to_torch(trainer.models()[0])
    for name, weight in to_torch(other.models()[0]).items():
        np.testing.assert_allclose(weight, expected[name], atol=1e-4 * np.abs(expected[name]).max(), err_msg=name)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(compiled, trained):
    expected = to_torch(trained[0].models()[0])["decoder.2.weight"]
    for seed in (0, 1):
        trainer = compiled.with_seeds((seed,))
        assert len(list(trainer.run())) == 4
        assert np.array_equal(to_torch(trainer.models()[0])["decoder.2.weight"], expected) == (seed == 0)


def test_every_epoch_uses_each_image_at_most_once_in_a_new_order(compiled, monkeypatch):
    chunks = []
    send = Feed._send

    def recording(self, indices):
        chunks.append(indices)
        return send(self, indices)

    monkeypatch.setattr(Feed, "_send", recording)
    list(compiled.with_seeds((0,)).run())
    epochs = [np.concatenate([chunk.ravel() for chunk in chunks[start : start + 2]]) for start in (0, 2)]
    assert [len(set(epoch)) for epoch in epochs] == [48, 48]
    assert list(epochs[0]) != list(epochs[1])


def test_test_images_are_not_augmented(trained, small_dataset):
    """Evaluation inside training is the plain evaluation of the same weights."""
    trainer, progress = trained
    images, labels = small_dataset.test_images, small_dataset.test_labels
    plain = evaluate(trainer.models()[0], images, labels, reconstruct=False)
    assert progress[-1].seeds[0].test == plain
    assert progress[-1].test_accuracy == plain.accuracy
    assert progress[0].test_accuracy is None


def test_creating_a_state_copies_the_weights(small_model):
    """Training donates its state."""
    before = to_torch(small_model)
    _, state = create_state(small_model, optax.adam(0.1))
    jax.tree.map(lambda array: array.delete(), state.params)
    np.testing.assert_array_equal(to_torch(small_model)["decoder.2.bias"], before["decoder.2.bias"])


def test_a_loss_that_is_not_finite_stops_training_with_its_step(compiled):
    trainer = compiled.with_seeds((7,))
    chunks = trainer.run()
    next(chunks)
    state = trainer.snapshot.state
    broken = state._replace(params=jax.tree.map(lambda leaf: leaf * np.nan, state.params))
    trainer.snapshot = trainer.snapshot._replace(state=broken)
    with pytest.raises(NonFiniteLossError, match="The loss of step 5 is nan, from seed 7"):
        next(chunks)


def test_the_first_step_of_any_seed_that_is_not_finite_is_named():
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


def test_a_batch_larger_than_the_data_set_raises(small_model, small_dataset):
    with pytest.raises(UsageError, match="batch_size is 51, with only 50 training images"):
        fit(small_model, small_dataset, dataclasses.replace(CONFIG, batch_size=51))


def test_reconstruction_without_a_decoder_raises(small_dataset):
    model = CapsNet(IMAGE_SHAPE, 10, **SMALL | {"decoder_hidden": None}, rngs=nnx.Rngs(0))
    with pytest.raises(
        UsageError, match=r"reconstruction_weight is 10\.0, and must be 0 for a model without a decoder"
    ):
        fit(model, small_dataset, CONFIG)
    fit(model, small_dataset, dataclasses.replace(CONFIG, reconstruction_weight=0.0))
