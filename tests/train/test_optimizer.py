"""The learning rate against its formulas, step by step; and Adam, by hand, on gradients that are clipped before it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capsnet_jax.config import TrainingConfig
from capsnet_jax.train.optimizer import create_optimizer, learning_rate

EPOCHS, STEPS_PER_EPOCH = 3, 7
LAST = EPOCHS * STEPS_PER_EPOCH
PEAK, FLOOR, DECAY, DECAY_STEPS, WARMUP = 0.02, 0.003, 0.5, 4, 5
BEFORE_CLIPPING = (0.3, 40.0, 2.0)  # norms of the gradients of three steps; the first is not clipped
CLIP_NORM = 1.5


def config(**changes) -> TrainingConfig:
    fields = {"epochs": EPOCHS, "learning_rate": PEAK, "learning_rate_floor": FLOOR, "learning_rate_decay": DECAY}
    return TrainingConfig(**(fields | {"learning_rate_decay_steps": DECAY_STEPS} | changes))


def expected_rate(schedule: str, warmup: int, step: int) -> float:
    """After so many steps."""
    if step < warmup:
        return PEAK * (step + 1) / (warmup + 1)
    step -= warmup
    if schedule == "exponential":
        return max(PEAK * DECAY ** (step / DECAY_STEPS), FLOOR)
    if schedule == "cosine":
        share = min(step / (LAST - warmup), 1)
        return FLOOR + (PEAK - FLOOR) * (1 + math.cos(math.pi * share)) / 2
    return PEAK


@pytest.mark.parametrize("warmup", [0, WARMUP])
@pytest.mark.parametrize("schedule", ["constant", "exponential", "cosine"])
def test_the_rate_is_that_of_its_formula_at_every_step(schedule, warmup):
    """Up to the last step, and beyond, where a training that is prolonged may come."""
    rate = learning_rate(config(schedule=schedule, warmup_steps=warmup), STEPS_PER_EPOCH)
    steps = np.arange(LAST + 9)
    rates = np.array([rate(step) for step in steps])
    np.testing.assert_allclose(rates, [expected_rate(schedule, warmup, int(step)) for step in steps], rtol=1e-5)
    # What the formulas mean, in the words of the options.
    assert rates[0] == pytest.approx(PEAK / (warmup + 1))
    assert rates[warmup] == rates.max() == pytest.approx(PEAK)
    assert np.all(np.diff(rates[: warmup + 1]) > 0)
    assert np.all(np.diff(rates[warmup:]) <= 0)
    assert rates[LAST] == pytest.approx(PEAK if schedule == "constant" else FLOOR)


@pytest.mark.parametrize("schedule", ["constant", "exponential", "cosine"])
def test_a_warmup_that_is_longer_than_the_training_is_all_of_it(schedule):
    rate = learning_rate(config(schedule=schedule, warmup_steps=LAST + 3), STEPS_PER_EPOCH)
    np.testing.assert_allclose(
        [rate(step) for step in range(LAST)], PEAK * np.arange(1, LAST + 1) / (LAST + 4), rtol=1e-5
    )


def test_a_floor_of_zero_is_none():
    exponential, cosine = (
        learning_rate(config(schedule=schedule, learning_rate_floor=0.0), STEPS_PER_EPOCH)
        for schedule in ("exponential", "cosine")
    )
    np.testing.assert_allclose(exponential(10 * DECAY_STEPS), PEAK * DECAY**10, rtol=1e-5)
    assert 0 < cosine(LAST - 1) < 0.01 * PEAK
    assert cosine(LAST) == 0


def gradients() -> list[dict[str, np.ndarray]]:
    """Of three steps, each of its own norm over both arrays."""
    rng = np.random.default_rng(0)
    steps = []
    for norm in BEFORE_CLIPPING:
        arrays = {"kernel": rng.normal(size=(2, 3)), "bias": rng.normal(size=4)}
        length = math.sqrt(sum(float(np.sum(array**2)) for array in arrays.values()))
        steps.append({name: array * norm / length for name, array in arrays.items()})
    return steps


def adam_by_hand(settings: TrainingConfig, clip_norm: float) -> dict[str, np.ndarray]:
    """What three steps add to the weights. Kingma, Ba, "Adam" (2015), algorithm 1, at its default hyper-parameters."""
    added = {"kernel": np.zeros((2, 3)), "bias": np.zeros(4)}
    first, second = ({name: np.zeros_like(array) for name, array in added.items()} for _ in range(2))
    for step, (grads, norm) in enumerate(zip(gradients(), BEFORE_CLIPPING, strict=True)):
        for name, unclipped in grads.items():
            grad = unclipped * min(clip_norm / norm, 1)
            first[name] = 0.9 * first[name] + 0.1 * grad
            second[name] = 0.999 * second[name] + 0.001 * grad**2
            mean, square = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
            rate = expected_rate(settings.schedule, settings.warmup_steps, step)
            added[name] -= rate * mean / (np.sqrt(square) + 1e-8)
    return added


@pytest.mark.parametrize("clip_norm", [None, CLIP_NORM])
def test_adam_gets_gradients_that_are_clipped_already(clip_norm):
    settings = config(schedule="exponential", warmup_steps=2, clip_norm=clip_norm)
    optimizer = create_optimizer(settings, STEPS_PER_EPOCH)
    params = {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(4)}
    state = optimizer.init(params)
    for grads in gradients():
        updates, state = optimizer.update(jax.tree.map(jnp.asarray, grads), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    clipped, unclipped = adam_by_hand(settings, CLIP_NORM), adam_by_hand(settings, math.inf)
    for name, param in params.items():
        np.testing.assert_allclose(param, (clipped if clip_norm else unclipped)[name], rtol=1e-4)
        # The steps are long or short by their gradients' norms; Adam would not notice a factor that is always the same.
        assert np.abs(clipped[name] - unclipped[name]).max() > 0.1 * np.abs(clipped[name]).max()
