"""Results, as they are printed."""

import statistics
from typing import Any

from capsnet_benchmark.results import OTHERS
from capsnet_jax.tables import markdown_table

PARTS = ("step", "stem", "primary", "votes", "routing", "decoder", "optimizer", "augmentation")
COMPARED = {
    "step": "A training step of JAX takes {} of the time of {}",
    "inference": "Inference by JAX takes {} of the time of {}",
    "routing": "Routing by JAX, forward and backward, takes {} of the time of {}",
    "epoch": "An epoch of JAX takes {} of the time of {}",
    "memory": "Training by JAX takes {} of the memory of {}",
}
BUSY = 0.5  # mean number of processes that run, over the minute before


def describe(results: dict[str, Any]) -> str:
    """Tables of rows and of parts, and a sentence for each ratio that counts."""
    texts = [markdown_table(_rows(results)), markdown_table(_parts(results))]
    sentences = [
        sentence.format(f"{results['ratios'][f'{name}_vs_{other}']:.2f}", row) + "."
        for name, sentence in COMPARED.items()
        for row, other in OTHERS.items()
        if f"{name}_vs_{other}" in results["ratios"]
    ]
    if results["limit_flops_per_second"]:
        sentences.append(
            f"The limit, by a large product of matrices in {results['precision']}: "
            f"{results['limit_flops_per_second'] / 1e9:,.0f} GFLOP/s."
        )
    sentences += [f"The {name} is extrapolated from steps and batches." for name in results["extrapolated"]]
    if (load := results["load_before"] or 0) > BUSY:
        sentences.append(
            f"The machine was busy before it began, with a load of {load:.1f}; times and ratios mean little."
        )
    sentences += [f"{row} was left out: {reason}" for row, reason in results["left_out"].items()]
    return "\n\n".join([*texts, "\n".join(sentences)]).strip()


def _rows(results: dict[str, Any]) -> list[list[str]]:
    headings = ["row", "first step s", "step ms", "quartiles", "images/s", "epoch s", "inference ms", "routing ms"]
    rows = [[*headings, "dispatch ms", "memory MB", "of the limit"]]
    for row, medians in results["median_seconds"].items():

        def milliseconds(name: str, medians: dict[str, float] = medians) -> str:
            return _number(medians.get(name), 1e3)

        rows.append(
            [
                row,
                _number(results["first_step_seconds"].get(row)),
                milliseconds("step"),
                _quartiles(results["samples_seconds"][row].get("step")),
                _number(results["images_per_second"].get(row)),
                _number(medians.get("epoch")),
                *map(milliseconds, ("inference", "routing", "dispatch")),
                _number(results["peak_memory_bytes"].get(row), 1e-6),
                _number(results["fraction_of_limit"].get(row)),
            ]
        )
    return rows


def _parts(results: dict[str, Any]) -> list[list[str]]:
    """Milliseconds of each part of a step in each row."""
    medians = results["median_seconds"]
    rows = [["part, ms", *medians]]
    for part in PARTS:
        if any(part in seconds for seconds in medians.values()):
            rows.append([part, *(_number(seconds.get(part), 1e3) for seconds in medians.values())])
    return rows


def _number(value: int | float | None, unit: float = 1.0) -> str:
    """With three digits, or all before the point."""
    if value is None:
        return "-"
    value *= unit
    decimals = max(0, 2 - (len(f"{abs(value):.0f}") - 1)) if abs(value) >= 1 else 3
    return f"{value:,.{decimals}f}"


def _quartiles(seconds: list[float] | None) -> str:
    if not seconds:
        return "-"
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return f"{_number(low, 1e3)} to {_number(high, 1e3)}"
