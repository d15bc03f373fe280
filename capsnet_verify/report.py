"""Format verifications as tables, sentences and JSON."""

import math
from collections.abc import Sequence
from typing import Any

from capsnet_jax.tables import markdown_table
from capsnet_verify.checks import DIFFERS, INHERITS, Check
from capsnet_verify.foreign_module import listed
from capsnet_verify.implementations import in_words
from capsnet_verify.scaling import Scaling
from capsnet_verify.values import AT_REST
from capsnet_verify.verification import Verification

GROUPS = ("values", "gradients", "steps")
"""Columns of a summary; the first is for the checks whose names begin with neither "gradient" nor "step"."""


def describe(verification: Verification) -> str:
    """Format a table of all checks, how layers were scaled, which implementations were compared, and a verdict."""
    rows = [("check", "scale", "error", "tolerance", "verdict")]
    rows += [
        (check.name, number(check.scale), number(check.error), f"{check.tolerance:g}", check.verdict)
        for check in verification.checks
    ]
    return "\n\n".join([markdown_table(rows), *paragraphs(verification), sentence(verification)])


def paragraphs(verification: Verification) -> list[str]:
    """Say how layers were scaled, which implementations were compared, which values differ alone, and all notes."""
    scaled = [
        f"The weight of capsule layer {layer} was multiplied by {found.factor:g} in both models, so that routing "
        f"matters: mean activation {found.activation:.2f}, couplings up to {100 * found.unevenness:.0f} % from even."
        for layer, found in enumerate(verification.scalings)
        if found.factor != 1
    ]
    parts = (scaled, _compared(verification), _isolated(verification))
    return ["\n".join(lines) for lines in parts if lines] + verification.notes


def summarize(verifications: Sequence[Verification]) -> str:
    """Format a row for each verification with its largest errors, and a sentence for each that does not agree."""
    rows: list[Sequence[str]] = [("model", "dtype", *GROUPS, "factors", "verdict"), *map(row, verifications)]
    others = [
        f"{verification.subject.title}, {verification.settings.dtype}: {sentence(verification)}"
        for verification in verifications
        if verification.status
    ]
    agreed = f"{len(verifications) - len(others)} of {len(verifications)} agree."
    return "\n\n".join([markdown_table(rows), *others, agreed])


def row(verification: Verification) -> tuple[str, ...]:
    """Return the cells of one verification in a summary."""
    worst = [number(error) for error in largest_errors(verification).values()]
    factors = " ".join(f"{found.factor:g}" for found in verification.scalings)
    return verification.subject.title, verification.settings.dtype, *worst, factors, verification.verdict


def sentence(verification: Verification) -> str:
    """State agreement, or the first divergence and its likely cause, or the checks that proved nothing."""
    title, total = verification.subject.title, len(verification.checks)
    first = verification.first_divergence
    if first is not None:
        return f"JAX and PyTorch differ, first in {first.name} ({first.reason}). Most likely: {verification.cause}."
    if verification.without_power:
        names = "; ".join(f"{', '.join(of)} ({why})" for why, of in verification.without_power.items())
        return f"JAX and PyTorch agree in what could be compared, but these checks prove nothing: {names}."
    errors = ", ".join(
        f"{name} within {error:.1e}" for name, error in largest_errors(verification).items() if not math.isnan(error)
    )
    return f"JAX and PyTorch agree in all {total} checks of {title}: {errors}, as fractions of the largest value."


def largest_errors(verification: Verification) -> dict[str, float]:
    """Return the largest scale-relative error of each group of checks; NaN for an empty group."""
    errors: dict[str, list[float]] = {name: [] for name in GROUPS}
    for check in verification.checks:
        errors[next((name for name in GROUPS if check.name.startswith(name[:-1])), GROUPS[0])].append(check.error)
    return {name: max(found, default=math.nan) for name, found in errors.items()}


def to_json(verification: Verification) -> dict[str, Any]:
    """Convert a verification to JSON types; numbers that are not finite become None."""
    settings, plan, first = verification.settings, verification.plan, verification.first_divergence
    options = ("dtype", "device", "steps", "learning_rate", "batch_size", "seed")
    batches = [] if plan is None else plan.batches
    return {
        "model": verification.subject.title,
        **{name: getattr(settings, name) for name in options},
        "status": verification.status,
        "sentence": sentence(verification),
        "first_divergence": None if first is None else first.name,
        "cause": verification.cause,
        "without_power": verification.without_power,
        "notes": verification.notes,
        "batches": [batch._asdict() | {"platform": batch.platform or settings.device} for batch in batches],
        "unproved": [] if plan is None else [list(layer) for layer in plan.unproved],
        "capsule_layers": [_in_json(found) for found in verification.scalings],
        "checks": [_in_json(check) for check in verification.checks],
    }


def _compared(verification: Verification) -> list[str]:
    """List the implementations that were compared, each with the first batch that uses it, and those that were not."""
    if verification.plan is None:
        return []
    verb = "compared" if verification.status else "proved"
    batches, unproved = verification.plan
    new = "; ".join(f"at a {batch}, {in_words(verification.plan.new(batch))}" for batch in batches)
    lines = [f"{verb.capitalize()} {new}."]
    if unproved:
        lines.append(f"Not {verb}, as other batch sizes or platforms have them: {in_words(unproved)}.")
    return lines


def _isolated(verification: Verification) -> list[str]:
    """Say which values differ even if the layers below do not, and how many only inherit an error."""
    fed = [check for check in verification.checks if not check.name.startswith(("weight", "step", AT_REST))]
    differ = [check.name for check in fed if check.verdict == DIFFERS]
    inherit = sum(check.verdict == INHERITS for check in fed)
    if len(differ) + inherit < 2:
        return []
    values = [name for name in differ if not name.startswith("gradient")]
    num = len(differ) - len(values)
    names = ([listed(values)] if values else []) + ([f"{num} gradient{'s' * (num > 1)}"] if num else [])
    others = "1 other agrees" if inherit == 1 else f"{inherit} others agree"
    return [f"Fed PyTorch's values of the layers below, these still differ: {' and '.join(names) or 'none'}; {others}."]


def number(value: float) -> str:
    """Format an error or a scale; "-" if it is not finite."""
    return f"{value:.1e}" if math.isfinite(value) else "-"


def _in_json(found: Check | Scaling) -> dict[str, Any]:
    values = [(name, value) for name, value in found._asdict().items() if name != "histogram"]
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values}
