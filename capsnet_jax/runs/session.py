"""Training that survives a crash: runs from one or several seeds, with metrics, checkpoints and weights on disk."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from capsnet_jax.errors import StoppedBySignalError, UsageError
from capsnet_jax.runs.checkpoint import Checkpoints
from capsnet_jax.runs.folder import BEST, Run, SeedFolders
from capsnet_jax.runs.lock import locked
from capsnet_jax.runs.metrics import MetricsLog
from capsnet_jax.train.evaluation import Evaluation
from capsnet_jax.train.loop import Trainer
from capsnet_jax.train.memory import available_memory
from capsnet_jax.train.progress import Progress, show_progress
from capsnet_jax.train.sharding import any_process, failing_together, same_everywhere

STOP_SIGNALS = [signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


def train_runs(
    trainer: Trainer,
    folders: SeedFolders,
    *,
    at_once: int = 0,
    resume: bool = False,
    tensorboard: bool = False,
    console: Console,
) -> Iterator[tuple[Trainer, list[Run], list[Evaluation]]]:
    """Train a run from each seed, in groups side by side, starting from the checkpoints in their folders.

    Args:
        trainer: a trainer for any of the seeds.
        folders: folders of the runs, which exist.
        at_once: number of seeds in a group; 0 for as many as fit in memory. Runs that have started keep their groups.
        resume: whether to print that there is no checkpoint.
        tensorboard: whether to write TensorBoard events.
        console: where progress is shown.

    Yields:
        For each group: the trainer with the last weights, the runs, and their evaluations on all test images.

    Raises:
        StoppedBySignalError: one of `STOP_SIGNALS` was received; a checkpoint was saved.
        NonFiniteLossError: the loss or the gradient of a step is not finite.
        UsageError: a folder cannot be used or is in use, or its checkpoints are of another config or version.
    """
    with ExitStack() as held:
        with failing_together():
            if jax.process_index() == 0:  # one of several processes holds the lock for all
                held.enter_context(locked(folders.folder))
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
                console.print(f"Resuming after step {session.start} of {group.last_step}")
            elif resume:
                console.print("There is no checkpoint to resume from; training starts from the beginning.")
            tests: list[Evaluation] = []
            for progress in show_progress(
                session.train(), epochs=group.config.epochs, start=session.start, console=console
            ):
                tests = [seed.test for seed in progress.seeds if seed.test is not None]
            yield group, runs, tests or [group.evaluate_test(index) for index in range(len(runs))]


def groups_of_seeds(trainer: Trainer, seeds: Sequence[int], *, at_once: int = 0) -> Iterator[Trainer]:
    """Yield trainers for groups of seeds that train side by side. They share one compiled program.

    Args:
        trainer: a trainer for any of the seeds.
        seeds: all seeds.
        at_once: number of seeds in a group; 0 for as many as fit in memory.
    """
    # More is faster on CPU, too: three seeds of 144 capsules took 0.45 s per step side by side and 0.53 s one after
    # the other with dynamic routing, 0.90 and 1.21 s with variational; medians on 2 shared cores.
    size = min(at_once or len(seeds), len(seeds))
    trainer = trainer.with_seeds(seeds[:size])
    # All processes must choose the same size, although free memory differs between hosts.
    while size > 1 and not at_once and any_process(trainer.memory() > available_memory())[0]:
        size //= 2
        trainer = trainer.with_seeds(seeds[:size])
    for start in range(0, len(seeds), size):
        yield trainer.with_seeds(seeds[start : start + size])


class Session:
    """Training of runs that differ only in their seed, side by side, with metrics and checkpoints.

    Args:
        trainer: trainer of the seeds of these runs.
        runs: one for each seed; their folders exist.
        checkpoints: folder of the checkpoints that all of them share.
        tensorboard: whether to write TensorBoard events.
        warn: called with a sentence about each checkpoint that cannot be used.

    Attributes:
        start: number of training steps done before; 0 without a checkpoint.

    Raises:
        UsageError: a folder cannot be used, or its checkpoints are of another config or past the last step.
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
        self._writes = runs if jax.process_index() == 0 else ()  # only one of several processes writes
        depends_on = runs[0].depends_on() | {"seeds": list(trainer.seeds)}
        self._checkpoints = Checkpoints(checkpoints, keep=config.keep_checkpoints, depends_on=depends_on, warn=warn)
        with failing_together():
            found = self._checkpoints.restore(trainer.snapshot)
        if found is not None:
            trainer.snapshot = trainer.on_devices(found)
        self.start = trainer.step
        if not same_everywhere(self.start):
            raise UsageError(
                f"The processes see different checkpoints in {checkpoints}; expected a folder that all hosts share."
            )
        if self.start > trainer.last_step:
            raise UsageError(
                f"epochs is {config.epochs}, {trainer.last_step} steps, with {self.start} steps done; expected more "
                "epochs."
            )
        with failing_together():
            for run in self._writes:
                run.write_config()  # the number of epochs may have changed
            self._logs = [MetricsLog(run.folder, step=self.start, tensorboard=tensorboard) for run in self._writes]

    def train(self) -> Iterator[Progress]:
        """Train to the last epoch, and yield the progress after every chunk of steps.

        Raises:
            StoppedBySignalError: one of `STOP_SIGNALS` was received; a checkpoint was saved.
            NonFiniteLossError: the loss or the gradient of a step is not finite.
            UsageError: a file cannot be written.
        """
        saved = time.monotonic()
        try:
            with ExitStack() as opened, stop_signals() as received:
                opened.callback(self._checkpoints.close)
                for log in self._logs:
                    opened.callback(log.close)
                for progress in self.trainer.run():
                    with failing_together():
                        is_best = self._record(progress)
                    due = time.monotonic() - saved >= 60 * self.trainer.config.save_minutes
                    is_best, stop, due = any_process(is_best, bool(received), due)
                    if is_best or stop or due or progress.step == self.trainer.last_step:
                        self._save(progress)
                        saved = time.monotonic()
                    yield progress
                    if stop:
                        self._checkpoints.wait()
                        raise StoppedBySignalError((received or [signal.SIGTERM])[0], progress.step)
                if self.start == self.trainer.last_step:
                    self._save_weights()  # a crash may have come between the last checkpoint and the weights
        except OSError as error:
            folder = self.runs[0].folder
            raise UsageError(f"The metrics in {folder} cannot be written; fix this, then --resume: {error}.") from error

    def _record(self, progress: Progress) -> bool:
        """Write the metrics, and weights that are the best on validation images; return whether any are."""
        best = [log.write(progress, progress.seeds[index]) for index, log in enumerate(self._logs)]
        for index in (index for index, is_best in enumerate(best) if is_best):
            self.runs[index].save_weights(self.trainer.models()[index], BEST)
        return any(best)

    def _save(self, progress: Progress) -> None:
        with failing_together():
            for log in self._logs:
                log.sync()
        with failing_together():
            self._checkpoints.save(self.trainer.snapshot, validation=progress.validation_accuracy)
            self._save_weights()

    def _save_weights(self) -> None:
        if self._writes:
            for run, model in zip(self.runs, self.trainer.models(), strict=True):
                run.save_weights(model)


@contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """Inside this block, `STOP_SIGNALS` are appended to the list that it yields; a second one interrupts.

    Where SIGHUP is ignored, as under `nohup`, it stays ignored.

    Raises:
        KeyboardInterrupt: a second signal was received.
    """
    received: list[signal.Signals] = []

    def receive(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signal.Signals(number))

    before = {}
    if threading.current_thread() is threading.main_thread():  # only this thread can have handlers
        for number in STOP_SIGNALS:
            if number in (signal.SIGTERM, signal.SIGINT) or signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
