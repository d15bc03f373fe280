"""A training that survives: metrics, checkpoints and weights of runs, from wherever their folders stand."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from capsnet_jax.errors import StoppedBySignalError, UsageError
from capsnet_jax.runs.checkpoint import Checkpoints
from capsnet_jax.runs.folder import BEST, Run
from capsnet_jax.runs.metrics import MetricsLog
from capsnet_jax.runs.signals import StopSignals
from capsnet_jax.train.loop import Trainer
from capsnet_jax.train.progress import Progress
from capsnet_jax.train.sharding import any_process, failing_together, same_everywhere


class Session:
    """Training of runs that differ in their seed only, recorded in their folders.

    Args:
        trainer: of the seeds of these runs.
        runs: one for each seed; their folders exist.
        checkpoints: folder of the checkpoints of all of them.
        tensorboard: whether TensorBoard events are written.
        warn: is told of checkpoints that cannot be used.

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
        """Trains to the last epoch, and tells how far it is after every chunk of steps.

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
        """Writes the metrics, and the weights that are best on validation; tells whether any are."""
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
        validation = progress.validation
        with failing_together():
            self._checkpoints.save(
                self.trainer.snapshot, validation=None if validation is None else validation.accuracy
            )
            self._save_weights()

    def _save_weights(self) -> None:
        if self._is_primary:
            for run, model in zip(self.runs, self.trainer.models(), strict=True):
                run.save_weights(model)
