"""Training from several seeds, side by side or in groups, equals training from each seed alone."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from capsnet_jax import CapsNet
from capsnet_jax.config import TrainingConfig
from capsnet_jax.runs import session
from capsnet_jax.runs.session import groups_of_seeds
from capsnet_jax.train.loop import Trainer
from tests.conftest import IMAGE_SHAPE, SMALL, make_small_dataset

CONFIG = TrainingConfig(epochs=2, batch_size=8, learning_rate=0.003)
AUGMENT = ("shift=0.2",)


def new_model(seed: int) -> CapsNet:
    return CapsNet(IMAGE_SHAPE, 10, **SMALL, routing="uniform", rngs=nnx.Rngs(seed))  # quick to compile


def new_trainer(config: TrainingConfig = CONFIG, **options) -> Trainer:
    return Trainer(new_model, make_small_dataset(), config, augment=AUGMENT, **options)


def losses(progress, index: int) -> list[float]:
    """Losses of each chunk, from one of the seeds."""
    return [step.seeds[index].chunk["total"] for step in progress]


def answers(seed) -> tuple | None:
    """All counts of an evaluation; activations differ by rounding errors."""
    return None if seed.test is None else seed.test[:6]


@pytest.fixture(scope="module")
def together():
    """Three seeds side by side: the trainer, and its progress."""
    trainer = new_trainer(seeds=(0, 1, 2))
    return trainer, list(trainer.run())


def test_seeds_side_by_side_equal_runs_of_their_own(together):
    trainer, progress = together
    for index, seed in enumerate((0, 1, 2)):
        single = trainer.with_seeds((seed,))
        alone = list(single.run())
        (model,) = single.models()
        np.testing.assert_allclose(losses(progress, index), losses(alone, 0), rtol=1e-4)
        assert [answers(step.seeds[index]) for step in progress] == [answers(step.seeds[0]) for step in alone]
        for weight, expected in zip(
            *(nnx.to_flat_state(nnx.state(each, nnx.Param)) for each in (trainer.models()[index], model)), strict=True
        ):
            scale = np.abs(expected[1][...]).max()
            np.testing.assert_allclose(weight[1][...], expected[1][...], atol=2e-3 * scale, err_msg=str(weight[0]))
    assert losses(progress, 0) != losses(progress, 1)
    assert new_trainer(dataclasses.replace(CONFIG, seed=2)).seeds == (2,)


def test_progress_over_all_seeds_is_the_mean(together):
    _, progress = together
    last = progress[-1]
    assert last.losses["total"] == pytest.approx(np.mean([seed.epoch["total"] for seed in last.seeds]))
    assert last.seeds[1].epoch["total"] == pytest.approx(np.mean(losses(progress[6:], 1)))
    assert last.test_accuracy == pytest.approx(sum(seed.test.num_correct for seed in last.seeds) / (3 * 23))
    assert (progress[0].test_accuracy, last.validation_accuracy) == (None, None)


def test_groups_of_two_seeds_and_one_equal_three(together):
    trainer, progress = together
    groups = list(groups_of_seeds(trainer, [0, 1, 2], at_once=2))
    assert [group.seeds for group in groups] == [(0, 1), (2,)]
    index = 0
    for group in groups:
        alone = list(group.run())
        for place in range(len(group.seeds)):
            np.testing.assert_allclose(losses(alone, place), losses(progress, index), rtol=1e-4)
            index += 1


def test_chunks_of_several_steps_change_nothing(together):
    _, progress = together
    chunked = list(new_trainer(dataclasses.replace(CONFIG, steps_per_chunk=3), seeds=(0, 1, 2)).run())
    assert [(step.epoch, step.step) for step in chunked] == [(1, 3), (1, 6), (2, 9), (2, 12)]
    for index in range(3):
        means = np.reshape(losses(progress, index), (4, 3)).mean(axis=1)
        np.testing.assert_allclose(losses(chunked, index), means, rtol=1e-4)


def test_as_many_seeds_as_fit_train_at_once(together, monkeypatch):
    needed = together[0].memory()

    def sizes(available: int) -> list[int]:
        monkeypatch.setattr(session, "available_memory", lambda: available)
        return [len(group.seeds) for group in groups_of_seeds(together[0], [0, 1, 2])]

    assert sizes(needed) == [3]
    assert sizes(needed - 1) == [1, 1, 1]
    assert sizes(0) == [1, 1, 1]
