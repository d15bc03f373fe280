"""What was verified, in tables and a plain sentence, and as JSON."""

import math
from collections.abc import Sequence
from typing import Any

from capsnet_jax.tables import markdown_table
from capsnet_verify.checks import Check
from capsnet_verify.heat import Heat
from capsnet_verify.implementations import in_words
from capsnet_verify.verification import Verification

GROUPS = {"values": (), "gradients": ("gradient",), "steps": ("step",)}
"""Columns of a summary, by the first word of a check; any other check is of a value."""


def describe(verification: Verification) -> str:
    """Every check in a row, and what is to be said of all of them."""
    rows = [("check", "scale", "error", "tolerance", "verdict")]
    rows += [
        (check.name, _number(check.scale), _number(check.error), f"{check.tolerance:.0e}", check.verdict)
        for check in verification.checks
    ]
    heats, batches = _of_heats(verification.heats), _of_batches(verification)
    said = [*heats, *batches, *verification.notes, sentence(verification)]
    return "\n\n".join([markdown_table(rows), *said])


def summarize(verifications: Sequence[Verification]) -> str:
    """A row for each, with the largest errors; and a sentence of those that do not agree."""
    rows: list[Sequence[str]] = [("model", "dtype", *GROUPS, "factors", "verdict"), *map(row, verifications)]
    others = [
        f"{verification.subject.title}, {verification.settings.dtype}: {sentence(verification)}"
        for verification in verifications
        if verification.status
    ]
    agreed = sum(verification.status == 0 for verification in verifications)
    return "\n\n".join([markdown_table(rows), *others, f"{agreed} of {len(verifications)} agree."])


def row(verification: Verification) -> tuple[str, ...]:
    """The cells of one verification in a summary."""
    worst = [_number(error) for error in largest_errors(verification).values()]
    factors = " ".join(f"{found.factor:g}" for found in verification.heats)
    verdict = ("agrees", "DIFFERS", "not seen")[verification.status]
    return verification.subject.title, verification.settings.dtype, *worst, factors, verdict


def sentence(verification: Verification) -> str:
    """Agreement, or the first divergence and its usual cause, or what could not be seen."""
    title, number = verification.subject.title, len(verification.checks)
    first = verification.first_divergence
    if first is not None:
        return f"JAX and PyTorch differ, first in {first.name} ({first.reason}). Most likely: {verification.cause}."
    if verification.without_power:
        names = "; ".join(f"{why}: {', '.join(of)}" for why, of in verification.without_power.items())
        return f"JAX and PyTorch agree in what could be seen. These checks had no power. {names}."
    errors = ", ".join(
        f"{name} within {error:.1e}" for name, error in largest_errors(verification).items() if not math.isnan(error)
    )
    return f"JAX and PyTorch agree in all {number} checks of {title}: {errors}, as fractions of the largest value."


def largest_errors(verification: Verification) -> dict[str, float]:
    """The largest scale-relative error of each group of checks; NaN for none."""
    errors = dict.fromkeys(GROUPS, math.nan)
    for check in verification.checks:
        of = next((name for name, words in GROUPS.items() if words and check.name.startswith(words)), "values")
        errors[of] = check.error if math.isnan(errors[of]) else max(errors[of], check.error)
    return errors


def to_json(verification: Verification) -> dict[str, Any]:
    """All of it in types that JSON has; numbers that are not finite are None."""
    first = verification.first_divergence
    options = {
        name: getattr(verification.settings, name)
        for name in ("dtype", "device", "steps", "learning_rate", "batch_size", "seed")
    }
    return {
        "model": verification.subject.title,
        **options,
        "status": verification.status,
        "sentence": sentence(verification),
        "first_divergence": None if first is None else first.name,
        "cause": verification.cause,
        "without_power": verification.without_power,
        "notes": verification.notes,
        **_plan_in_json(verification),
        "capsule_layers": [_in_json(found) for found in verification.heats],
        "checks": [_in_json(check) for check in verification.checks],
    }


def _of_heats(heats: Sequence[Heat]) -> list[str]:
    scaled = [
        f"The weight of capsule layer {number} was multiplied by {found.factor:g} on both sides, so that routing "
        f"matters: mean activation {found.activation:.2f}, couplings up to {100 * found.unevenness:.0f} % from even."
        for number, found in enumerate(heats)
        if found.factor != 1
    ]
    return ["\n".join(scaled)] if scaled else []


def _of_batches(verification: Verification) -> list[str]:
    """Which implementations were compared at which batch, each where it is new, and which were not."""
    if verification.plan is None:
        return []
    batches, unproved = verification.plan
    verb = "compared" if verification.status else "proved"
    new = "; ".join(f"at a {batch}, {in_words(verification.plan.new(batch))}" for batch in batches)
    said = [f"{verb.capitalize()} {new}."]
    if unproved:
        said.append(f"Not {verb}, as other batch sizes or platforms have them: {in_words(unproved)}.")
    return ["\n".join(said)]


def _plan_in_json(verification: Verification) -> dict[str, Any]:
    if verification.plan is None:
        return {}
    batches = [
        {"size": batch.size, "platform": batch.platform or verification.settings.device}
        | {"implementations": dict(batch.implementations)}
        for batch in verification.plan.batches
    ]
    return {"batches": batches, "unproved": [list(layer) for layer in verification.plan.unproved]}


def _number(value: float) -> str:
    return f"{value:.1e}" if math.isfinite(value) else "-"


def _in_json(found: Check | Heat) -> dict[str, Any]:
    values = found._asdict().items()
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values}
