"""Test the checks: the right check must catch every mutant, and no check may fail for right models."""

from collections.abc import Callable

from capsnet_verify.mutants import MUTANTS, NORMALIZED, PLAIN, SPECTRAL, TWO_LABELS, Mutant
from capsnet_verify.routings import Case, first_divergence
from capsnet_verify.subjects import Settings
from capsnet_verify.verification import verify

DTYPE = "float32"  # its tolerance is the looser one: what is caught in float32 is caught in float64
CONTROLS = [Mutant(subject, f"no mistake, {subject.title}") for subject in (PLAIN, TWO_LABELS, NORMALIZED, SPECTRAL)]


def caught(mutant: Mutant) -> str | None:
    """Return the name of the first check that a mutant fails, or None."""
    if isinstance(mutant.subject, Case):
        with mutant.planted():
            return first_divergence(mutant.subject, DTYPE)
    steps = (mutant.caught_by or "").startswith("step")
    # Weights after a training step are compared in float64 only.
    settings = Settings("float64", steps=2, batch_size=3) if steps else Settings(DTYPE, steps=0)
    first = verify(mutant.subject, settings, mistake=mutant.planted(), only_first=True).first_divergence
    return None if first is None else first.name


def self_test(tell: Callable[[str], None] = print) -> int:
    """Run every mutant and report each in a line; return 1 if one was not caught by the right check, else 0."""
    failed = num_caught = 0
    for mutant in [*CONTROLS, *MUTANTS]:
        found = caught(mutant)
        failed += found != mutant.caught_by
        num_caught += mutant.caught_by is not None and found is not None
        expected = "" if found == mutant.caught_by else f"; expected {mutant.caught_by or 'nothing'}"
        tell(f"{'FAILED' if expected else 'ok':6} {found or 'not caught':60} {mutant.mistake}{expected}")
    sentence = "each by the right check" if not failed else f"{failed} trials went wrong"
    tell(f"{num_caught} of {len(MUTANTS)} mutants were caught, {sentence}.")
    return int(failed > 0)
