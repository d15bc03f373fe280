"""Measure time and memory of a capsule layer by batch size, routing iterations and number of input capsules.

    python benchmarks/scaling_curves.py --output benchmarks/results/scaling-cpu --figure docs/scaling-curves.png

The layer routes capsules of size 8 to 10 capsules of size 16, forward and backward, with gradients of poses and
weight: in JAX without votes ("jax-fused") and with votes ("jax-votes"), and in PyTorch ("torch-eager"). For each axis,
each row has its own process, and the rows take turns. Memory is what a call needs in addition to inputs, weight and
gradients: on CPU the growth of the process, on a GPU what the framework reports, and for JAX also what XLA plans for
temporary arrays.
Points that may need more memory or time than there is are left out, and their cells are empty.
"""

import argparse
import csv
import io
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from capsnet_benchmark.measurements import SIZES
from capsnet_benchmark.processes import Worker, WorkerError, start_workers
from capsnet_benchmark.results import origin
from capsnet_jax.config import Config, ModelConfig, TrainingConfig
from capsnet_jax.errors import UsageError
from capsnet_jax.files import replace_file

COLORS = {"jax-fused": "tab:blue", "jax-votes": "tab:orange", "torch-eager": "tab:red"}
ROWS = tuple(COLORS)
LABELS = {"batch": "images in a batch", "inputs": "input capsules", "iterations": "routing iterations"}
OUTPUT_NUMBERS = 10 * 16  # output capsules times pose size
UNCOUNTED = 2 + 4  # calls of a point before its samples: to measure memory, and to warm up

# The values of each axis, and the values of the other axes meanwhile. The slowest comes last.
AXES: dict[str, tuple[tuple[int, ...], dict[str, int]]] = {
    "batch": ((1, 4, 16, 64, 256), {"inputs": 1152, "iterations": 3}),
    "iterations": ((1, 2, 3, 5, 10), {"batch": 64, "inputs": 1152}),
    "inputs": ((1152, 4608, 18432, 65536), {"batch": 16, "iterations": 3}),
}
SMALL: dict[str, tuple[tuple[int, ...], dict[str, int]]] = {
    "inputs": ((7, 21), {"batch": 2, "iterations": 2}),
}


@dataclass
class Point:
    """The measurements of a row at one value of an axis; if there are none, `left_out` is the reason."""

    row: str
    axis: str
    value: int
    batch: int
    inputs: int
    iterations: int
    seconds: list[float] = field(default_factory=list)
    extra_bytes: int | None = None
    xla_temp_bytes: int | None = None
    left_out: str | None = None

    @property
    def votes_bytes(self) -> int:
        return 4 * self.batch * self.inputs * OUTPUT_NUMBERS

    @property
    def quartiles(self) -> list[float]:
        """First quartile, median and third quartile."""
        return statistics.quantiles(self.seconds, n=4, method="inclusive")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="files to write, without suffix")
    parser.add_argument("--figure", type=Path, help="where the figure goes instead")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each point (default: 5)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no point that may end later than this")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error(f"--rounds is {options.rounds}, and must be at least 2")
    deadline = time.monotonic() + options.seconds
    load_before = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    points: list[Point] = []
    device = ""
    try:
        for axis, (values, fixed) in (SMALL if options.small else AXES).items():
            of_axis, device = measure(axis, values, fixed, rounds=options.rounds, deadline=deadline)
            points += of_axis
    except UsageError as error:
        parser.error(str(error))
    results = origin(ROWS[1:], device) | {"load_before": load_before, "rounds": options.rounds}
    results["points"] = [asdict(point) for point in points]
    replace_file(options.output.with_name(f"{options.output.name}.json"), json.dumps(results, indent=2) + "\n")
    replace_file(options.output.with_name(f"{options.output.name}.csv"), as_csv(points))
    path = options.figure or options.output.with_name(f"{options.output.name}.png")
    curves(points, f"A capsule layer, forward and backward, on {results['device']}").savefig(path)


def layer_config(batch: int, inputs: int, iterations: int, row: str = ROWS[0]) -> dict[str, Any]:
    """Return the config of a model, as JSON, whose only capsule layer has this number of input capsules."""
    model = ModelConfig(
        image_shape=(1, inputs, 1),
        stem_channels=1,
        stem_kernel=1,
        primary_groups=1,
        primary_kernel=1,
        primary_stride=1,
        primary_scale=1.0,
        decoder_hidden=None,
        num_iterations=iterations,
        routing_implementation="fused" if row == "jax-fused" else "votes",
    )
    return Config(model=model, training=TrainingConfig(batch_size=batch)).to_json()


