"""Compare every value and gradient of a model in JAX and PyTorch, in every implementation, and then training."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

from capsnet_jax.config import TrainingConfig
from capsnet_jax.interchange.weights import to_torch
from capsnet_jax.nn.model import CapsNet
from capsnet_jax.train.step import create_state, make_train_step
from capsnet_torch.step import train_step as torch_train_step
from capsnet_verify.causes import VISIBLE, cause, cause_of_weight, usual_cause
from capsnet_verify.checks import AGREES, DIFFERS, INHERITS, NO_POWER, STEPS, Array, Check, compare
from capsnet_verify.deviations import deviations, explanation
from capsnet_verify.implementations import Layer, Plan, as_on, in_words, plan
from capsnet_verify.pair import Pair, both_on, new_pair, to_channels_first, with_batch
from capsnet_verify.scaling import Scaling, scale_weights
from capsnet_verify.subjects import Settings, Subject
from capsnet_verify.values import QUICKLY_COMPILED, in_jax, in_torch, jittered

JITTERS = 3  # number of random rounding errors that are tried; a single one may change nothing by chance
ADDED_UP = 30  # rounding errors of a sum of a thousand numbers, relative to one of them
EVEN = 1e-6  # if couplings are this close to even however long poses are, the algorithm does not route
NOT_COMPARED = ("running_var", "num_batches_tracked")  # PyTorch multiplies the variance by n / (n - 1), Flax does not
STEPS_IN_FLOAT32 = 5  # later, rounding errors have grown too large

Result = tuple[Check, Callable[[], str]]
"""A check, and a function that finds the most likely cause if it is the first that differs."""


@dataclass
class Verification:
    """The result of verifying a model.

    Attributes:
        subject: the model.
        settings: how it was verified.
        plan: batches that were compared, and the implementations that they prove; None if there is no choice.
        scalings: scaling of each capsule layer.
        checks: in the order in which values depend on each other.
        cause: most likely cause of the first divergence; None if there is none.
        notes: further sentences for the report.
    """

    subject: Subject
    settings: Settings
    plan: Plan | None = None
    scalings: list[Scaling] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    cause: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def first_divergence(self) -> Check | None:
        """The first check that differs."""
        return next((check for check in self.checks if check.verdict == DIFFERS), None)

    @property
    def without_power(self) -> dict[str, list[str]]:
        """Checks that proved nothing, and layers whose routing hardly matters, by the reason."""
        found: dict[str, list[str]] = {}
        for check in self.checks:
            if check.verdict == NO_POWER:
                found.setdefault(check.reason.partition(",")[0], []).append(check.name)
        for number, layer in enumerate(self.scalings):
            if not (layer.routing_matters or (layer.moderate and layer.unevenness < EVEN)):
                found.setdefault("no scale makes routing matter", []).append(f"capsule layer {number}")
        return found

    @property
    def verdict(self) -> str:
        """The status in a word, as for a single check."""
        return (AGREES, DIFFERS, NO_POWER)[self.status]

    @property
    def status(self) -> int:
        """Exit status: 0 if both models agree, 1 if they differ, 2 if not everything could be compared."""
        return 1 if self.first_divergence else 2 if self.without_power or not self.checks else 0


def verify(
    subject: Subject,
    settings: Settings,
    *,
    mistake: AbstractContextManager[Any] | None = None,
    only_first: bool = False,
) -> Verification:
    """Compare every value and gradient in JAX and PyTorch, in every implementation, and then training.

    Args:
        subject: the model.
        settings: how it is verified.
        mistake: a context in which the JAX side has a planted mistake; weights are created and scaled outside it.
        only_first: stop at the first check that differs.

    Raises:
        UsageError: a model cannot be created, or the two have different weights.
    """
    verification = Verification(subject, settings)
    results = closing(_results(verification, mistake or nullcontext()))
    with both_on(settings.device, settings.dtype), results as stream:
        for check, why in stream:
            verification.checks.append(check)
            if check.verdict == DIFFERS:
                verification.cause = verification.cause or why()
                if only_first:
                    break
    return verification


def plan_of(subject: Subject, settings: Settings) -> Plan:
    """Find the batches at which a model is compared."""
    config = subject.run.config
    # The dtype decides how a convolution is computed.
    model = nnx.eval_shape(lambda: CapsNet.from_config(config.model, param_dtype=settings.dtype, rngs=nnx.Rngs(0)))
    return plan(model, settings.device, only=settings.batch_size, training_size=config.training.batch_size)


def trajectory(pair: Pair, settings: Settings) -> Iterator[Result]:
    """Train both models by Adam on the same batches; check the loss of each step and, in float64, all weights after it.

    In float32 and bfloat16 neither weights nor later steps are compared: Adam divides rounding errors by small
    gradients, so weights differ by a whole step while losses agree.
    """
    optimizer = optax.adam(settings.learning_rate)
    graphdef, state = create_state(pair.jax_model, optimizer)
    config = TrainingConfig(precision="bfloat16" if pair.dtype == "bfloat16" else "float32", **pair.loss)
    train_step = make_train_step(graphdef, optimizer, config)
    step = jax.jit(train_step, compiler_options=QUICKLY_COMPILED)
    torch_optimizer = torch.optim.Adam(pair.torch_model.parameters(), settings.learning_rate)
    rng = np.random.default_rng(10)
    num_steps = settings.steps if pair.dtype == "float64" else min(settings.steps, STEPS_IN_FLOAT32)
    for number in range(num_steps):
        images = rng.random(pair.images.shape).astype(pair.images.dtype)
        labels = rng.permutation(np.asarray(pair.labels))
        state, metrics = step(state, jnp.asarray(images), jnp.asarray(labels))
        batch = to_channels_first(images), torch.tensor(labels).long()
        torch_metrics = torch_train_step(pair.torch_model, torch_optimizer, *batch, **pair.loss, step=number)
        sides = {"loss": (metrics.total, torch_metrics.total.numpy(force=True))}
        if pair.dtype == "float64":
            weights = to_torch(nnx.merge(graphdef, state.params, state.batch_stats))
            for name, tensor in pair.torch_model.state_dict().items():
                if not name.endswith(NOT_COMPARED):
                    sides[name] = weights[name], tensor.numpy(force=True)
        name = f"step {number + 1}"
        yield worst(name, sides, STEPS[pair.dtype]), partial(usual_cause, name)


def worst(name: str, sides: dict[str, tuple[Any, np.ndarray]], tolerance: float) -> Check:
    """Return the worst check of several pairs of arrays, under one name."""
    checks = [compare(each, *pair, tolerance=tolerance) for each, pair in sides.items()]
    found = max(checks, key=lambda check: (check.verdict == DIFFERS, check.verdict == NO_POWER, check.error))
    return found._replace(name=name, reason=f"{found.name}: {found.reason}" if found.reason else "")


def _results(verification: Verification, mistake: AbstractContextManager[Any]) -> Generator[Result, None, None]:
    subject, settings = verification.subject, verification.settings
    pair = new_pair(subject, settings)
    if settings.tolerances:
        settings.check_names(in_torch(pair))
    plan = verification.plan = plan_of(subject, settings)
    yield from _weights(subject, settings)
    verification.scalings = scale_weights(pair)
    with mistake:
        yield from _values(pair, plan, settings)
        yield from trajectory(with_batch(pair, plan.for_training.size, seed=settings.seed), settings)


def _weights(subject: Subject, settings: Settings) -> Iterator[Result]:
    """Compare weights that the two models have from different files; they must be equal to the last bit."""
    weights = subject.state
    if weights is None or settings.torch_state is None:
        return
    for name, expected in settings.torch_state.items():
        sides = weights[name].astype("float64"), expected.astype("float64")
        check = compare(f"weight {name}", *sides, tolerance=0.0, floor=-1.0)
        yield check, partial(cause_of_weight, name, *sides, weights)


def _values(pair: Pair, plan: Plan, settings: Settings) -> Iterator[Result]:
    expected: dict[int, dict[str, np.ndarray]] = {}
    for number, batch in enumerate(plan.batches):
        on_batch = with_batch(pair, batch.size, seed=settings.seed)
        if batch.size not in expected:
            expected[batch.size] = in_torch(on_batch)
        # If all earlier batches agree, the mistake is in an implementation that only this batch uses.
        new = plan.new(batch) if number else []
        for check, why in _on_batch(on_batch, batch.platform, new, expected[batch.size], settings):
            yield check._replace(name=f"{check.name}, {batch}") if number else check, why


def _on_batch(
    pair: Pair, platform: str | None, new: Sequence[Layer], expected: dict[str, np.ndarray], settings: Settings
) -> Iterator[Result]:
    def compute(pair: Pair, given: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        with as_on(platform):
            return in_jax(pair, given)

    @cache
    def moved() -> list[dict[str, np.ndarray]]:
        return [compute(jittered(pair, seed)) for seed in range(JITTERS)]

    def why(check: Check) -> str:
        sides = actual[check.name], expected[check.name]
        deviation = None if settings.torch_routing is None else _deviation(pair, check, sides[1])
        return (f"in {in_words(new)}: " if new else "") + (deviation or cause(check.name, *sides))

    actual = compute(pair)
    replay = partial(compute, pair, expected)
    for check in compare_in_order(actual, expected, settings, replay=replay, moved=moved):
        yield check, partial(why, check)


def compare_in_order(
    actual: Mapping[str, Array],
    expected: Mapping[str, Array],
    settings: Settings,
    *,
    replay: Callable[[], Mapping[str, Array]],
    moved: Callable[[], Sequence[Mapping[str, Array]]] = list,
) -> Iterator[Check]:
    """Compare values and gradients in forward order, and tell those that are wrong from those that inherit an error.

    Args:
        actual: computed by JAX.
        expected: computed by PyTorch, in forward order.
        settings: tolerances, and whether checks get histograms.
        replay: computes what each layer of JAX makes of PyTorch's values; called after the first difference.
        moved: computes what JAX makes of weights and images with rounding errors, at which small differences have no
            power; by default, all differences count.
    """
    alone: Mapping[str, Array] = {}
    differed = False
    for name in expected:
        # In bfloat16 some ReLU units switch on or off, which changes single gradients completely.
        euclidean = settings.dtype == "bfloat16"
        measure = partial(compare, name, tolerance=settings.tolerance_of(name), euclidean=euclidean)
        check = measure(actual[name], expected[name])
        if check.verdict == DIFFERS and check.error < VISIBLE:
            moves = max((measure(values[name], actual[name]).error for values in moved()), default=0.0)
            if check.error <= ADDED_UP * moves:
                reason = f"changed as much by rounding errors alone, by {moves:.1e}"
                check = check._replace(verdict=NO_POWER, reason=reason)
        if check.verdict == DIFFERS and differed:
            alone = alone or replay()
            if measure(alone[name], expected[name]).verdict == AGREES:
                check = check._replace(verdict=INHERITS)
        differed = differed or check.verdict == DIFFERS
        yield check.with_histogram(actual[name], expected[name]) if settings.histograms else check


def _deviation(pair: Pair, check: Check, expected: np.ndarray) -> str | None:
    """Name a deviation of the user's routing from the registered one that explains a check."""
    weights = {name: torch.tensor(array) for name, array in to_torch(pair.jax_model).items()}
    tried = (each for each in deviations(pair.jax_model.config) if check.name.startswith(each.changes))
    found = explanation(check, ((each, each.values(pair, weights)[check.name], expected) for each in tried))
    return found and f"{found[0]}: with {found[0].remedy}, {found[1]}"
