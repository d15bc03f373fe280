"""Progress of training after every chunk of steps, as data and as a progress bar or lines of text."""

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
    """Metrics of the training from one seed after a chunk of steps.

    Attributes:
        seed: the seed.
        chunk: fields of `StepMetrics`, averaged over the steps of the chunk.
        epoch: the same, averaged over the steps of the epoch so far.
        validation: evaluation on all validation images, after the last chunk of an epoch; otherwise None.
        test: evaluation on all test images, after the last chunk of an epoch; otherwise None.
    """

    seed: int
    chunk: dict[str, float]
    epoch: dict[str, float]
    validation: Evaluation | None
    test: Evaluation | None


class Progress(NamedTuple):
    """Position, speed and metrics of training after a chunk of steps.

    Attributes:
        epoch: number of the epoch, from 1.
        step: number of training steps done in all epochs.
        steps_per_epoch: number of training steps in an epoch.
        learning_rate: learning rate of the last step.
        images_per_second: training speed in this chunk, over all seeds. The first chunk includes compilation.
        seeds: metrics of each seed.
    """

    epoch: int
    step: int
    steps_per_epoch: int
    learning_rate: float
    images_per_second: float
    seeds: tuple[SeedProgress, ...]

    @property
    def ends_epoch(self) -> bool:
        """Whether this is the last chunk of an epoch."""
        return self.step % self.steps_per_epoch == 0

    @property
    def losses(self) -> dict[str, float]:
        """Fields of `StepMetrics`, averaged over the steps of the epoch so far and over the seeds."""
        return {name: float(np.mean([seed.epoch[name] for seed in self.seeds])) for name in StepMetrics._fields}

    @property
    def test_accuracy(self) -> float | None:
        """Accuracy on all test images, averaged over the seeds, after the last chunk of an epoch; otherwise None."""
        return _mean_accuracy([seed.test for seed in self.seeds])

    @property
    def validation_accuracy(self) -> float | None:
        """Accuracy on all validation images, averaged over the seeds, after the last chunk of an epoch, or None."""
        return _mean_accuracy([seed.validation for seed in self.seeds])


def show_progress(training: Iterator[Progress], *, epochs: int, console: Console, start: int = 0) -> Iterator[Progress]:
    """Show the progress of training and pass it on: as a progress bar in a terminal, as lines of text elsewhere.

    Args:
        training: the iterator over the progress of training.
        epochs: number of epochs of the whole training.
        console: the console to print to.
        start: number of training steps done before.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, TextColumn("{task.fields[state]}"), console=console, disable=not console.is_terminal) as bar:
        task, shown = bar.add_task("compiling", completed=start, total=None, state=""), time.monotonic()
        for progress in training:
            epoch, losses = f"epoch {progress.epoch}/{epochs}", progress.losses
            state = f"loss {losses['total']:.4f}  accuracy {losses['accuracy']:.4f}  "
            state += f"{progress.images_per_second:.0f} images/s"
            total = epochs * progress.steps_per_epoch
            bar.update(task, completed=progress.step, total=total, description=epoch, state=state)
            is_due = not console.is_terminal and time.monotonic() - shown > SECONDS_BETWEEN_LINES
            if progress.ends_epoch or is_due:
                shown = time.monotonic()
                line = f"{epoch}  step {progress.step}  {state}"
                for name, value in (("validation", progress.validation_accuracy), ("test", progress.test_accuracy)):
                    line += "" if value is None else f"  {name} accuracy {value:.4f}"
                console.print(line, soft_wrap=True)
            yield progress


def _mean_accuracy(evaluations: list[Evaluation | None]) -> float | None:
    accuracies = [evaluation.accuracy for evaluation in evaluations if evaluation is not None]
    return float(np.mean(accuracies)) if accuracies else None
