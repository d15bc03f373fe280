"""Learning rate schedules against their formulas, and Adam on clipped gradients against an implementation by hand."""

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
    """Learning rate after `step` steps."""
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
def test_the_learning_rate_equals_its_formula_at_every_step(schedule, warmup):
    """Up to the last step and beyond, which a resumed training with more epochs reaches."""
    rate = learning_rate(config(schedule=schedule, warmup_steps=warmup), STEPS_PER_EPOCH)
    steps = np.arange(LAST + 9)
    rates = np.array([rate(step) for step in steps])
    np.testing.assert_allclose(rates, [expected_rate(schedule, warmup, int(step)) for step in steps], rtol=1e-5)
    # Properties that the options promise.
    assert rates[0] == pytest.approx(PEAK / (warmup + 1))
    assert rates[warmup] == rates.max() == pytest.approx(PEAK)
    assert np.all(np.diff(rates[: warmup + 1]) > 0)
    assert np.all(np.diff(rates[warmup:]) <= 0)
    assert rates[LAST] == pytest.approx(PEAK if schedule == "constant" else FLOOR)


@pytest.mark.parametrize("schedule", ["constant", "exponential", "cosine"])
def test_a_warmup_longer_than_the_training_never_reaches_the_peak(schedule):
    rate = learning_rate(config(schedule=schedule, warmup_steps=LAST + 3), STEPS_PER_EPOCH)
    np.testing.assert_allclose(
        [rate(step) for step in range(LAST)], PEAK * np.arange(1, LAST + 1) / (LAST + 4), rtol=1e-5
    )


def test_a_floor_of_zero_does_not_limit_the_decay():
    exponential, cosine = (
        learning_rate(config(schedule=schedule, learning_rate_floor=0.0), STEPS_PER_EPOCH)
        for schedule in ("exponential", "cosine")
    )
    np.testing.assert_allclose(exponential(10 * DECAY_STEPS), PEAK * DECAY**10, rtol=1e-5)
    assert 0 < cosine(LAST - 1) < 0.01 * PEAK
    assert cosine(LAST) == 0


def gradients() -> list[dict[str, np.ndarray]]:
    """Gradients of three steps with the norms above."""
    rng = np.random.default_rng(0)
    steps = []
    for norm in BEFORE_CLIPPING:
        arrays = {"kernel": rng.normal(size=(2, 3)), "bias": rng.normal(size=4)}
        length = math.sqrt(sum(float(np.sum(array**2)) for array in arrays.values()))
        steps.append({name: array * norm / length for name, array in arrays.items()})
    return steps


def adam_by_hand(settings: TrainingConfig, clip_norm: float) -> dict[str, np.ndarray]:
    """Change of the weights by three steps of Kingma, Ba, "Adam" (2015), algorithm 1, default hyper-parameters."""
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
def test_gradients_are_clipped_before_adam(clip_norm):
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
        # Norms differ between the steps, because Adam does not depend on a common factor of all gradients.
        assert np.abs(clipped[name] - unclipped[name]).max() > 0.1 * np.abs(clipped[name]).max()
