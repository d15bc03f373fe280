"""How far training is: a live bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from capsnet_jax.train.progress import Progress

SECONDS_BETWEEN_LINES = 30


def show_progress(training: Iterator[Progress], *, epochs: int, console: Console, start: int = 0) -> Iterator[Progress]:
    """Passes on what training tells, and shows it; it goes on from step `start`."""
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
    evaluations = (("validation", progress.validation), ("test", progress.test))
    accuracies = [f"  {name} accuracy {value.accuracy:.4f}" for name, value in evaluations if value is not None]
    return f"epoch {progress.epoch}/{epochs}  step {progress.step}  {_state(progress)}{''.join(accuracies)}"


def _state(progress: Progress) -> str:
    losses = progress.losses
    return f"loss {losses['total']:.4f}  accuracy {losses['accuracy']:.4f}  {progress.images_per_second:.0f} images/s"