def measure(
    axis: str, values: Sequence[int], fixed: dict[str, int], *, rounds: int, deadline: float
) -> tuple[list[Point], str]:
    """Measure all rows at all values of an axis.

    Args:
        axis: "batch", "inputs" or "iterations".
        values: in rising order, as JAX cannot reset the peak memory of a GPU.
        fixed: the values of the other axes.
        rounds: number of samples.
        deadline: end of the measurements, as `time.monotonic` gives it.

    Returns:
        The points, and the name of the device.

    Raises:
        UsageError: a process cannot start, or the rows are not on the same device.
    """
    points: list[Point] = []
    arguments: dict[str, Any] = {"config": layer_config(1, 1, 1), **SIZES}
    works: dict[str, Any] = {row: ("capsnet_benchmark.jax_work", arguments) for row in ROWS[:2]}
    works[ROWS[2]] = ("capsnet_torch.benchmark", {**arguments, "compile_mode": "eager"})
    with start_workers(works) as workers:
        before: list[Point] = []
        took = 0.0
        for value in values:
            print(f"{axis}={value}", file=sys.stderr)
            begun = time.monotonic()
            sizes: dict[str, Any] = fixed | {axis: value}
            here = [Point(row, axis, value, **sizes) for row in ROWS]
            free = math.inf if before and not before[0].seconds else workers[0].ask("free_memory")
            growth = value / before[0].value if before else 1
            # Compilation takes as long as at the value before, and each call `growth` times as long.
            calls = (rounds + UNCOUNTED) * sum(point.quartiles[1] for point in before if point.seconds)
            seconds, seconds_left = took + (growth - 1) * calls, deadline - begun
            previous: Sequence[Point | None] = before or [None] * len(ROWS)
            for point, last in zip(here, previous, strict=True):
                point.left_out = reason_to_leave_out(last, growth, free, seconds, seconds_left)
            take_samples([(worker, point) for worker, point in zip(workers, here, strict=True)], rounds)
            before, took = here, time.monotonic() - begun
            points += here
        return points, workers[0].device


def take_samples(rows: Sequence[tuple[Worker, Point]], rounds: int) -> None:
    """Prepare all rows at once, then let them take turns; leave out the ones that fail."""

    def ask(worker: Worker, point: Point, method: str, *arguments: Any) -> Any:
        if point.left_out is None:
            try:
                return worker.ask(method, *arguments)
            except WorkerError as error:
                point.left_out, point.seconds = str(error), []
                print(error, file=sys.stderr)
        return None

    def prepare(row: tuple[Worker, Point]) -> None:
        _, point = row
        ask(*row, "load", layer_config(point.batch, point.inputs, point.iterations, point.row))
        ask(*row, "prepare", "routing")

    with ThreadPoolExecutor() as pool:
        list(pool.map(prepare, rows))
    for worker, point in rows:
        point.extra_bytes = ask(worker, point, "extra_memory")
        if point.row.startswith("jax"):
            point.xla_temp_bytes = ask(worker, point, "temp_bytes")
    for _ in range(rounds):
        for worker, point in rows:
            if (seconds := ask(worker, point, "sample")) is not None:
                point.seconds.append(seconds)


def reason_to_leave_out(
    before: Point | None, growth: float, free: float, seconds: float, seconds_left: float
) -> str | None:
    """Return why a point should not be measured; None if it should.

    Args:
        before: the previous point of the same row and axis.
        growth: this value over the previous one; memory and time are expected to grow as much.
        free: bytes of free memory.
        seconds: expected time of all rows.
        seconds_left: time until the deadline.
    """
    if before and before.left_out:
        return before.left_out
    if seconds > seconds_left:
        return f"it may take {seconds:.0f} s, and {max(seconds_left, 0):.0f} s are left"
    needed = growth * (before.extra_bytes or 0) if before else 0
    return f"it may need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free" if needed > free else None


def as_csv(points: Sequence[Point]) -> str:
    """Format points as CSV, a line each."""
    file = io.StringIO()
    sizes = ("row", "axis", "value", "batch", "inputs", "iterations")
    seconds = ("seconds_median", "seconds_quartile_1", "seconds_quartile_3")
    memory = ("extra_bytes", "xla_temp_bytes", "votes_bytes")
    sheet = csv.writer(file, lineterminator="\n")
    sheet.writerow([*sizes, *seconds, *memory])
    for point in points:
        low, median, high = point.quartiles if point.seconds else ("", "", "")
        cells = [[getattr(point, name) for name in names] for names in (sizes, memory)]
        sheet.writerow([*cells[0], median, low, high, *cells[1]])
    return file.getvalue()


def curves(points: Sequence[Point], title: str) -> Figure:
    """Draw time above memory, a column for each axis."""
    figure = Figure(figsize=(11, 6.4), dpi=120, layout="constrained")
    axes = list(dict.fromkeys(point.axis for point in points))
    panels = figure.subplots(2, len(axes), sharex="col", sharey="row", squeeze=False)
    for (time_panel, memory_panel), axis in zip(panels.T, axes, strict=True):
        of_axis = [point for point in points if point.axis == axis]
        others = ", ".join(f"{getattr(of_axis[0], name):,} {LABELS[name]}" for name in LABELS if name != axis)
        time_panel.set_title(others, fontsize=9)
        memory_panel.set_xlabel(LABELS[axis])
        for row, color in COLORS.items():
            if measured := [point for point in of_axis if point.row == row and point.seconds]:
                values = [point.value for point in measured]
                low, medians, high = zip(*([1e3 * each for each in point.quartiles] for point in measured), strict=True)
                time_panel.plot(values, medians, color=color, marker="o", markersize=4)
                time_panel.fill_between(values, low, high, color=color, alpha=0.2, linewidth=0)
                memory = [(point.extra_bytes or math.nan) / 1e6 for point in measured]
                memory_panel.plot(values, memory, color=color, marker="o", markersize=4, label=row)
        votes = {point.value: point.votes_bytes / 1e6 for point in of_axis}
        memory_panel.plot(*zip(*votes.items(), strict=True), color="0.4", linestyle="--", label="the votes, once")
        for panel in (time_panel, memory_panel):
            panel.set(xscale="log", yscale="log")
            panel.set_xticks(list(votes), [f"{value:,}" for value in votes])
            panel.minorticks_off()
            panel.grid(color="0.9")
    panels[0, 0].set_ylabel("milliseconds")
    panels[1, 0].set_ylabel("extra memory, MB")
    figure.suptitle(title, fontsize=11)
    figure.legend(*panels[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


if __name__ == "__main__":
    main()
