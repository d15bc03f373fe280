"""Summarize samples: medians, ratios, machine and software as JSON, and as tables."""

import os
import platform
import re
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from capsnet_benchmark.measurements import MEASUREMENTS, SIZES, Samples
from capsnet_jax.tables import markdown_table

OTHERS = {"torch-eager": "eager", "torch-compile": "compile"}
"""The rows that JAX is compared with, and their names in ratios."""
COMPARED = {
    "step": "A training step of JAX takes {} of the time of {}.",
    "inference": "Inference by JAX takes {} of the time of {}.",
    "routing": "Routing by JAX, forward and backward, takes {} of the time of {}.",
    "epoch": "An epoch of JAX takes {} of the time of {}.",
    "memory": "Training by JAX takes {} of the memory of {}.",
}
PARTS = ("step", "stem", "primary", "votes", "routing", "decoder", "optimizer", "augmentation")
BUSY = 0.5  # load average, the mean number of running processes, over the minute before


def summarize(samples: Samples, *, batch_size: int, flops_per_image: int, platform: str) -> dict[str, Any]:
    """Summarize samples, as JSON types.

    Args:
        samples: samples of all rows.
        batch_size: number of images in a step.
        flops_per_image: see `flops.training_flops`.
        platform: "cpu" or "gpu".

    Returns:
        - "ratios": JAX over each other row, of median times and of peak memory, as in "step_vs_eager".
        - "median_seconds", "samples_seconds", "first_step_seconds", "images_per_second", "peak_memory_bytes" and
          "left_out", by row.
        - "limit_flops_per_second": rate of the fastest large matrix product of any row.
        - "fraction_of_limit": rate of a training step over that limit, by row.
        - "training_flops_per_image".
        - "extrapolated": measurements that were computed from shorter ones.
    """
    medians = {
        row: {name: statistics.median(seconds) for name, seconds in each.items()}
        for row, each in samples.seconds.items()
    }
    steps = {row: seconds["step"] for row, seconds in medians.items() if "step" in seconds}
    products = [seconds["gemm"] for seconds in medians.values() if "gemm" in seconds]
    limit = 2 * SIZES["gemm_sizes"][platform] ** 3 / min(products) if products else None
    flops = flops_per_image * batch_size
    return {
        "ratios": ratios({row: {**each, "memory": samples.peak_memory.get(row)} for row, each in medians.items()}),
        "median_seconds": medians,
        "first_step_seconds": {row: samples.first_seconds[row]["step"] for row in steps},
        "images_per_second": {row: batch_size / seconds for row, seconds in steps.items()},
        "peak_memory_bytes": samples.peak_memory,
        "fraction_of_limit": {row: flops / seconds / limit for row, seconds in steps.items()} if limit else {},
        "limit_flops_per_second": limit,
        "training_flops_per_image": flops_per_image,
        "left_out": samples.left_out,
        "extrapolated": ["epoch"] if platform == "cpu" and any("epoch" in row for row in medians.values()) else [],
        "samples_seconds": samples.seconds,
    }


def ratios(costs: Mapping[str, Mapping[str, float | None]]) -> dict[str, float]:
    """Divide the costs of JAX by the costs of each other row; an unknown cost is missing or None.

    Args:
        costs: seconds or bytes, by row and name.

    Returns:
        Ratios by names such as "step_vs_eager" and "memory_vs_compile".
    """
    return {
        f"{name}_vs_{other}": cost / divisor
        for row, other in OTHERS.items()
        for name, cost in costs.get("jax", {}).items()
        if cost and (divisor := costs.get(row, {}).get(name))
    }


def origin(rows: Sequence[str], device: str) -> dict[str, Any]:
    """Describe the machine and the software; "commit" is None outside a checkout of this project.

    Args:
        rows: the rows that were measured; with PyTorch among them, its version is included.
        device: name of the GPU, or "cpu".
    """
    packages = ["jax", "jaxlib", "flax", "optax", "numpy", *(["torch"] if set(rows) & OTHERS.keys() else [])]
    return {
        "device": _processor() if device == "cpu" else device,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "commit": _commit(Path(__file__).parents[1]),
    }


def _processor() -> str:
    cpus = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpus.read_text(), re.MULTILINE) if cpus.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _commit(folder: Path) -> str | None:
    if not (folder / ".git").exists():  # an installed package may lie within another checkout
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def describe(results: dict[str, Any]) -> str:
    """Format results as a table of rows, a table of the parts of a step, and sentences with the main ratios."""
    medians = results["median_seconds"]
    milliseconds = {
        name: {row: 1e3 * seconds[name] for row, seconds in medians.items() if name in seconds} for name in MEASUREMENTS
    }
    columns = {
        "first step s": results["first_step_seconds"],
        "step ms": milliseconds["step"],
        "quartiles": {row: _quartiles(results["samples_seconds"][row]["step"]) for row in milliseconds["step"]},
        "images/s": results["images_per_second"],
        "epoch s": {row: value / 1e3 for row, value in milliseconds["epoch"].items()},
        **{f"{name} ms": milliseconds[name] for name in ("inference", "routing", "dispatch")},
        "memory MB": {row: size / 1e6 for row, size in results["peak_memory_bytes"].items() if size},
        "of the limit": results["fraction_of_limit"],
    }
    rows = [["row", *columns]]
    rows += [[row, *(_number(column.get(row)) for column in columns.values())] for row in medians]
    parts = [["part, ms", *medians]]
    parts += [
        [name, *(_number(milliseconds[name].get(row)) for row in medians)] for name in PARTS if milliseconds[name]
    ]
    sentences = [
        sentence.format(f"{results['ratios'][f'{name}_vs_{other}']:.2f}", row)
        for name, sentence in COMPARED.items()
        for row, other in OTHERS.items()
        if f"{name}_vs_{other}" in results["ratios"]
    ]
    if results["limit_flops_per_second"]:
        limit = results["limit_flops_per_second"] / 1e9
        sentences.append(f"The limit, by a large product of matrices in {results['precision']}: {limit:,.0f} GFLOP/s.")
    sentences += [f"The {name} is extrapolated from steps and batches." for name in results["extrapolated"]]
    if (load := results["load_before"] or 0) > BUSY:
        sentences.append(f"The machine was busy before the run (load {load:.1f}); times and ratios mean little.")
    sentences += [f"{row} was left out: {reason}" for row, reason in results["left_out"].items()]
    return "\n\n".join([markdown_table(rows), markdown_table(parts), "\n".join(sentences)]).strip()


def _number(value: float | str | None) -> str:
    """Format a number with three significant digits, or with all digits before the point."""
    if value is None or isinstance(value, str):
        return value or "-"
    decimals = max(0, 2 - (len(f"{abs(value):.0f}") - 1)) if abs(value) >= 1 else 3
    return f"{value:,.{decimals}f}"


def _quartiles(seconds: Sequence[float]) -> str:
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return f"{_number(1e3 * low)} to {_number(1e3 * high)}"
