"""The command `capsnet report`: how runs went, side by side, as a table and as learning curves."""

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
from capsnet_jax.figures.pictures import Curves, learning_curves_figure, save_figure
from capsnet_jax.runs.comparison import table_of_rows
from capsnet_jax.runs.folder import CONFIG
from capsnet_jax.runs.metrics import METRICS, read_lines

PICTURE = "learning_curves.png"
HEADINGS = ("run", "epochs", "steps", "train loss", "validation error %", "test error %", "images/s", "memory MB")


@dataclass(frozen=True)
class Report:
    """Tells how runs went: a table of their last epochs and of the options that differ, and learning curves.

    Errors are those after the last epoch, whatever was best on the way. Images/s is the median of the epochs, of all
    seeds together where they were trained side by side, and memory the most that was in use."""

    run_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs. One that holds the runs seed-0, seed-1 ... stands for all of them, and for a line of their mean
    and sample deviation."""
    output: Path = Path(PICTURE)
    """File that the curves are drawn into, as PNG, PDF or SVG by its ending: solid over epochs, the test error; dashed,
    the validation error; faint over steps, the loss of each chunk of them."""

    def run(self) -> None:
        """Prints the table and draws the curves.

        Raises:
            UsageError: a folder has no run or no metrics, they cannot be read, or the picture cannot be written.
        """
        if not self.run_dirs:
            raise UsageError("There are no runs to report; expected one run folder or more.")
        groups = {folder: [History.read(run) for run in runs_of(folder)] for folder in self.run_dirs}
        histories = list({run.folder: run for group in groups.values() for run in group}.values())
        rows: list[list[str]] = []
        options = differing_options(histories)
        for folder, group in groups.items():
            rows += [[*cells(run), *(option(run, name) for name in options)] for run in group]
            if group[0].folder != folder:
                rows.append([*mean_cells(folder, group), *("" for _ in options)])
        print(table_of_rows([[*HEADINGS, *options], *rows]))
        save_figure(learning_curves_figure({str(run.folder): run.curves() for run in histories}), self.output)


@dataclass(frozen=True)
class History:
    """What the folder of a run tells of how it went.

    Attributes:
        folder: of the run.
        options: those of its config, by name.
        chunks: metrics of each chunk of steps, in order.
        epochs: metrics of each epoch, in order.
    """

    folder: Path
    options: dict[str, Any]
    chunks: list[dict[str, Any]]
    epochs: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "History":
        """The history in the folder of a run.

        Raises:
            UsageError: it has no config or no metrics yet, or they cannot be read.
        """
        config, path = folder / CONFIG, folder / METRICS
        try:
            sections = json.loads(config.read_text()).values()
        except (OSError, ValueError, AttributeError) as error:
            raise UsageError(f"{config} is not the config of a run: {error}.") from error
        options = {name: value for fields in sections if isinstance(fields, dict) for name, value in fields.items()}
        try:
            lines, _ = read_lines(path)
            chunks, epochs = ([line for line in lines if line["kind"] == kind] for kind in ("chunk", "epoch"))
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
        except (KeyError, TypeError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} has lines that are not the metrics of chunks and epochs ({error}).") from error
        if not lines:
            raise UsageError(f"{path} has no metrics yet.")
        return cls(folder, options, chunks, epochs)

    def last(self, name: str) -> float:
        """A metric of the last epoch, or NaN."""
        return _number(self.epochs[-1], name) if self.epochs else math.nan

    def curves(self) -> Curves:
        """What is drawn."""
        points = (
            [(metrics["step"], _number(metrics, "loss")) for metrics in self.chunks],
            [(metrics["step"] * (1 - 0.5 / metrics["epoch"]), _number(metrics, "loss")) for metrics in self.epochs],
            *(
                [(metrics["epoch"], _error(_number(metrics, name))) for metrics in self.epochs if name in metrics]
                for name in ("validation_accuracy", "test_accuracy")
            ),
        )
        return Curves(*(np.array(pairs, float).reshape(-1, 2) for pairs in points))  # where there are none, too


def runs_of(folder: Path) -> list[Path]:
    """The runs of all seeds in a folder, or the folder itself, if it is that of a run.

    Raises:
        UsageError: it is neither.
    """
    seeds = [path.parent for path in folder.glob(f"seed-*/{CONFIG}") if path.parent.name[5:].isdecimal()]
    if seeds:
        return sorted(seeds, key=lambda path: int(path.name[5:]))
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{folder} is not the folder of a run: it has no {CONFIG}, and no runs seed-0, seed-1 ... .")
    return [folder]


def differing_options(histories: Sequence[History]) -> list[str]:
    """Names of the options that are not the same in all runs and not told anyway, in the order of their configs."""
    names = dict.fromkeys(name for run in histories for name in run.options)
    return [name for name in names if name not in HEADINGS and len({option(run, name) for run in histories}) > 1]


def option(run: History, name: str) -> str:
    """The value of an option of a run, as it is printed."""
    value = run.options.get(name)
    if name not in run.options or value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value)


def cells(run: History) -> list[str]:
    """The row of a run."""
    speeds = [_number(metrics, "images_per_second") for metrics in run.epochs]
    lines = [*run.chunks, *run.epochs]
    memory = [metrics["peak_memory_bytes"] for metrics in lines if metrics.get("peak_memory_bytes") is not None]
    return [
        str(run.folder),
        f"{len(run.epochs)}/{run.options.get('epochs', '?')}",
        f"{max(metrics['step'] for metrics in lines):,}",
        _text(run.last("loss"), 4),
        _text(_error(run.last("validation_accuracy")), 2),
        _text(_error(run.last("test_accuracy")), 2),
        _text(statistics.median(speeds) if speeds else math.nan, 0),
        _text(max(memory, default=math.nan) / 1e6, 0),
    ]


def mean_cells(folder: Path, group: Sequence[History]) -> list[str]:
    """The row of the mean and sample deviation over seeds."""
    errors = [_error(run.last("test_accuracy")) for run in group]
    epochs = {cells(run)[1] for run in group}
    mean = _text(statistics.fmean(errors), 2)
    if len(errors) > 1:
        mean += f" +- {_text(statistics.stdev(errors), 2)}"
    return [
        f"{folder}, {len(group)} seed{'s' if len(group) > 1 else ''}",
        epochs.pop() if len(epochs) == 1 else "differ",
        "",
        "",
        "",
        mean,
        "",
        "",
    ]


def _number(metrics: dict[str, Any], name: str) -> float:
    value = metrics.get(name)
    return math.nan if value is None else float(value)


def _error(accuracy: float) -> float:
    return 100 * (1 - accuracy)


def _text(value: float, decimals: int) -> str:
    return f"{value:,.{decimals}f}" if math.isfinite(value) else "-"
