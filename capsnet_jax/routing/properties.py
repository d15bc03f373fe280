"""Checks of the properties that every routing algorithm must have, for registered algorithms and your own.

A check is a function of a `Subject`, the compiled algorithm, and a `Case`, the input to try it on. It raises `Finding`
if the property does not hold. The first line of its docstring states the property.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from capsnet_jax.capsules import Routed
from capsnet_jax.errors import UsageError, in_words
from capsnet_jax.routing.registry import Routing, get_routing

INPUTS, OUTPUTS, IN_SIZE, OUT_SIZE = 11, 5, 4, 6  # all different, so that swapped axes are noticed
BATCH = 3
# Fractions of the largest value. Over 200 cases of the registered algorithms, with votes of 0.1 to 3 times a standard
# normal plus -1 to 1, the rounding error in float32 is at most 1.4e-5. Small steps in float64 are off by 7e-5, and by
# 2e-2 or more if something is rounded to float32.
TOLERANCE = 1e-4
STEP, STEP_TOLERANCE = 1e-7, 1e-3
ROUNDING = 1e-5  # by which couplings may sum to more than 1, and activations exceed 1
FACTORS = (0, 1e-30, 1e-10, 1e5, 1e10)


class Finding(Exception):
    """A property does not hold; the message says what was found and what is expected."""


class Case(NamedTuple):
    """Input of a routing algorithm: one example, or a batch with a leading axis on all but the weights.

    Attributes:
        votes: votes of the input capsules.
        activations: activations of the input capsules.
        poses: poses of the input capsules.
        weights: values of the learned weights, by name.
    """

    votes: Float[Array, "*batch i o h"]
    activations: Float[Array, "*batch i"]
    poses: Float[Array, "*batch i d"]
    weights: dict[str, Array]


class Subject:
    """A routing algorithm under test; values and gradients are compiled once per shape and dtype."""

    def __init__(self, routing: Routing):
        self.routing = routing
        self.route = jax.jit(self.call)
        self.route_batch = jax.jit(self.call_batch)
        self.route_positions = jax.jit(lambda case: self.call(case, softmax=_over_positions))
        self.gradients = jax.jit(jax.grad(lambda case: _readout(self.call(case))))
        self.gradients_batch = jax.jit(jax.grad(lambda case: _readout(self.call_batch(case))))

    def call(self, case: Case, **given: Any) -> Routed:
        """Route one example without compilation."""
        return self.routing(case.votes, case.activations, poses=case.poses, **case.weights, **given)

    def call_batch(self, case: Case) -> Routed:
        """Route a batch, as a layer does."""
        *arrays, weights = case
        return jax.vmap(lambda *arrays: self.call(Case._make([*arrays, weights])))(*arrays)


Check = Callable[[Subject, Case], None]


def draw_case(
    routing: Routing,
    seed: int,
    *,
    inputs: int = INPUTS,
    batch: tuple[int, ...] = (),
    scale: float = 1.0,
    offset: float = 0.0,
) -> Case:
    """Draw random input in float32: normal votes of this scale and offset, activations in [0, 1], poses and weights."""
    rng = np.random.default_rng(seed)
    sizes = {"i": inputs, "o": OUTPUTS, "d": IN_SIZE, "h": OUT_SIZE}

    def normal(*shape: int) -> Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return Case(
        votes=scale * normal(*batch, inputs, OUTPUTS, OUT_SIZE) + offset,
        activations=jnp.asarray(rng.uniform(size=(*batch, inputs)), jnp.float32),
        poses=normal(*batch, inputs, IN_SIZE),
        weights={
            name: weight.initial + 0.3 * normal(*(sizes[axis] for axis in weight.axes))
            for name, weight in routing.weights.items()
        },
    )


def result(subject: Subject, case: Case) -> None:
    """It returns Routed(poses, activations, couplings), with the right shapes and the dtype of the votes."""
    _expect_dtype(subject.call(case), case)  # `Routing` checks the type and the shapes


def repeatable(subject: Subject, case: Case) -> None:
    """It returns the same result when called twice with the same input."""
    _compare("The second call", subject.call(case), subject.call(case), tolerance=0.0)


def compiled(subject: Subject, case: Case) -> None:
    """It returns the same result with and without jax.jit."""
    _compare("The function under jax.jit", subject.route(case), subject.call(case))


def couplings(subject: Subject, case: Case) -> None:
    """With initial weights, couplings are not negative, and those of an input capsule sum to at most 1."""
    case = _with_initial_weights(subject, case)
    # A softmax over the wrong axis shows with few input capsules: each then sends much more than 1.
    for inputs in (INPUTS, 2):
        shares = np.asarray(subject.route(_pick(subject, case, "i", np.arange(inputs))).couplings)
        for i, (smallest, total) in enumerate(zip(shares.min(axis=1), shares.sum(axis=1), strict=True)):
            capsule = f"With {inputs} input capsules, capsule {i} sends"
            if not np.isfinite(total):
                raise Finding(f"{capsule} {total} in all; expected finite shares.")
            if smallest < 0:
                raise Finding(f"{capsule} {smallest:.3g} to an output capsule; expected shares of 0 or more.")
            if total > 1 + ROUNDING:
                raise Finding(f"{capsule} {total:.3g} to the output capsules in all; expected shares that sum to 1.")


def activations(subject: Subject, case: Case) -> None:
    """Activations are in [0, 1]."""
    for o, activation in enumerate(np.asarray(subject.route(case).activations)):
        if not 0 <= activation <= 1 + ROUNDING:
            raise Finding(f"The activation of output capsule {o} is {activation:.3g}; expected 0 to 1.")


def order_of_inputs(subject: Subject, case: Case) -> None:
    """Permuting the input capsules permutes their couplings, and changes nothing else."""
    order = np.random.default_rng(2).permutation(INPUTS)
    routed = subject.route(case)
    expected = routed._replace(couplings=routed.couplings[order])
    _compare("With inputs in another order", subject.route(_pick(subject, case, "i", order)), expected)


def order_of_outputs(subject: Subject, case: Case) -> None:
    """Permuting the output capsules permutes all results."""
    order = np.random.default_rng(3).permutation(OUTPUTS)
    routed = subject.route(case)
    expected = Routed(routed.poses[order], routed.activations[order], routed.couplings[:, order])
    _compare("With outputs in another order", subject.route(_pick(subject, case, "o", order)), expected)


def batch(subject: Subject, case: Case) -> None:
    """Under jax.vmap, an example gets the same result as alone, whatever the other examples are."""

    def first_of_batch(mate: float) -> Routed:
        stacked = [jnp.stack([array, mate * array, mate**2 * array]) for array in case[:3]]
        return Routed(*(array[0] for array in subject.route_batch(Case._make([*stacked, case.weights]))))

    _compare("An example under jax.vmap", first_of_batch(0.5), subject.route(case))
    _compare("An example whose batch changes", first_of_batch(0.3), first_of_batch(0.5), tolerance=0.0)


def positions(subject: Subject, case: Case) -> None:
    """With an argument softmax, one call for several positions returns the same as a call for each."""
    if subject.routing.takes("softmax"):
        both = _at_two_positions(case)
        _compare("One call for two positions", subject.route(both), subject.route_batch(both))


def parents(subject: Subject, case: Case) -> None:
    """With an argument softmax, an input's couplings sum to at most 1 over all positions, after the first iteration."""
    if subject.routing.takes("softmax") and dict(subject.routing.options).get("num_iterations") != 1:
        both = _at_two_positions(_with_initial_weights(subject, case))
        for i, total in enumerate(np.asarray(subject.route_positions(both).couplings).sum(axis=(0, 2))):
            if not total <= 1 + ROUNDING:
                sent = f"Capsule {i} sends {total:.3g} to its parents at two positions in all"
                raise Finding(f"{sent}; expected shares of the argument softmax, which sum to 1.")


