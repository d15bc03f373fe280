"""The folder of a comparison of routings: runs and a result for each routing, a table and a figure."""

import csv
import io
import json
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
from capsnet_jax.runs.folder import Run, SeedFolders
from capsnet_jax.runs.metrics import read_metrics
from capsnet_jax.tables import markdown_table, number_cell

CONFIG, RESULTS = "config.json", "results.jsonl"
TABLE, SHEET, FIGURE = "comparison.md", "comparison.csv", "comparison.png"

HEADINGS = ("routing", "parameters", "test error %", "deviation", "images/s", "memory MB", "coupling entropy")
NOTES = """\
Test error: of the weights after the last epoch, on all test images; mean over the seeds, and sample standard deviation.
Images/s: training images per second, of all seeds that train side by side, without compilation. Memory: of the compiled
training program of these seeds, as reported by XLA. Coupling entropy: of the last capsule layer, on test images; 1.00
if every input capsule is coupled equally to all outputs, 0.00 if every input capsule is coupled to a single output."""


@dataclass(frozen=True)
class SeedOutcome:
    """Result of a routing from one seed: mean training loss and test error (a fraction) of each epoch."""

    seed: int
    train_loss: list[float]
    test_error: list[float]
    coupling_entropy: float

    @classmethod
    def of(cls, run: Run, coupling_entropy: float) -> "SeedOutcome":
        """Read the result of a finished run from its metrics."""
        epochs = read_metrics(run.folder, "epoch")
        return cls(
            seed=run.config.training.seed,
            train_loss=[line["loss"] for line in epochs],
            test_error=[1 - line["test_accuracy"] for line in epochs],
            coupling_entropy=coupling_entropy,
        )


@dataclass(frozen=True)
class Result:
    """Result of a routing.

    Attributes:
        status: "ok", or the step at which it diverged; `seeds` are then those that finished before.
    """

    routing: str
    status: str
    num_params: int
    seeds_at_once: int
    memory_bytes: int
    images_per_second: float
    seeds: list[SeedOutcome]

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Result":
        """Create a result from the output of `dataclasses.asdict`."""
        return cls(**{**fields, "seeds": [SeedOutcome(**seed) for seed in fields["seeds"]]})

    @property
    def test_errors(self) -> np.ndarray:
        """Test errors in percent, `[seeds epochs]`."""
        return 100 * np.array([seed.test_error for seed in self.seeds])

    def summary(self) -> dict[str, Any]:
        """Return the row of the comparison; values that do not exist are None."""
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
    """Return the name of the folder of a routing."""
    return re.sub(r"[^\w.,=+-]", "-", routing)


def median_speed(folders: SeedFolders) -> float:
    """Return the training images per second: median over all chunks but the first, which compiles; 0 if none.

    Seeds that train side by side all report the speed of their group.
    """
    runs = [folders.run(seed) for seed in folders.seeds[:: max(folders.at_once, 1)]]
    speeds = [line["images_per_second"] for run in runs for line in read_metrics(run.folder, "chunk")]
    return statistics.median(speeds[1:] or speeds or [0.0])


def open_folder(folder: Path, depends_on: Mapping[str, Any]) -> dict[str, Result]:
    """Create the folder of a comparison, or read the results of one that was stopped.

    Args:
        folder: the output folder.
        depends_on: what results depend on, of JSON types; saved, and compared on the next call.

    Raises:
        UsageError: the folder holds a comparison of another config or something else, or cannot be read or written.
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
        raise UsageError(
            f"The output folder {folder} holds another comparison: {'; '.join(changes)}; expected a new --output, or "
            "the same options."
        )
    return results


def read_results(folder: Path) -> dict[str, Result]:
    """Read the results of a folder, by routing. An incomplete last line is ignored."""
    path = folder / RESULTS
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    results = [Result.from_json(json.loads(line)) for line in lines]
    for result in results:
        result.summary()  # raises if values are missing
    return {result.routing: result for result in results}


def write_results(folder: Path, results: Iterable[Result]) -> None:
    """Write the results, one line per routing, the table as Markdown and CSV, and the figure."""
    results = list(results)
    rows = [result.summary() for result in results]
    replace_file(folder / RESULTS, "".join(json.dumps(asdict(result)) + "\n" for result in results))
    replace_file(folder / TABLE, f"{table(results)}\n\n{NOTES}\n")
    sheet = io.StringIO()
    writer = csv.DictWriter(sheet, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_file(folder / SHEET, sheet.getvalue())
    errors = {result.routing: result.test_errors for result in results if result.status == "ok"}
    failures = {result.routing: result.status for result in results if result.status != "ok"}
    comparison_figure(errors, failures).savefig(folder / FIGURE)


def table(results: Iterable[Result]) -> str:
    """Format the results as a Markdown table."""
    rows = [
        [
            row["routing"],
            number_cell(row["parameters"], 0),
            number_cell(row["test_error_percent"], 2) if row["status"] == "ok" else row["status"],
            number_cell(row["deviation_percent"], 2),
            number_cell(row["images_per_second"], 0),
            number_cell(row["memory_bytes"] / 1e6, 0),
            number_cell(row["coupling_entropy"], 2),
        ]
        for row in (result.summary() for result in results)
    ]
    return markdown_table([HEADINGS, *rows])
