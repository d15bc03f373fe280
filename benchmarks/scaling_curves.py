"""Time and memory of a capsule layer against batch, number of input capsules and iterations, beside PyTorch.

    python benchmarks/scaling_curves.py --output benchmarks/results/scaling-cpu --figure docs/scaling-curves.png

Measured are forward and backward, with gradients of poses and weight, of capsules of 8 numbers that route to 10 of 16:
in JAX without votes ("jax-fused") and of votes ("jax-votes"), and by the twin ("torch-eager"). For each axis there is a
process for each row, and they take turns. Memory is what a call takes beyond inputs, weight and their gradients: on CPU
how far the memory of the process rises, on a GPU what the framework says; for JAX also by XLA's own account.
Points that would need more memory or time than there is are left out, and their cells are empty.
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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from capsnet_benchmark.processes import Worker, WorkerError, same_device
from capsnet_benchmark.results import origin
from capsnet_jax.errors import UsageError
from capsnet_jax.files import replace_file

ROWS = ("jax-fused", "jax-votes", "torch-eager")
COLORS = dict(zip(ROWS, ("tab:blue", "tab:orange", "tab:red"), strict=True))
LABELS = {"batch": "images in a batch", "inputs": "input capsules", "iterations": "routing iterations"}
OUTPUT_NUMBERS = 10 * 16  # of capsules times pose size
UNCOUNTED = 2 + 4  # calls of a point before the samples: to measure memory, and to warm up

# Of each axis the values, and what the others are meanwhile; what takes longest comes last.
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
    """What was measured of a row at a value of an axis; nothing, if it was left out for a reason."""

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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="files to write, without .csv, .json and .png")
    parser.add_argument("--figure", type=Path, help="where the figure goes instead")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each point (default: 5)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no point is begun that may end after them")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that all of this works")
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


def measure(
    axis: str, values: Sequence[int], fixed: dict[str, int], *, rounds: int, deadline: float
) -> tuple[list[Point], str]:
    """All rows at all values of an axis, and the device.

    Args:
        axis: "batch", "inputs" or "iterations".
        values: in rising order, as the peak of a GPU's memory is that since a process began.
        fixed: the values of the other axes.
        rounds: number of samples.
        deadline: of `time.monotonic`.

    Raises:
        UsageError: a process cannot start, or they are not on the same device.
    """
    points: list[Point] = []
    with ExitStack() as stack:
        workers = {row: Worker(row, "scaling_work", {"row": row, "fixed": fixed}) for row in ROWS}
        for worker in workers.values():
            stack.callback(worker.stop)
        _, device = same_device({row: worker.introduction() for row, worker in workers.items()})
        before: dict[str, Point] = {}
        took = 0.0
        for value in values:
            print(f"{axis}={value}", file=sys.stderr)
            begun = time.monotonic()
            sizes: dict[str, Any] = fixed | {axis: value}
            here = {row: Point(row, axis, value, **sizes) for row in ROWS}
            free = workers[ROWS[0]].tell("free_memory") if not before or before[ROWS[0]].seconds else math.inf
            # What is compiled is as large at every value; each call takes longer.
            last = {row: statistics.median(point.seconds) for row, point in before.items() if point.seconds}
            for row, point in here.items():
                growth = value / before[row].value if before else 1
                seconds = took + (growth - 1) * (rounds + UNCOUNTED) * sum(last.values())
                point.left_out = reason_to_leave_out(before.get(row), growth, free, seconds, deadline - begun)
            take_samples([(workers[row], point) for row, point in here.items() if not point.left_out], rounds)
            before, took = here, time.monotonic() - begun
            points += here.values()
    return points, device


def take_samples(rows: Sequence[tuple[Worker, Point]], rounds: int) -> None:
    """Prepares all rows at once, then has them take turns; one that fails is left out."""

    def ask(worker: Worker, point: Point, question: Callable[[Worker, str], Any]) -> Any:
        if point.left_out is None:
            try:
                return question(worker, f"{point.axis}={point.value}")
            except WorkerError as error:
                point.left_out, point.seconds = str(error), []
                print(error, file=sys.stderr)
        return None

    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda row: ask(row[0], row[1], Worker.prepare), rows))
    for worker, point in rows:
        vars(point).update(ask(worker, point, lambda worker, _: worker.tell("memory")) or {})
    for _ in range(rounds):
        for worker, point in rows:
            seconds = ask(worker, point, Worker.sample)
            if seconds is not None:
                point.seconds.append(seconds)


def reason_to_leave_out(
    before: Point | None, growth: float, free: float, seconds: float, seconds_left: float
) -> str | None:
    """Why a point should not be tried; None if it should.

    Args:
        before: the point before, of the same row and axis.
        growth: how many times larger the value is now, and so perhaps the memory that is needed.
        free: bytes of memory.
        seconds: that all rows may take.
        seconds_left: of all time.
    """
    if before is not None and before.left_out:
        return before.left_out
    if seconds > seconds_left:
        return f"it may take {seconds:.0f} s, and {max(seconds_left, 0):.0f} s are left"
    needed = growth * (before.extra_bytes or 0) if before else 0
    return f"it may need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free" if needed > free else None


def as_csv(points: Sequence[Point]) -> str:
    """A line for each point."""
    file = io.StringIO()
    sizes = ("row", "axis", "value", "batch", "inputs", "iterations")
    seconds = ("seconds_median", "seconds_quartile_1", "seconds_quartile_3")
    memory = ("extra_bytes", "xla_temp_bytes", "votes_bytes")
    sheet = csv.writer(file, lineterminator="\n")
    sheet.writerow([*sizes, *seconds, *memory])
    for point in points:
        low, median, high = quartiles(point.seconds) if point.seconds else ("", "", "")
        sheet.writerow(
            [getattr(point, name) for name in sizes] + [median, low, high] + [getattr(point, name) for name in memory]
        )
    return file.getvalue()


def quartiles(seconds: Sequence[float]) -> list[float]:
    """The first, the median and the third."""
    return statistics.quantiles(seconds, n=4, method="inclusive")


def curves(points: Sequence[Point], title: str) -> Figure:
    """Time above memory, for each axis."""
    figure = Figure(figsize=(11, 6.4), dpi=120, layout="constrained")
    axes = list(dict.fromkeys(point.axis for point in points))
    panels = figure.subplots(2, len(axes), sharex="col", sharey="row", squeeze=False)
    for column, axis in enumerate(axes):
        of_axis = [point for point in points if point.axis == axis]
        time_panel, memory_panel = panels[:, column]
        others = ", ".join(f"{getattr(of_axis[0], name):,} {LABELS[name]}" for name in LABELS if name != axis)
        time_panel.set_title(others, fontsize=9)
        memory_panel.set_xlabel(LABELS[axis])
        for row in ROWS:
            _draw(time_panel, memory_panel, [point for point in of_axis if point.row == row and point.seconds])
        votes = sorted({(point.value, point.votes_bytes / 1e6) for point in of_axis})
        memory_panel.plot(*zip(*votes, strict=True), color="0.4", linestyle="--", label="the votes, once")
        values = sorted({point.value for point in of_axis})
        for panel in (time_panel, memory_panel):
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.set_xticks(values, [f"{value:,}" for value in values])
            panel.minorticks_off()
            panel.grid(color="0.9")
    panels[0, 0].set_ylabel("milliseconds")
    panels[1, 0].set_ylabel("extra memory, MB")
    figure.suptitle(title, fontsize=11)
    figure.legend(*panels[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _draw(time_panel: Axes, memory_panel: Axes, points: Sequence[Point]) -> None:
    if not points:
        return
    values, color = [point.value for point in points], COLORS[points[0].row]
    milliseconds = [[1e3 * seconds for seconds in quartiles(point.seconds)] for point in points]
    low, medians, high = zip(*milliseconds, strict=True)
    time_panel.plot(values, medians, color=color, marker="o", markersize=4)
    time_panel.fill_between(values, low, high, color=color, alpha=0.2, linewidth=0)
    memory = [(point.extra_bytes or math.nan) / 1e6 for point in points]
    memory_panel.plot(values, memory, color=color, marker="o", markersize=4, label=points[0].row)


if __name__ == "__main__":
    main()
