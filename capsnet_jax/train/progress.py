"""Progress of a training after every chunk of steps: as data, and as a live bar or plain lines."""

import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from capsnet_jax.train.evaluation import Evaluation
from capsnet_jax.train.step import StepMetrics

SECONDS_BETWEEN_LINES = 30


class SeedProgress(NamedTuple):
    """Metrics of the training from one seed after a chunk.

    Attributes:
        seed: the number.
        chunk: the fields of `StepMetrics`, as means over the steps of the chunk.
        epoch: the same over the steps of the epoch so far.
        validation: evaluation on all validation images, after the last chunk of an epoch.
        test: the same on all test images.
    """

    seed: int
    chunk: dict[str, float]
    epoch: dict[str, float]
    validation: Evaluation | None
    test: Evaluation | None


class Progress(NamedTuple):
    """Position, speed and metrics of a training after a chunk of steps.

    Attributes:
        epoch: number of the epoch, from 1.
        step: number of training steps done, over all epochs.
        steps_per_epoch: number of training steps in an epoch.
        learning_rate: step size in the last of the steps.
        images_per_second: speed of training in this chunk, over all seeds; the first one includes compilation.
        seeds: the metrics of each seed.
    """

    epoch: int
    step: int
    steps_per_epoch: int
    learning_rate: float
    images_per_second: float
    seeds: tuple[SeedProgress, ...]

    @property
    def ends_epoch(self) -> bool:
        return self.step % self.steps_per_epoch == 0

    @property
    def losses(self) -> dict[str, float]:
        """The metrics of the epoch so far, as means over the seeds."""
        return {name: float(np.mean([seed.epoch[name] for seed in self.seeds])) for name in StepMetrics._fields}

    @property
    def test_accuracy(self) -> float | None:
        """On all test images, after the last chunk of an epoch; mean over the seeds."""
        return _mean_accuracy(seed.test for seed in self.seeds)

    @property
    def validation_accuracy(self) -> float | None:
        """On all validation images, after the last chunk of an epoch; mean over the seeds."""
        return _mean_accuracy(seed.validation for seed in self.seeds)


def show_progress(training: Iterator[Progress], *, epochs: int, console: Console, start: int = 0) -> Iterator[Progress]:
    """Pass on the progress of a training, and show it: as a bar on a terminal, as lines elsewhere.

    Args:
        training: yields its progress.
        epochs: number of epochs of the whole training.
        console: where it is shown.
        start: number of training steps done before.
    """
    if console.is_terminal:
        yield from _show_bar(training, epochs, console, start)
    else:
        yield from _show_lines(training, epochs, console)


def _show_bar(training: Iterator[Progress], epochs: int, console: Console, start: int) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, TextColumn("{task.fields[state]}"), console=console) as bar:
        task = bar.add_task("compiling", completed=start, total=None, state="")
        for progress in training:
            total = epochs * progress.steps_per_epoch
            description = f"epoch {progress.epoch}/{epochs}"
            bar.update(task, completed=progress.step, total=total, description=description, state=_state(progress))
            if progress.ends_epoch:
                bar.console.print(_line(progress, epochs))
            yield progress


def _show_lines(training: Iterator[Progress], epochs: int, console: Console) -> Iterator[Progress]:
    last = time.monotonic()
    for progress in training:
        if progress.ends_epoch or time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            console.print(_line(progress, epochs), soft_wrap=True)
        yield progress


def _line(progress: Progress, epochs: int) -> str:
    accuracies = {"validation": progress.validation_accuracy, "test": progress.test_accuracy}
    told = [f"  {name} accuracy {accuracy:.4f}" for name, accuracy in accuracies.items() if accuracy is not None]
    return f"epoch {progress.epoch}/{epochs}  step {progress.step}  {_state(progress)}{''.join(told)}"


def _state(progress: Progress) -> str:
    losses = progress.losses
    return f"loss {losses['total']:.4f}  accuracy {losses['accuracy']:.4f}  {progress.images_per_second:.0f} images/s"


def _mean_accuracy(evaluations: Iterator[Evaluation | None]) -> float | None:
    accuracies = [evaluation.accuracy for evaluation in evaluations if evaluation is not None]
    return float(np.mean(accuracies)) if accuracies else None
