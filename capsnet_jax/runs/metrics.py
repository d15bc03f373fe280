"""Metrics of a run while it trains: a file of JSON lines, and TensorBoard events."""

import json
import os
from pathlib import Path
from typing import Any

from capsnet_jax.errors import UsageError
from capsnet_jax.files import replace_file
from capsnet_jax.train.memory import peak_memory
from capsnet_jax.train.progress import Progress, SeedProgress

METRICS, EVENTS = "metrics.jsonl", "tensorboard"


class MetricsLog:
    """Writer of the metrics of a run: one line for every chunk of steps, and another for every epoch.

    Each line has "kind" ("chunk" or "epoch"), "epoch" and "step". Means over the steps of the chunk or epoch are
    "loss", "margin", "reconstruction", "accuracy" and "gradient_norm". "learning_rate" is the rate of the last step,
    "images_per_second" the training speed since the program started, and "peak_memory_bytes" the peak so far. A line of
    an epoch also has "test_accuracy" and, with validation images, "validation_accuracy".

    Args:
        folder: folder of the run.
        step: number of training steps done. Lines of later steps, from before a crash, are dropped.
        tensorboard: whether to write TensorBoard events as well.

    Attributes:
        best: best accuracy on validation images so far, or None.

    Raises:
        UsageError: TensorBoard's writer is not installed, or existing lines cannot be read.
    """

    def __init__(self, folder: Path, *, step: int = 0, tensorboard: bool = False):
        path = folder / METRICS
        kept = [line for line in read_lines(path) if line["step"] <= step] if path.exists() else []
        validations = [line["validation_accuracy"] for line in kept if "validation_accuracy" in line]
        self.best: float | None = max(validations, default=None)
        replace_file(path, "".join(json.dumps(line) + "\n" for line in kept))
        # `purge_step` makes TensorBoard hide events of later steps, from before a crash.
        self._events = event_writer_class()(str(folder / EVENTS), purge_step=step + 1) if tensorboard else None
        self._file = path.open("a")
        self._steps, self._seconds = 0, 0.0  # in this epoch; the seconds are divided by the batch size
        self._step = step

    def write(self, progress: Progress, seed: SeedProgress) -> bool:
        """Write a line for a chunk and, at the end of an epoch, one for the epoch.

        Returns:
            Whether the weights are the best on validation images so far. Of equal accuracies, the last is the best.
        """
        self._add("chunk", progress, progress.images_per_second, seed.chunk, {})
        steps, self._step = progress.step - self._step, progress.step
        self._steps, self._seconds = self._steps + steps, self._seconds + steps / progress.images_per_second
        if not progress.ends_epoch:
            return False
        evaluations = {"validation_accuracy": seed.validation, "test_accuracy": seed.test}
        accuracies = {name: value.accuracy for name, value in evaluations.items() if value is not None}
        self._add("epoch", progress, self._steps / self._seconds, seed.epoch, accuracies)
        self._steps, self._seconds = 0, 0.0
        reached = accuracies.get("validation_accuracy")
        if reached is None or (self.best is not None and reached < self.best):
            return False
        self.best = reached
        return True

    def sync(self) -> None:
        """Flush all lines to disk, which must happen before a checkpoint relies on them."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()

    def _add(
        self, kind: str, progress: Progress, speed: float, means: dict[str, float], accuracies: dict[str, float]
    ) -> None:
        total, *parts = means.items()
        values = {"loss": total[1], **dict(parts), **accuracies, "learning_rate": progress.learning_rate}
        line = {"kind": kind, "epoch": progress.epoch, "step": progress.step, **values}
        line |= {"images_per_second": speed, "peak_memory_bytes": peak_memory()}
        self._file.write(json.dumps(line) + "\n")
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(f"{kind}/{name}", value, progress.step)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a metrics file. A last line without a line break, from a crash while it was written, is ignored.

    Raises:
        UsageError: the file cannot be read, or a line is not the metrics of a chunk or an epoch.
    """
    try:
        texts = path.read_text(encoding="utf-8").split("\n")[:-1]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}.") from error
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            lines.append(json.loads(text))
        except (ValueError, RecursionError):
            lines.append({})
        if not _is_metrics(lines[-1]):
            raise UsageError(
                f"{path}, line {number}, begins with {text[:40]!a}; expected the metrics of a chunk or an epoch."
            )
    return lines


def _is_metrics(line: Any) -> bool:
    if not isinstance(line, dict) or line.get("kind") not in ("chunk", "epoch"):
        return False
    counts = [line.get("epoch"), line.get("step")]
    numbers = [value for name, value in line.items() if name != "kind" and value is not None]
    return all(type(count) is int and count >= 1 for count in counts) and all(
        isinstance(number, int | float) for number in numbers
    )


def read_metrics(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Read the metrics of a run, of all chunks or of all epochs; none if it has no metrics file.

    Args:
        folder: folder of the run.
        kind: "chunk" or "epoch".

    Raises:
        UsageError: the file cannot be read, or a line is not the metrics of a chunk or an epoch.
    """
    path = folder / METRICS
    return [line for line in read_lines(path) if line["kind"] == kind] if path.exists() else []


def event_writer_class() -> Any:
    """Import the class that writes TensorBoard events.

    Raises:
        UsageError: it is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UsageError(
            f"--tensorboard needs tensorboardX: pip install 'capsnet-jax[tensorboard]' ({error})."
        ) from error
    return SummaryWriter
