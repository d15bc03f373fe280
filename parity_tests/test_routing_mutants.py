"""Every wrong routing must be caught, and by the first result that can see what is wrong with it."""

import pytest

from capsnet_jax.routing import ROUTINGS
from capsnet_verify.mutants.mistakes import copied
from capsnet_verify.mutants.routings import MUTANTS
from capsnet_verify.routings import Case
from capsnet_verify.self_test import caught_routing, first_routing_divergence


@pytest.mark.parametrize(
    ("spec", "positions"), dict.fromkeys((mutant.spec, mutant.positions) for mutant in MUTANTS), ids=str
)
def test_the_right_routing_is_not_caught(spec, positions):
    assert first_routing_divergence(Case(spec, 3, positions), copied(ROUTINGS[spec.split(",")[0]])) is None


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_wrong_routing_is_caught(mutant):
    assert caught_routing(mutant) == mutant.caught_by


def test_every_routing_has_a_mutant():
    assert {mutant.spec.split(",")[0] for mutant in MUTANTS} == set(ROUTINGS)
