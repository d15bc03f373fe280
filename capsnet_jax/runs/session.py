"""Training that survives a crash: runs from one or several seeds, with metrics, checkpoints and weights in folders."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import NamedTuple

import jax
from rich.console import Console

from capsnet_jax.errors import StoppedBySignalError, UsageError
from capsnet_jax.runs.checkpoint import Checkpoints
from capsnet_jax.runs.folder import BEST, Run
from capsnet_jax.runs.metrics import MetricsLog
from capsnet_jax.runs.seeds import SeedFolders, groups_of_seeds
from capsnet_jax.train.evaluation import Evaluation
from capsnet_jax.train.loop import Trainer
from capsnet_jax.train.progress import Progress, show_progress
from capsnet_jax.train.sharding import any_process, failing_together, same_everywhere


class TrainedGroup(NamedTuple):
    """Runs that were trained side by side to the last epoch.

    Attributes:
        trainer: holds their last weights.
        runs: one for each seed.
        tests: evaluation of each on all test images.
    """

    trainer: Trainer
    runs: list[Run]
    tests: list[Evaluation]


def train_runs(
    trainer: Trainer,
    folders: SeedFolders,
    *,
    at_once: int = 0,
    resume: bool = False,
    tensorboard: bool = False,
    console: Console,
) -> Iterator[TrainedGroup]:
    """Train a run from each seed, in groups side by side, from wherever their folders stand, and yield each group.

    Args:
        trainer: of any seeds of the config.
        folders: of the runs; they exist.
        at_once: number of seeds in a group; 0 for as many as fit in memory. Runs that were begun stay in their groups.
        resume: whether it is told that there is no checkpoint.
        tensorboard: whether TensorBoard events are written.
        console: where progress is shown.

    Raises:
        StoppedBySignalError: SIGTERM or SIGINT asked for it; a checkpoint of then is written.
        NonFiniteLossError: names the first step whose loss or gradient is not finite.
        UsageError: a folder cannot be used, or its checkpoints are of another config or version.
    """
    for group in groups_of_seeds(trainer, folders.seeds, at_once=folders.at_once or at_once):
        with failing_together():
            if not folders.at_once and jax.process_index() == 0:
                folders.keep_together(len(group.seeds))
        runs = [folders.run(seed) for seed in group.seeds]
        session = Session(
            group,
            runs,
            folders.checkpoints(group.seeds),
            tensorboard=tensorboard,
            warn=lambda message: console.print(f"warning: {message}", soft_wrap=True),
        )
        if len(group.seeds) < len(folders.seeds):
            console.print(f"seeds {group.seeds[0]} to {group.seeds[-1]}")
        if session.start:
            console.print(f"Going on after step {session.start} of {group.last_step}")
        elif resume:
            console.print("There is no checkpoint to resume from; training begins.")
        tests: list[Evaluation] = []
        for progress in show_progress(
            session.train(), epochs=group.config.epochs, start=session.start, console=console
        ):
            tests = [seed.test for seed in progress.seeds if seed.test is not None]
        yield TrainedGroup(group, runs, tests or [group.evaluate_test(index) for index in range(len(runs))])


class Session:
    """Training of runs that differ in their seed only, side by side, recorded in their folders.

    Args:
        trainer: of the seeds of these runs.
        runs: one for each seed; their folders exist.
        checkpoints: folder of the checkpoints of all of them.
        tensorboard: whether TensorBoard events are written.
        warn: is called with a sentence about each checkpoint that cannot be used.

    Attributes:
        start: number of training steps done before; 0 if there was no checkpoint.

    Raises:
        UsageError: a folder cannot be used, its checkpoints are of another config, or of later steps than the last one.
    """

    def __init__(
        self,
        trainer: Trainer,
        runs: Sequence[Run],
        checkpoints: Path,
        *,
        tensorboard: bool = False,
        warn: Callable[[str], None] = print,
    ):
        config = trainer.config
        self.trainer, self.runs = trainer, runs
        self._checkpoints = Checkpoints(
            checkpoints,
            keep=config.keep_checkpoints,
            depends_on=runs[0].depends_on() | {"seeds": list(trainer.seeds)},
            warn=warn,
        )
        with failing_together():
            found = self._checkpoints.restore(trainer.snapshot)
        if found is not None:
            trainer.snapshot = trainer.on_devices(found)
        self.start = trainer.step
        if not same_everywhere(self.start):
            raise UsageError(
                f"The processes see different checkpoints in {checkpoints}; expected a folder of all hosts."
            )
        if self.start > trainer.last_step:
            raise UsageError(f"epochs is {config.epochs}, {trainer.last_step} steps, with {self.start} steps done.")
        self._is_primary = jax.process_index() == 0
        with failing_together():
            for run in runs if self._is_primary else ():
                run.write_config()  # the number of epochs may be another
            self._logs = [
                MetricsLog(run.folder, step=self.start, tensorboard=tensorboard)
                for run in (runs if self._is_primary else ())
            ]

    def train(self) -> Iterator[Progress]:
        """Train to the last epoch, and yield the progress after every chunk of steps.

        Raises:
            StoppedBySignalError: SIGTERM or SIGINT asked for it; a checkpoint of then is written.
            NonFiniteLossError: names the first step whose loss or gradient is not finite.
            UsageError: a file cannot be written.
        """
        saved = time.monotonic()
        try:
            with StopSignals() as signals:
                for progress in self.trainer.run():
                    with failing_together():
                        is_best = self._record(progress)
                    due = time.monotonic() - saved >= 60 * self.trainer.config.save_minutes
                    is_best, stop, due = any_process(is_best, signals.received is not None, due)
                    if is_best or stop or due or progress.step == self.trainer.last_step:
                        self._save(progress)
                        saved = time.monotonic()
                    yield progress
                    if stop:
                        self._checkpoints.wait()
                        raise StoppedBySignalError(signals.received or signal.SIGTERM, progress.step)
            if self.start == self.trainer.last_step:
                self._save_weights()  # in case that it was stopped between the last checkpoint and these
        except OSError as error:
            folder = self.runs[0].folder
            raise UsageError(
                f"The metrics in {folder} cannot be written; --resume when that is mended: {error}."
            ) from error
        finally:
            for log in self._logs:
                log.close()
            self._checkpoints.close()

    def _record(self, progress: Progress) -> bool:
        """Write the metrics, and the weights that are best on validation; return whether any are."""
        is_best = False
        for index, log in enumerate(self._logs):
            if log.write(progress, progress.seeds[index]):
                self.runs[index].save_weights(self.trainer.models()[index], BEST)
                is_best = True
        return is_best

    def _save(self, progress: Progress) -> None:
        with failing_together():
            for log in self._logs:
                log.sync()
        with failing_together():
            self._checkpoints.save(self.trainer.snapshot, validation=progress.validation_accuracy)
            self._save_weights()

    def _save_weights(self) -> None:
        if self._is_primary:
            for run, model in zip(self.runs, self.trainer.models(), strict=True):
                run.save_weights(model)


class StopSignals:
    """Within its block, SIGTERM and SIGINT are only remembered; a second one is a KeyboardInterrupt.

    Attributes:
        received: the one that came, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # others cannot have handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