def finite(subject: Subject, case: Case) -> None:
    """Values and gradients are finite for votes of 0 and of 1e-30 to 1e10, and for activations or poses of 0."""
    tried = {f"votes times {factor:g}": case._replace(votes=factor * case.votes) for factor in FACTORS}
    tried["activations of 0"] = case._replace(activations=jnp.zeros_like(case.activations))
    tried["poses of 0"] = case._replace(poses=jnp.zeros_like(case.poses))
    for words, extreme in tried.items():
        gradients = subject.gradients(extreme)._asdict()
        gradients |= gradients.pop("weights")
        arrays: dict[str, Array] = subject.route(extreme)._asdict()
        arrays |= {f"gradient of {name}": array for name, array in gradients.items()}
        for name, array in arrays.items():
            if wrong := int(np.sum(~np.isfinite(array))):
                raise Finding(f"With {words}, {name}: {wrong} of {array.size} values are NaN or infinite.")


def float32(subject: Subject, case: Case) -> None:
    """It returns the same in float32 as in float64, to 0.0001 of the largest value."""
    single = subject.route(case)
    with jax.enable_x64(True):
        _compare("float32", single, subject.route(to_float64(case)))


def float64(subject: Subject, case: Case) -> None:
    """In float64, no intermediate value is rounded to float32."""
    with jax.enable_x64(True):
        case = to_float64(case)
        start = subject.route(case)
        _expect_dtype(start, case)
        # Small steps change a smooth function in proportion; a value rounded to float32 stays the same, and then jumps.
        step = STEP * jnp.abs(case.votes).max() * np.random.default_rng(4).normal(size=case.votes.shape)
        one, two = (subject.route(case._replace(votes=case.votes + n * step)) for n in (1, 2))
        for name, at_start, at_one, at_two in zip(Routed._fields, start, one, two, strict=True):
            far = np.abs(at_two - at_start).max()
            error = np.abs(at_two - at_start - 2 * (at_one - at_start)).max()
            # Changes of a few units in the last place are not informative.
            if error > STEP_TOLERANCE * far + 1e-13 * np.abs(at_start).max():
                raise Finding(
                    f"{name} jump when the votes change by {STEP:.0e} in float64; expected a smooth change: is "
                    f"something converted to float32?"
                )


