"""The property checks pass for all routing algorithms on random input, and each catches its mistake."""

import functools

import jax
import jax.numpy as jnp
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from capsnet_jax.capsules import Routed
from capsnet_jax.ops import capsule_norm, squash
from capsnet_jax.routing import ROUTINGS, get_routing
from capsnet_jax.routing.properties import (
    CHECKS,
    Finding,
    Subject,
    activations,
    batch,
    check_routing,
    compiled,
    couplings,
    draw_case,
    finite,
    float32,
    float64,
    name_of,
    order_of_inputs,
    order_of_outputs,
    parents,
    positions,
    repeatable,
    result,
)

# The couplings of random routing depend on the index of a capsule.
BROKEN_PROMISES = {"random": {"order of inputs", "order of outputs"}}

CASES = st.tuples(st.integers(0, 2**32 - 1), st.floats(0.1, 3), st.floats(-1, 1))  # seed, scale, offset


@functools.cache  # compiled once, not for each example
def subject_of(name: str, num_iterations: int) -> Subject:
    return Subject(get_routing(name, num_iterations=num_iterations))


@pytest.mark.parametrize("name", ROUTINGS)
@settings(derandomize=True, deadline=None, max_examples=3, database=None, phases=[Phase.generate])  # no shrinking
@given(case=CASES)
def test_every_routing_has_the_properties(name, case):
    """With two iterations, the least that have a step from one to the next; compiling takes most of the time."""
    check_properties(name, 2, *case)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ROUTINGS)
@settings(derandomize=True, deadline=None, max_examples=30, database=None, phases=[Phase.generate])
@given(case=CASES)
def test_every_routing_has_the_properties_in_many_cases(name, case):
    check_properties(name, 3, *case)


def check_properties(name, num_iterations, seed, scale, offset):
    subject = subject_of(name, num_iterations)
    case = draw_case(subject.routing, seed, scale=scale, offset=offset)
    findings = {}
    for check in CHECKS:
        try:
            check(subject, case)
        except Finding as finding:
            findings[name_of(check)] = str(finding)
    assert findings.keys() == BROKEN_PROMISES.get(name, set()), findings


def route(votes, couplings):
    """The correct last step of most of the routings below."""
    poses = squash(jnp.einsum("io,ioh->oh", couplings, votes))
    return Routed(poses, capsule_norm(poses), couplings)


def agreement(votes):
    return jnp.einsum("ioh,oh->io", votes, squash(votes.mean(axis=0)))


def over_outputs(votes):
    return jax.nn.softmax(agreement(votes), axis=1)


def faultless(votes, activations):
    return route(votes, over_outputs(votes))


def softmax_over_inputs(votes, activations):
    return route(votes, jax.nn.softmax(agreement(votes), axis=0))


def negative_couplings(votes, activations):
    return route(votes, 2 * over_outputs(votes) - 1 / votes.shape[1])


@jax.custom_batching.custom_vmap
def less_the_batch_mean(votes):
    return votes


@less_the_batch_mean.def_vmap
def _(size, batched, votes):
    return votes - 0.5 * votes.mean(axis=0), True


def batch_mean(votes, activations):
    votes = less_the_batch_mean(votes)
    return route(votes, over_outputs(votes))


def batch_axis(votes, activations):
    return route(jax.lax.pmean(votes, "batch"), over_outputs(votes))


def plain_norm(votes, activations):
    routed = route(votes, over_outputs(votes))
    return routed._replace(activations=jnp.linalg.norm(routed.poses, axis=-1))


def transposed(votes, activations):
    routed = route(votes, over_outputs(votes))
    return routed._replace(poses=routed.poses.T)


def not_a_routed(votes, activations):
    return {"poses": votes.sum(axis=0)}


def long_activations(votes, activations):
    return Routed(votes.sum(axis=0), capsule_norm(votes.sum(axis=0)), over_outputs(votes))


def numbered_inputs(votes, activations):
    return route(votes, over_outputs(votes) * jnp.cos(jnp.arange(len(votes), dtype=votes.dtype))[:, None] ** 2)


def numbered_outputs(votes, activations):
    return route(votes, over_outputs(votes) / jnp.arange(1, votes.shape[1] + 1, dtype=votes.dtype))


def half_precision(votes, activations):
    return jax.tree.map(lambda array: array.astype(jnp.float16), route(votes, over_outputs(votes)))


def single_precision(votes, activations):
    return route(votes, over_outputs(votes).astype(jnp.float32).astype(votes.dtype))


