"""From samples to what is kept of them: medians, ratios, and where they come from."""

import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from capsnet_benchmark.measurements import GEMM_SIZES, Samples

OTHERS = {"torch-eager": "eager", "torch-compile": "compile"}
"""What JAX is compared with: rows, and what they are called in the names of ratios."""


def summarize(samples: Samples, *, batch_size: int, flops_per_image: int, platform: str) -> dict[str, Any]:
    """What was measured, as JSON has it.

    Args:
        samples: of all rows.
        batch_size: number of images in a step.
        flops_per_image: of a training step; see `flops.training_flops`.
        platform: "cpu" or "gpu".

    Returns:
        "ratios", JAX to others, of medians and of memory; "median_seconds", "samples_seconds", "first_step_seconds",
        "images_per_second", "peak_memory_bytes" and "left_out" by row; "limit_flops_per_second", that of the row whose
        matrix product was the fastest, and by row "fraction_of_limit", how much of it a step reaches;
        "training_flops_per_image"; and "extrapolated", measurements that are computed from shorter ones.
    """
    medians = {
        row: {name: statistics.median(seconds) for name, seconds in taken.items()}
        for row, taken in samples.seconds.items()
    }
    steps = {row: seconds["step"] for row, seconds in medians.items() if "step" in seconds}
    products = [seconds["gemm"] for seconds in medians.values() if "gemm" in seconds]
    limit = 2 * GEMM_SIZES[platform] ** 3 / min(products) if products else None
    flops = flops_per_image * batch_size
    return {
        "ratios": ratios(medians, samples.peak_memory),
        "median_seconds": medians,
        "first_step_seconds": {
            row: first["step"] for row, first in samples.first_seconds.items() if "step" in first and row in steps
        },
        "images_per_second": {row: batch_size / seconds for row, seconds in steps.items()},
        "peak_memory_bytes": samples.peak_memory,
        "fraction_of_limit": {row: flops / seconds / limit for row, seconds in steps.items()} if limit else {},
        "limit_flops_per_second": limit,
        "training_flops_per_image": flops_per_image,
        "left_out": samples.left_out,
        "extrapolated": ["epoch"] if platform == "cpu" and any("epoch" in taken for taken in medians.values()) else [],
        "samples_seconds": samples.seconds,
    }


def ratios(medians: dict[str, dict[str, float]], peak_memory: dict[str, int | None]) -> dict[str, float]:
    """What JAX takes of what the others take, by names such as "step_vs_eager" and "memory_vs_compile"."""
    takes: dict[str, dict[str, float]] = {row: dict(seconds) for row, seconds in medians.items()}
    for row, size in peak_memory.items():
        if size is not None:
            takes[row]["memory"] = size
    ours = takes.get("jax", {})
    return {
        f"{name}_vs_{other}": value / takes[row][name]
        for row, other in OTHERS.items()
        for name, value in ours.items()
        if name in takes.get(row, {})
    }


def origin(rows: Sequence[str], device: str) -> dict[str, Any]:
    """The machine and the software that results come from; "commit" is None outside a checkout of this project.

    Args:
        rows: that were measured.
        device: the name of the GPU, or "cpu".
    """
    packages = ["jax", "jaxlib", "flax", "optax", "numpy"]
    if set(rows) & OTHERS.keys():
        packages.append("torch")
    return {
        "device": _processor() if device == "cpu" else device,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "commit": _commit(Path(__file__).parents[1]),
    }


def _processor() -> str:
    """The name of the CPU, as Linux knows it, or else its kind."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _commit(folder: Path) -> str | None:
    # An installed package may lie within the checkout of something else.
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