CHECKS: tuple[Check, ...] = (
    *(result, repeatable, compiled, couplings, activations, order_of_inputs, order_of_outputs),
    *(batch, positions, parents, finite, float32, float64),
)


class Outcome(NamedTuple):
    """The outcome of one check.

    Attributes:
        name: name of the check.
        promise: the property that it checks.
        status: "ok", "FAILED" or "not run".
        finding: what failed, or why the check was not run; empty if the property holds.
    """

    name: str
    promise: str
    status: str
    finding: str


def check_routing(
    routing: str | Callable[..., Routed] | Routing,
    *,
    num_iterations: int = 3,
    extra_checks: Sequence[Check] = (),
    seed: int = 0,
) -> list[Outcome]:
    """Run all checks on a routing algorithm.

    Args:
        routing: the algorithm, as for `get_routing`.
        num_iterations: number of iterations, for algorithms that iterate.
        extra_checks: checks to run after those in `CHECKS`.
        seed: seed of the random votes, activations, poses and weights.

    Returns:
        The outcome of each check. If the algorithm cannot be called or compiled at all, later checks are not run; any
        other failure does not stop them.

    Raises:
        UsageError: the routing is unknown or refuses its options.
    """
    subject = Subject(get_routing(routing, num_iterations=num_iterations))
    case = draw_case(subject.routing, seed)
    outcomes: list[Outcome] = []
    obstacle = ""
    for check in (*CHECKS, *extra_checks):
        status, finding = ("not run", obstacle) if obstacle else ("ok", "")
        if not obstacle:
            try:
                check(subject, case)
            except Finding as error:
                status, finding = "FAILED", str(error)
            except Exception as error:  # the user's function may raise anything
                status, finding = (
                    "FAILED",
                    str(error) if isinstance(error, UsageError) else f"It raises {in_words(error)}",
                )
                if check in (result, compiled):
                    obstacle = f"The check '{name_of(check)}' must pass first."
        outcomes.append(Outcome(name_of(check), (check.__doc__ or "").partition("\n")[0], status, finding))
    return outcomes


