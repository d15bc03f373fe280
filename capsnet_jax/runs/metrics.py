"""What a run tells of itself while it trains: a file of JSON lines, and TensorBoard events."""

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
    """The metrics of a run: a line for every chunk of steps, and another for every epoch.

    Each has "kind" ("chunk" or "epoch"), "epoch", "step", the means "loss", "margin", "reconstruction", "accuracy" and
    "gradient_norm" over the steps of the chunk or epoch, "learning_rate" of its last step, "images_per_second" of its
    training steps since the program was started, and "peak_memory_bytes" so far. That of an epoch has "test_accuracy"
    and, if there are such images, "validation_accuracy", too.

    Args:
        folder: of the run.
        step: number of training steps done; lines of later ones, from before a crash, are dropped.
        tensorboard: whether TensorBoard events are written as well.

    Attributes:
        best: the best accuracy on validation so far, or None. Of equal ones the last counts.

    Raises:
        UsageError: TensorBoard's writer is not installed.
    """

    def __init__(self, folder: Path, *, step: int = 0, tensorboard: bool = False):
        path = folder / METRICS
        lines = read_lines(path)[0] if path.exists() else []
        kept = [line for line in lines if line["step"] <= step]
        validations = [line["validation_accuracy"] for line in kept if "validation_accuracy" in line]
        self.best: float | None = max(validations, default=None)
        replace_file(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._events = new_event_writer(folder / EVENTS, step) if tensorboard else None
        self._file = path.open("a")
        self._steps, self._seconds = 0, 0.0  # of the epoch; the latter for an image in each
        self._step = step

    def write(self, progress: Progress, seed: SeedProgress) -> bool:
        """Adds a line for a chunk and, at the end of an epoch, one for that.

        Returns:
            Whether these are the best weights on validation so far.
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
        """Makes sure that all lines are on the disk, before a checkpoint relies on them."""
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


def read_lines(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The lines of a metrics file, and whether the last one was left out as it was not written to its end.

    Raises:
        UsageError: another line cannot be read.
    """
    *whole, rest = path.read_text().split("\n")
    lines = []
    for number, line in enumerate(whole, 1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}, line {number}, is not JSON: {error}.") from error
    return lines, bool(rest)


def event_writer_class() -> Any:
    """The class of TensorBoard's writers.

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


def new_event_writer(folder: Path, step: int) -> Any:
    """A writer of TensorBoard events; those of later steps than this one, from before a crash, are hidden."""
    return event_writer_class()(str(folder), purge_step=step + 1)
