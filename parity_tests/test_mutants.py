"""The right check must catch each planted mistake. `-m exhaustive` plants all of them."""

import jax
import numpy as np
import pytest

from capsnet_jax.routing import ROUTINGS
from capsnet_verify import self_test
from capsnet_verify.mutants import MUTANTS, OF_IMPLEMENTATIONS, Mutant
from capsnet_verify.routings import Case, first_divergence
from capsnet_verify.subjects import Settings
from capsnet_verify.verification import verify
from parity_tests.pairs import make_pair

# One of each kind.
ORDINARY = [
    "squash along the capsules",
    "one iteration fewer",
    "targets of two labels that sum to 1",
    "Adam with decayed weights",
    "dynamic: detaches nothing",
    "dynamic: softmax over inputs",
    "em: variance about zero",
    "variational: activations not normalized",
    "dynamic without votes: last chunk left out",
    "dynamic without votes: no gradient of the agreement",
]


def mark(mutant: Mutant) -> object:
    exhaustive = () if mutant.mistake in ORDINARY else (pytest.mark.exhaustive,)
    return pytest.param(mutant, id=str(mutant), marks=exhaustive)


@pytest.mark.parametrize("mutant", [mark(mutant) for mutant in MUTANTS])
def test_mutant_is_caught(mutant):
    assert self_test.caught(mutant) == mutant.caught_by


@pytest.mark.exhaustive
@pytest.mark.parametrize("control", self_test.CONTROLS, ids=str)
def test_right_model_is_not_caught(control):
    assert self_test.caught(control) is None


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "case", dict.fromkeys(mutant.subject for mutant in MUTANTS if isinstance(mutant.subject, Case)), ids=str
)
def test_right_routing_is_not_caught(case):
    assert first_divergence(case, self_test.DTYPE) is None


@pytest.mark.exhaustive
@pytest.mark.parametrize("mutant", OF_IMPLEMENTATIONS, ids=str)
def test_batch_of_three_cannot_show_mistakes_in_other_implementations(mutant):
    """Larger batches are compared by default because of these mistakes."""
    settings = Settings("float32", steps=0, batch_size=3)
    assert verify(mutant.subject, settings, mistake=mutant.planted()).status == 0


def test_mutants_are_listed():
    assert len(MUTANTS) == len({mutant.mistake for mutant in MUTANTS}) == 106  # as README.md and docs/parity.md say
    assert {mutant.mistake for mutant in MUTANTS} >= set(ORDINARY)
    assert {mutant.subject.name for mutant in MUTANTS if isinstance(mutant.subject, Case)} == set(ROUTINGS)


def test_planted_mistakes_are_removed_again():
    for mutant in MUTANTS:
        with mutant.planted():
            pass
    assert first_divergence(Case("dynamic"), "float32") is None


@pytest.mark.parametrize(("expected", "status"), [("couplings", 0), ("poses", 1)])
def test_self_test_fails_unless_the_right_check_catches_the_mutant(expected, status, monkeypatch):
    wrong = next(mutant for mutant in MUTANTS if mutant.mistake == "kmeans: softmax over inputs")
    monkeypatch.setattr(self_test, "CONTROLS", [])
    monkeypatch.setattr(self_test, "MUTANTS", [wrong._replace(caught_by=expected)])
    lines = []
    assert self_test.self_test(lines.append) == status
    assert lines[0].startswith("FAILED couplings" if status else "ok     couplings")


def test_self_test_fails_if_a_mutant_is_not_caught(monkeypatch):
    monkeypatch.setattr(self_test, "CONTROLS", [Mutant(Case("uniform"), "right")])
    monkeypatch.setattr(self_test, "MUTANTS", [Mutant(Case("uniform"), "unseen", "poses")])
    lines = []
    assert self_test.self_test(lines.append) == 1
    assert lines[0].startswith("ok     not caught")
    assert lines[1].startswith("FAILED not caught")
    assert lines[-1] == "0 of 1 mutants were caught, 1 trials went wrong."


def test_at_the_reference_scale_a_model_without_routing_would_pass():
    """Why layers are scaled: at a primary scale of 0.01 the usual tolerances cannot tell whether there is routing."""
    pair = make_pair("float32", primary_scale=0.01)
    right = jax.jit(lambda: pair.jax_model.encode(pair.images).poses)()
    mutant = next(mutant for mutant in MUTANTS if mutant.mistake == "no agreement update at all")
    with mutant.planted():
        without = jax.jit(lambda: pair.jax_model.encode(pair.images).poses)()
    assert not np.array_equal(without, right)
    np.testing.assert_allclose(without, right, atol=1e-5)