def name_of(check: Check) -> str:
    """The name of a check, as it is printed."""
    return check.__name__.replace("_", " ")


def verdict(routing: str, outcomes: list[Outcome]) -> str:
    """Summarize the outcomes in one sentence."""
    failed = [outcome.name for outcome in outcomes if outcome.status == "FAILED"]
    skipped = sum(outcome.status == "not run" for outcome in outcomes)
    if not failed:
        return f"{routing} passed all {len(outcomes)} checks."
    rest = f"; {skipped} were not run" if skipped else ""
    return f"{routing} failed {len(failed)} of {len(outcomes)} checks ({', '.join(failed)}){rest}."


def to_float64(case: Case) -> Case:
    """Convert a case to float64; call it under `jax.enable_x64`."""
    return jax.tree.map(lambda array: jnp.asarray(np.asarray(array), jnp.float64), case)


def compare(who: str, name: str, actual: Any, expected: Any, tolerance: float) -> None:
    """Compare arrays of one shape; the error is relative to the largest expected value.

    Raises:
        Finding: the error exceeds the tolerance, or a value is NaN or infinite.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    if not (np.isfinite(actual).all() and np.isfinite(expected).all()):
        raise Finding(f"{who}: {name} are NaN or infinite.")
    scale = np.abs(expected).max()
    error = np.abs(actual - expected).max()
    if error > tolerance * scale:
        size = f"{error / scale:.1e} of the largest value" if scale > 0 else f"{error:.1e} from zeros"
        raise Finding(f"{who}: {name} are off by {size}; tolerated: {tolerance:g}.")


def _readout(routed: Routed) -> Float[Array, ""]:
    """A sum of poses and activations with different coefficients, so that no gradients cancel."""
    outputs = jnp.concatenate([rearrange(routed.poses, "... o h -> ... (o h)"), routed.activations], axis=-1)
    return jnp.sum(outputs * jnp.cos(jnp.arange(outputs.shape[-1])))


def _with_initial_weights(subject: Subject, case: Case) -> Case:
    weights = subject.routing.weights.items()
    return case._replace(weights={name: jnp.full_like(case.weights[name], weight.initial) for name, weight in weights})


def _at_two_positions(case: Case) -> Case:
    """A convolutional layer with two positions that see the same input capsules; votes and activations differ."""
    return Case._make([*(jnp.stack([array, array[::-1]]) for array in case[:3]), case.weights])


def _over_positions(logits: Float[Array, "positions i o"]) -> Float[Array, "positions i o"]:
    return jax.nn.softmax(logits, axis=(0, 2))


def _compare(who: str, actual: Routed, expected: Routed, tolerance: float = TOLERANCE) -> None:
    for name in Routed._fields:
        compare(who, name, getattr(actual, name), getattr(expected, name), tolerance)


def _expect_dtype(routed: Routed, case: Case) -> None:
    for name, array in routed._asdict().items():
        if array.dtype != case.votes.dtype:
            raise Finding(f"{name} of {case.votes.dtype} votes are {array.dtype}; expected the dtype of the votes.")


def _pick(subject: Subject, case: Case, letter: str, indices: np.ndarray) -> Case:
    """Select these input capsules (letter i) or output capsules (letter o) of a case, in this order."""

    def pick(array: Array, axes: Sequence[str]) -> Array:
        for axis, found in enumerate(axes):
            array = jnp.asarray(np.asarray(array).take(indices, axis)) if found == letter else array
        return array

    weights = {name: pick(case.weights[name], weight.axes) for name, weight in subject.routing.weights.items()}
    return Case(pick(case.votes, "ioh"), pick(case.activations, "i"), pick(case.poses, "id"), weights)
