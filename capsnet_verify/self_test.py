"""Whether each check catches what it is there for: every mutant, and what is right, verified."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from capsnet_verify import fused_routing, routings
from capsnet_verify.checks import DIFFERS, VALUES, compare
from capsnet_verify.mutants import fused, models
from capsnet_verify.mutants import routings as wrong_routings
from capsnet_verify.mutants.models import NORMALISED, PLAIN, SPECTRAL, TWO_LABELS, ModelMutant
from capsnet_verify.routings import Case, check
from capsnet_verify.verification import Settings, verify

DTYPE = "float32"  # its tolerance is the looser: what is caught there is caught in float64


class Trial(NamedTuple):
    """A mutant, or what is right.

    Attributes:
        mistake: in words.
        caught_by: the check that must be the first to catch it; None for what is right.
        run: tells the check that was.
    """

    mistake: str
    caught_by: str | None
    run: Callable[[], str | None]


def trials() -> Iterator[Trial]:
    """What is right, and every mutant: models and optimizers, routings, and dynamic routing without votes."""
    for subject in (PLAIN, TWO_LABELS, NORMALISED, SPECTRAL):
        control = ModelMutant("no mistake", "", models.right, subject)
        yield Trial(f"no mistake, {subject.title}", None, partial(caught_model, control))
    for mutant in models.MUTANTS:
        yield Trial(mutant.mistake, mutant.caught_by, partial(caught_model, mutant))
    for wrong in wrong_routings.MUTANTS:
        name = wrong.spec.split(",")[0]
        yield Trial(f"{name}: {wrong.mistake}", wrong.caught_by, partial(caught_routing, wrong))
    for unvoted in fused.MUTANTS:
        title = f"dynamic without votes: {unvoted.mistake}"
        yield Trial(title, unvoted.caught_by, partial(caught_fused, unvoted))


def caught_model(mutant: ModelMutant) -> str | None:
    """The first check that a wrong model fails; optimizers are in float64, where weights after a step are compared."""
    of_optimizer = mutant.caught_by.startswith("step")
    settings = Settings("float64" if of_optimizer else DTYPE, steps=2 if of_optimizer else 0)
    verification = verify(mutant.subject, settings, mutate=mutant.wrong, optimizer=mutant.optimizer, only_first=True)
    return next((check.name for check in verification.checks if check.verdict == DIFFERS), None)


def caught_routing(mutant: wrong_routings.Mutant) -> str | None:
    """The first result that a wrong routing is caught by."""
    case = Case(mutant.spec, 3, mutant.positions)
    return first_routing_divergence(case, mutant.function)


def first_routing_divergence(case: Case, function: Callable[..., object]) -> str | None:
    """The first result of this function that is not that of the twin of the case."""
    with jax.default_matmul_precision("highest"):
        actual, expected = routings.in_jax(case, DTYPE, function), routings.in_torch(case, DTYPE)
    checks = (check(case, name, actual[name], expected[name]) for name in expected)
    return next((found.name for found in checks if found.verdict == DIFFERS), None)


def caught_fused(mutant: fused.FusedMutant) -> str | None:
    """The first result that a wrong dynamic routing without votes is caught by."""
    return first_fused_divergence(Case(mutant.spec, 3), mutant.function)


def first_fused_divergence(case: Case, function: Callable[..., object]) -> str | None:
    """The first result of this function that is not that of the twin of the case, which has votes."""
    with jax.default_matmul_precision("highest"):
        actual, expected = fused_routing.in_jax(case, DTYPE, function), fused_routing.in_torch(case, DTYPE)
    for name in expected:
        found = compare(name, actual[name], np.asarray(expected[name]), tolerance=VALUES[DTYPE], floor=1e-4)
        if found.verdict == DIFFERS:
            return name
    return None


def self_test(tell: Callable[[str], None] = print) -> int:
    """Runs every trial and tells a line of each; returns 1 if one was not caught by the check that should, else 0."""
    failed = caught = 0
    for trial in trials():
        found = trial.run()
        right = found == trial.caught_by
        failed += not right
        caught += trial.caught_by is not None and found is not None
        expected = "" if right else f"; expected {trial.caught_by or 'nothing'}"
        tell(f"{'ok' if right else 'FAILED':6} {found or 'not caught':60} {trial.mistake}{expected}")
    total = sum(trial.caught_by is not None for trial in trials())
    sentence = "each by the check that should" if not failed else f"{failed} trials went wrong"
    tell(f"{caught} of {total} mutants were caught, {sentence}.")
    return int(failed > 0)
