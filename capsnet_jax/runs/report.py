"""How runs went, from the metrics in their folders: rows of a table, and learning curves."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from capsnet_jax.errors import UsageError
from capsnet_jax.figures import Curves
from capsnet_jax.interchange.state_files import CONFIG
from capsnet_jax.runs.metrics import METRICS, read_lines

HEADINGS = ("run", "epochs", "steps", "train loss", "validation error %", "test error %", "images/s", "memory MB")


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
