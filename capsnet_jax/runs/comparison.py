"""The folder of a comparison of routings: a run folder and a result for each routing, table and figure."""

import csv
import io
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from capsnet_jax.config import differences
from capsnet_jax.errors import UsageError
from capsnet_jax.figures import comparison_figure
from capsnet_jax.files import replace_file
from capsnet_jax.runs.folder import Run
from capsnet_jax.runs.metrics import METRICS, read_lines
from capsnet_jax.runs.seeds import SeedFolders
from capsnet_jax.tables import markdown_table

CONFIG, RESULTS = "config.json", "results.jsonl"
TABLE, SHEET, FIGURE = "comparison.md", "comparison.csv", "comparison.png"

HEADINGS = ("routing", "parameters", "test error %", "deviation", "images/s", "memory MB", "coupling entropy")
NOTES = """\
Test error: of the weights of the last epoch on all test images; mean over the seeds, and their sample deviation.
Images/s: training images of all seeds that train side by side, without the time of compilation. Memory: of a training
program with all of these seeds, by XLA's own account. Coupling entropy: of the last capsule layer on test images; 1.00
is every input capsule shared out evenly among the outputs, 0.00 every input capsule given to one of them."""


@dataclass(frozen=True)
class SeedOutcome:
    """The result of a routing from a seed: of each epoch the mean training loss and the share of errors in the test."""

    seed: int
    train_loss: list[float]
    test_error: list[float]
    coupling_entropy: float

    @classmethod
    def of(cls, run: Run, coupling_entropy: float) -> "SeedOutcome":
        """Read the result of a run that has finished from its metrics."""
        epochs = [line for line in read_lines(run.folder / METRICS)[0] if line["kind"] == "epoch"]
        return cls(
            seed=run.config.training.seed,
            train_loss=[line["loss"] for line in epochs],
            test_error=[1 - line["test_accuracy"] for line in epochs],
            coupling_entropy=coupling_entropy,
        )


@dataclass(frozen=True)
class Result:
    """The result of a routing; `status` is "ok", or at what step it diverged, and then `seeds` are those before."""

    routing: str
    status: str
    num_params: int
    seeds_at_once: int
    memory_bytes: int
    images_per_second: float
    seeds: list[SeedOutcome]

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Result":
        """The result of what `dataclasses.asdict` gave."""
        return cls(**{**fields, "seeds": [SeedOutcome(**seed) for seed in fields["seeds"]]})

    @property
    def test_errors(self) -> np.ndarray:
        """In percent, `[seeds epochs]`."""
        return 100 * np.array([seed.test_error for seed in self.seeds])

    def summary(self) -> dict[str, Any]:
        """A row of the comparison, with None for what there is not."""
        last = self.test_errors[:, -1] if self.status == "ok" else np.array([])
        entropies = [seed.coupling_entropy for seed in self.seeds]
        return {
            "routing": self.routing,
            "status": self.status,
            "parameters": self.num_params,
            "seeds": len(last),
            "test_error_percent": float(last.mean()) if last.size else None,
            "deviation_percent": float(last.std(ddof=1)) if last.size > 1 else None,
            "images_per_second": self.images_per_second,
            "memory_bytes": self.memory_bytes,
            "coupling_entropy": float(np.mean(entropies)) if last.size else None,
        }


def folder_of_routing(routing: str) -> str:
    """The name of its run folder in that of a comparison."""
    return re.sub(r"[^\w.,=+-]", "-", routing)


def median_speed(folders: SeedFolders) -> float:
    """Read the training images per second of runs from their metrics: median over the chunks but the first; 0 if none.

    The first chunk is compiled. Seeds that train side by side all have the speed of their group.
    """
    paths = [folders.run(seed).folder / METRICS for seed in folders.seeds[:: max(folders.at_once, 1)]]
    lines = [line for path in paths if path.exists() for line in read_lines(path)[0]]
    speeds = [line["images_per_second"] for line in lines if line["kind"] == "chunk"]
    return statistics.median(speeds[1:] or speeds or [0.0])


def open_folder(folder: Path, depends_on: Mapping[str, Any]) -> dict[str, Result]:
    """Makes the folder of a comparison, or reads what it holds of one that stopped.

    Raises:
        UsageError: the folder holds a comparison of another config or something else, or cannot be written or read.
    """
    path = folder / CONFIG
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            replace_file(path, json.dumps(depends_on, indent=2) + "\n")
            return {}
        before = json.loads(path.read_text())
        results = read_results(folder)
    except OSError as error:
        raise UsageError(f"The output folder {folder} cannot be used: {error.strerror}.") from error
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"The output folder {folder} holds no comparison that can be read: {error}.") from error
    changes = differences(before, depends_on)
    if changes:
        raise UsageError(f"The output folder {folder} holds another comparison: {'; '.join(changes)}.")
    return results


def read_results(folder: Path) -> dict[str, Result]:
    """The results of a folder by routing; a last line that was not finished does not count."""
    path = folder / RESULTS
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    results = [Result.from_json(json.loads(line)) for line in lines]
    for result in results:
        result.summary()  # raises if values are missing
    return {result.routing: result for result in results}


def write_results(folder: Path, results: Iterable[Result]) -> None:
    """Writes the results, a line for each routing."""
    replace_file(folder / RESULTS, "".join(json.dumps(asdict(result)) + "\n" for result in results))


def write_report(folder: Path, results: Iterable[Result]) -> None:
    """Writes the table, as Markdown and CSV, and the figure."""
    results = list(results)
    replace_file(folder / TABLE, f"{table(results)}\n\n{NOTES}\n")
    rows = [result.summary() for result in results]
    sheet = io.StringIO()
    writer = csv.DictWriter(sheet, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_file(folder / SHEET, sheet.getvalue())
    errors = {result.routing: result.test_errors for result in results if result.status == "ok"}
    failures = {result.routing: result.status for result in results if result.status != "ok"}
    comparison_figure(errors, failures).savefig(folder / FIGURE)


def table(results: Iterable[Result]) -> str:
    """The results as a Markdown table."""
    return markdown_table([HEADINGS, *map(cells, results)])


def cells(result: Result) -> list[str]:
    """The row of a routing."""
    row = result.summary()

    def number(name: str, decimals: int, unit: float = 1) -> str:
        value = row[name]
        return "-" if value is None or not math.isfinite(value) else f"{value / unit:,.{decimals}f}"

    return [
        result.routing,
        number("parameters", 0),
        number("test_error_percent", 2) if result.status == "ok" else result.status,
        number("deviation_percent", 2),
        number("images_per_second", 0),
        number("memory_bytes", 0, unit=1e6),
        number("coupling_entropy", 2),
    ]
