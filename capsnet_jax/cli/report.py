"""The command `capsnet report`: a table of runs side by side, and their learning curves."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from capsnet_jax.errors import UsageError
from capsnet_jax.figures import Curves, learning_curves_figure, save_figure
from capsnet_jax.interchange.state_files import CONFIG
from capsnet_jax.runs.metrics import METRICS, read_metrics
from capsnet_jax.tables import markdown_table, number_cell

HEADINGS = ("run", "epochs", "steps", "train loss", "validation error %", "test error %", "images/s", "memory MB")


@dataclass(frozen=True)
class Report:
    """Summarize runs: a table of their last epochs and of the options that differ, and a plot of learning curves.

    Errors are those after the last epoch, even if an earlier one was better. Images/s is the median over the epochs, of
    all seeds that trained side by side; memory is the peak."""

    run_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs. A folder of several seeds stands for all of them, with a row of mean and deviation."""
    output: Path = Path("learning_curves.png")
    """File for the plot: .png, .pdf or .svg. Solid: test error; dashed: validation error; faint: loss of each chunk;
    a line with a band: mean and range of several seeds."""

    def run(self) -> None:
        if not self.run_dirs:
            raise UsageError("There are no runs to report; expected one run folder or more.")
        groups = {folder: [History.read(run) for run in runs_of(folder)] for folder in self.run_dirs}
        histories = list({run.folder: run for group in groups.values() for run in group}.values())
        rows: list[list[str]] = []
        options = differing_options(histories)
        for folder, group in groups.items():
            rows += [[*run.cells(), *map(run.option, options)] for run in group]
            if group[0].folder != folder:
                rows.append([*mean_cells(folder, group), *("" for _ in options)])
        print(markdown_table([[*HEADINGS, *options], *rows]))
        curves = {str(folder): [run.curves() for run in group] for folder, group in groups.items()}
        save_figure(learning_curves_figure(curves), self.output)


@dataclass(frozen=True)
class History:
    """Options and metrics of a run.

    Attributes:
        folder: folder of the run.
        options: options by name.
        chunks: metrics of each chunk of steps, in order.
        epochs: metrics of each epoch, in order.
    """

    folder: Path
    options: dict[str, Any]
    chunks: list[dict[str, Any]]
    epochs: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "History":
        """Read the history of a run from its folder.

        Raises:
            UsageError: the folder has no config or no metrics yet, or they cannot be read.
        """
        config = folder / CONFIG
        try:
            sections = json.loads(config.read_text(encoding="utf-8")).values()
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise UsageError(f"{config} is not the config of a run: {error}.") from error
        options = {name: value for fields in sections if isinstance(fields, dict) for name, value in fields.items()}
        chunks, epochs = (read_metrics(folder, kind) for kind in ("chunk", "epoch"))
        if not chunks and not epochs:
            raise UsageError(f"{folder / METRICS} has no metrics yet; expected a run that has trained for some steps.")
        return cls(folder, options, chunks, epochs)

    def last(self, name: str) -> float:
        """Return a metric of the last epoch, or NaN."""
        return _number(self.epochs[-1], name) if self.epochs else math.nan

    def option(self, name: str) -> str:
        """Return the value of an option as text; "-" if there is none."""
        value = self.options.get(name)
        return "-" if value is None else value if isinstance(value, str) else json.dumps(value)

    def cells(self) -> list[str]:
        """Return the row of the run, without its options."""
        speeds = [_number(metrics, "images_per_second") for metrics in self.epochs]
        lines = [*self.chunks, *self.epochs]
        memory = [metrics["peak_memory_bytes"] for metrics in lines if metrics.get("peak_memory_bytes") is not None]
        return [
            str(self.folder),
            f"{len(self.epochs)}/{self.options.get('epochs', '?')}",
            f"{max(metrics['step'] for metrics in lines):,}",
            number_cell(self.last("loss"), 4),
            number_cell(_error(self.last("validation_accuracy")), 2),
            number_cell(_error(self.last("test_accuracy")), 2),
            number_cell(statistics.median(speeds) if speeds else None, 0),
            number_cell(max(memory, default=math.nan) / 1e6, 0),
        ]

    def curves(self) -> Curves:
        """Return the learning curves. The loss of an epoch is drawn at the middle of its steps."""
        points = (
            [(metrics["step"], _number(metrics, "loss")) for metrics in self.chunks],
            [(metrics["step"] * (1 - 0.5 / metrics["epoch"]), _number(metrics, "loss")) for metrics in self.epochs],
            *(
                [(metrics["epoch"], _error(_number(metrics, name))) for metrics in self.epochs if name in metrics]
                for name in ("validation_accuracy", "test_accuracy")
            ),
        )
        return Curves(*(np.array(pairs, float).reshape(-1, 2) for pairs in points))  # 2 columns also without points


def runs_of(folder: Path) -> list[Path]:
    """Return the run folders of all seeds in a folder, or the folder itself if it is a run folder.

    Raises:
        UsageError: it is neither.
    """
    seeds = [path.parent for path in folder.glob(f"seed-*/{CONFIG}") if path.parent.name[5:].isdecimal()]
    if seeds:
        return sorted(seeds, key=lambda path: int(path.name[5:]))
    if not (folder / CONFIG).is_file():
        raise UsageError(
            f"{folder} is not the folder of a run: it has no {CONFIG}, and no runs seed-0, seed-1 ...; expected the "
            "--run-dir of a training."
        )
    return [folder]


def differing_options(histories: Sequence[History]) -> list[str]:
    """Return the names of options that differ between runs and have no column yet, in the order of their configs."""
    names = dict.fromkeys(name for run in histories for name in run.options)
    without = (*HEADINGS, "sha256", "anew", "unused")  # details of where weights come from
    return [name for name in names if name not in without and len({run.option(name) for run in histories}) > 1]


def mean_cells(folder: Path, group: Sequence[History]) -> list[str]:
    """Return the row of the mean test error over seeds, and its sample standard deviation."""
    errors = [_error(run.last("test_accuracy")) for run in group]
    epochs = {run.cells()[1] for run in group}
    mean = number_cell(statistics.fmean(errors), 2)
    if len(errors) > 1:
        mean += f" +- {number_cell(statistics.stdev(errors), 2)}"
    name = f"{folder}, {len(group)} seed{'s' if len(group) > 1 else ''}"
    return [name, epochs.pop() if len(epochs) == 1 else "differ", "", "", "", mean, "", ""]


def _number(metrics: dict[str, Any], name: str) -> float:
    value = metrics.get(name)
    return math.nan if value is None else float(value)


def _error(accuracy: float) -> float:
    return 100 * (1 - accuracy)
