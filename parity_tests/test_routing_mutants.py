"""Every wrong routing must be caught, and by the first result that can see what is wrong with it.

In float32, whose tolerance is the looser: what is caught there is caught in float64.
"""

import pytest

from capsnet_jax.routing import ROUTINGS
from parity_tests.routing_mutants import MUTANTS, rewrite
from parity_tests.test_routing import Case, compare, in_jax, in_torch


def first_divergence(case: Case, function) -> str | None:
    actual, expected = in_jax(case, "float32", function), in_torch(case, "float32")
    for name in expected:
        try:
            compare(case, name, actual[name], expected[name])
        except AssertionError:
            return name
    return None


@pytest.mark.parametrize(
    ("spec", "positions"), dict.fromkeys((mutant.spec, mutant.positions) for mutant in MUTANTS), ids=str
)
def test_the_right_routing_is_not_caught(spec, positions):
    assert first_divergence(Case(spec, 3, positions), rewrite(spec.split(",")[0])) is None


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_wrong_routing_is_caught(mutant):
    assert first_divergence(Case(mutant.spec, 3, mutant.positions), mutant.function) == mutant.caught_by


def test_every_routing_has_a_mutant():
    assert {mutant.spec.split(",")[0] for mutant in MUTANTS} == set(ROUTINGS)
