"""Both sides of a model made, made hot, and compared."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import optax
from flax import nnx
from jaxtyping import Shaped

from capsnet_jax.interchange.weights import StateDict
from capsnet_jax.nn.model import CapsNet
from capsnet_jax.runs.folder import Run
from capsnet_verify.causes import VISIBLE, cause, mixed_up, usual_cause
from capsnet_verify.checks import DIFFERS, NO_POWER, Check, compare, tolerance_of
from capsnet_verify.devices import both_on
from capsnet_verify.heat import Heat, heat
from capsnet_verify.implementations import FIRST, Layer, Plan, as_on, in_words, plan
from capsnet_verify.pair import Pair, new_pair, with_batch
from capsnet_verify.subjects import Subject
from capsnet_verify.trajectory import trajectory
from capsnet_verify.values import in_jax, in_torch, jittered

JITTERS = 3  # times that rounding errors are tried out; one by itself may happen to move nothing
ADDED_UP = 30  # as many rounding errors at once add up in a sum of a thousand numbers
EVEN = 1e-6  # couplings this close to even, however long poses are, are those of no routing at all


@dataclass(frozen=True)
class Settings:
    """How a subject is verified.

    Attributes:
        dtype: float64, float32 or bfloat16.
        device: cpu or gpu.
        steps: number of training steps.
        learning_rate: of Adam, in these steps. With a large one rounding errors are amplified: 1e-3 brings weights of
            the reference model, whose gradients are as small as Adam's epsilon, off by 1e-9 in the first step.
        batch_size: number of images; by default several, at which each implementation that `auto` may choose is chosen.
        seed: of weights and batches.
        torch_routing: the twin's, if it is another.
        torch_state: weights of the twin, if they are others.
    """

    dtype: str = "float64"
    device: str = "cpu"
    steps: int = 20
    learning_rate: float = 1e-4
    batch_size: int | None = None
    seed: int = 0
    torch_routing: str | Callable[..., Any] | None = None
    torch_state: Mapping[str, Shaped[np.ndarray, "..."]] | None = None


@dataclass
class Verification:
    """What came of it.

    Attributes:
        subject: what was verified.
        settings: how.
        plan: batches that are compared, and which implementations are proved at them; None before they are.
        heats: of each capsule layer.
        checks: all of them, in the order in which what is compared depends on each other.
        cause: of the first divergence, in words; None if there is none.
        notes: what else is to be told, in sentences.
    """

    subject: Subject
    settings: Settings
    plan: Plan | None = None
    heats: list[Heat] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    cause: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def first_divergence(self) -> Check | None:
        """The first check that differs."""
        return next((check for check in self.checks if check.verdict == DIFFERS), None)

    @property
    def without_power(self) -> dict[str, list[str]]:
        """What could not be seen, by the reason: names of checks, and of layers whose routing hardly matters."""
        found: dict[str, list[str]] = {}
        for check in self.checks:
            if check.verdict == NO_POWER:
                found.setdefault(check.reason.partition(",")[0], []).append(check.name)
        for number, layer in enumerate(self.heats):
            if not (layer.hot or (layer.moderate and layer.unevenness < EVEN)):
                found.setdefault("no scale makes routing matter", []).append(f"capsule layer {number}")
        return found

    @property
    def status(self) -> int:
        """0 if both sides agree, 1 if they differ, 2 if not all could be compared."""
        return 1 if self.first_divergence else 2 if self.without_power or not self.checks else 0


def verify(
    subject: Subject,
    settings: Settings,
    *,
    mutate: Callable[[Pair], AbstractContextManager[None]] | None = None,
    optimizer: Callable[[float], optax.GradientTransformation] = optax.adam,
    only_first: bool = False,
) -> Verification:
    """Compares every value and gradient, in every implementation, and then training.

    Args:
        subject: the model.
        settings: how.
        mutate: makes the JAX side wrong for as long as the context lasts.
        optimizer: of JAX, given the learning rate.
        only_first: end with the first check that differs.

    Raises:
        UsageError: the two sides cannot be made, or have not the same weights.
    """
    verification = Verification(subject, settings)
    with both_on(settings.device, settings.dtype):
        verification.plan = plan_of(subject.run, settings)
        pair = pair_of(subject.run, settings, state=subject.state)
        for compared in _weights(subject, settings):
            _add(verification, compared)
        verification.heats = heat(pair)
        with nullcontext() if mutate is None else mutate(pair):
            for compared in _values_and_steps(pair, verification.plan, settings, optimizer):
                _add(verification, compared)
                if only_first and compared.check.verdict == DIFFERS:
                    break
    return verification


class Compared(NamedTuple):
    """A check, and what was compared.

    Attributes:
        check: what came of it.
        actual: of JAX, if it is kept.
        expected: of PyTorch, if it is kept.
        new: layers and their implementations, if this is the first batch that they are compared at, and not the first.
    """

    check: Check
    actual: np.ndarray | None = None
    expected: np.ndarray | None = None
    new: Sequence[Layer] = ()


def _add(verification: Verification, compared: Compared) -> None:
    check, actual, expected, new = compared
    verification.checks.append(check)
    if check.verdict != DIFFERS or verification.cause is not None:
        return
    if actual is None or expected is None:
        verification.cause = usual_cause(check.name)
    else:
        state = verification.subject.state or {}
        verification.cause = mixed_up(check.name, expected, state) or cause(check.name, actual, expected)
    if new:  # and all agrees where others compute the same
        verification.cause = f"in {in_words(new)}: {verification.cause}"


def plan_of(run: Run, settings: Settings) -> Plan:
    """The batches at which the model of a run is compared."""
    dtype = settings.dtype  # of the products, by which a convolution is chosen
    model = nnx.eval_shape(lambda: CapsNet.from_config(run.config.model, param_dtype=dtype, rngs=nnx.Rngs(0)))
    training_size = run.config.training.batch_size
    return plan(model, settings.device, only=settings.batch_size, training_size=training_size)


def pair_of(run: Run, settings: Settings, *, state: StateDict | None = None) -> Pair:
    """Both sides of the model of a run, of these weights if there are any, and the first batch."""
    return new_pair(
        settings.dtype,
        run.config.model,
        run.config.training,
        labels_per_image=run.labels_per_image,
        batch_size=settings.batch_size or FIRST,
        seed=settings.seed,
        state=state,
        torch_state=settings.torch_state,
        torch_routing=settings.torch_routing,
    )


def _weights(subject: Subject, settings: Settings) -> Iterator[Compared]:
    """Weights that the two sides have from different files, which must be equal to the last bit."""
    if subject.state is None or settings.torch_state is None:
        return
    for name, expected in settings.torch_state.items():
        actual, wanted = subject.state[name].astype("float64"), expected.astype("float64")
        yield Compared(compare(f"weight {name}", actual, wanted, tolerance=0.0, floor=-1.0), actual, wanted)


def _values_and_steps(
    pair: Pair, plan: Plan, settings: Settings, optimizer: Callable[[float], optax.GradientTransformation]
) -> Iterator[Compared]:
    theirs: dict[int, dict[str, np.ndarray]] = {}
    for batch in plan.batches:
        on_batch = with_batch(pair, batch.size, seed=settings.seed)
        if batch.size not in theirs:
            theirs[batch.size] = in_torch(on_batch)
        compared = _values(on_batch, batch.platform, theirs[batch.size], settings)
        if batch == plan.batches[0]:
            yield from compared
            continue
        for one in compared:
            yield one._replace(check=one.check._replace(name=f"{one.check.name}, {batch}"), new=plan.new(batch))
    on_batch = with_batch(pair, plan.for_training.size, seed=settings.seed)
    for check in trajectory(on_batch, settings.steps, learning_rate=settings.learning_rate, optimizer=optimizer):
        yield Compared(check)


def _values(
    pair: Pair, platform: str | None, theirs: Mapping[str, np.ndarray], settings: Settings
) -> Iterator[Compared]:
    def computed(pair: Pair) -> dict[str, np.ndarray]:
        with as_on(platform):
            return in_jax(pair)

    ours = computed(pair)
    moved: list[dict[str, np.ndarray]] = []
    for name, expected in theirs.items():
        tolerance = tolerance_of(name, settings.dtype, settings.device)
        # In bfloat16 some ReLU turn, which single gradients show in full.
        measure = partial(compare, name, tolerance=tolerance, euclidean=settings.dtype == "bfloat16")
        check = measure(ours[name], expected)
        if check.verdict == DIFFERS and check.error < VISIBLE:
            moved = moved or [computed(jittered(pair, seed)) for seed in range(JITTERS)]
            check = _as_far_as_rounding_tells(check, [measure(values[name], ours[name]).error for values in moved])
        yield Compared(check, ours[name], expected)


def _as_far_as_rounding_tells(check: Check, jitters: Sequence[float]) -> Check:
    """Without power, if rounding errors of weights and images alone move the values as far."""
    if check.error > ADDED_UP * max(jitters):
        return check
    reason = f"moved as far by rounding errors alone, by {max(jitters):.1e}"
    return check._replace(verdict=NO_POWER, reason=reason)