def in_float32(votes, activations):
    return faultless(votes.astype(jnp.float32), activations)


def cancelling(votes, activations):
    far = 1e5 * votes.max()  # a constant would be cancelled by the compiler
    return faultless((votes + far) - far, activations)


calls = []


def stateful(votes, activations):
    calls.append(1)
    return route(votes, over_outputs(votes) / len(calls))


def tracing(votes, activations):
    return route(votes, over_outputs(votes) / (2 if isinstance(votes, jax.core.Tracer) else 1))


def branching(votes, activations):
    return route(votes, over_outputs(votes) if votes.sum() > 0 else 0.5 * over_outputs(votes))


def raising(votes, activations):
    raise RuntimeError("no luck\ntoday")


def mean_over_the_first_axis(votes, activations, *, softmax=jax.nn.softmax):
    couplings = softmax(votes[..., 0])
    poses = squash((couplings[..., None] * votes).sum(axis=-3) / len(votes))
    return Routed(poses, capsule_norm(poses), couplings)


def another_softmax(votes, activations, *, softmax=jax.nn.softmax):
    couplings = jax.nn.softmax(votes[..., 0])
    poses = squash((couplings[..., None] * votes).sum(axis=-3))
    return Routed(poses, capsule_norm(poses), couplings)


WRONG = {
    half_precision: (result, "poses of float32 votes are float16; expected the dtype of the votes"),
    stateful: (repeatable, "The second call: poses are off by"),
    tracing: (compiled, "The function under jax.jit: poses are off by"),
    softmax_over_inputs: (couplings, "With 2 input capsules, capsule 0 sends 2.0"),
    negative_couplings: (couplings, "to an output capsule; expected shares of 0 or more"),
    long_activations: (activations, "The activation of output capsule 0 is 9.6; expected 0 to 1"),
    numbered_inputs: (order_of_inputs, "With inputs in another order: poses are off by"),
    numbered_outputs: (order_of_outputs, "With outputs in another order: poses are off by"),
    batch_mean: (batch, "An example under jax.vmap: poses are off by"),
    mean_over_the_first_axis: (positions, "One call for two positions: poses are off by"),
    another_softmax: (
        parents,
        "Capsule 0 sends 2 to its parents at two positions in all; expected shares of the argument",
    ),
    plain_norm: (finite, "With votes times 0, gradient of votes: 330 of 330 values are NaN or infinite"),
    cancelling: (float32, "poses are off by"),
    single_precision: (float64, "poses jump when the votes change by 1e-07 in float64"),
    in_float32: (float64, "poses of float64 votes are float32; expected the dtype of the votes"),
}


@pytest.mark.parametrize("routing", WRONG, ids=lambda routing: routing.__name__)
def test_a_wrong_routing_fails_the_right_check(routing):
    check, words = WRONG[routing]
    subject = Subject(get_routing(routing))
    with pytest.raises(Finding) as caught:
        check(subject, draw_case(subject.routing, 0))
    assert words in str(caught.value)


def test_every_check_has_a_wrong_routing():
    assert {check for check, _ in WRONG.values()} == set(CHECKS)


def test_the_common_part_of_the_wrong_routings_is_correct():
    assert [outcome.finding for outcome in check_routing(faultless)] == [""] * len(CHECKS)


@pytest.mark.parametrize(
    ("routing", "words", "number"),
    [
        (raising, "Routing raising raises RuntimeError: no luck (test_routing_properties.py, line ", 0),
        (batch_axis, "unbound axis name: batch", 0),
        (transposed, "Routing transposed: poses are (6, 5); expected (5, 6) from votes of shape (11, 5, 6)", 0),
        (not_a_routed, "Routing not_a_routed returned dict; expected Routed(poses, activations, couplings)", 0),
        (branching, "Routing branching raises TracerBoolConversionError: Attempted boolean conversion", 2),
    ],
)
def test_checks_stop_if_the_routing_cannot_be_called_or_compiled(routing, words, number):
    outcomes = check_routing(routing)
    assert [outcome.status for outcome in outcomes] == ["ok"] * number + ["FAILED"] + ["not run"] * (12 - number)
    assert words in outcomes[number].finding
    assert outcomes[-1].finding == f"The check '{name_of(CHECKS[number])}' must pass first."


def test_a_failed_check_does_not_stop_the_others():
    outcomes = check_routing(long_activations)
    assert [outcome.name for outcome in outcomes if outcome.status != "ok"] == ["activations"]
    assert len(outcomes) == len(CHECKS)
