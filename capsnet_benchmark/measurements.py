"""What is measured, and how rows take turns."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from capsnet_benchmark.processes import Worker, WorkerError

MEASUREMENTS = {
    "step": "a training step: forward, losses, backward, Adam",
    "inference": "class capsules of a batch, without gradients",
    "routing": "the last capsule layer alone, forward and backward",
    "stem": "the convolutions below the primary capsules, forward and backward",
    "primary": "the primary capsules, forward and backward",
    "votes": "the prediction vectors of the last capsule layer alone, forward and backward",
    "decoder": "the decoder, forward and backward",
    "optimizer": "the update of Adam",
    "augmentation": "random shifts of a batch",
    "dispatch": "a training step with random shifts, until the host is free for the next",
    "epoch": "training on 60,000 images with random shifts, and evaluation on 10,000",
    "gemm": "a large product of square matrices, whose speed is the limit",
}
"""By name, in the order in which they are done: memory is read after the first."""

TRAIN_IMAGES, TEST_IMAGES = 60000, 10000  # of MNIST
GEMM_SIZES = {"cpu": 2048, "gpu": 8192}  # rows and columns; large enough that larger ones are no faster


@dataclass
class Samples:
    """What was measured, for each row.

    Attributes:
        seconds: those of each sample of each measurement.
        first_seconds: those of the first call of each measurement, with compilation.
        peak_memory: bytes, after training steps alone; None if that is not known.
        left_out: why the row was given up.
    """

    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    first_seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    peak_memory: dict[str, int | None] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def measure(
    workers: Sequence[Worker], names: Sequence[str], *, rounds: int, may_fail: Sequence[str] = ()
) -> Iterator[Samples]:
    """Takes the samples of all measurements, in each of them one row after the other, round by round.

    Args:
        workers: one for each row, in the order in which they take turns.
        names: of the measurements.
        rounds: number of samples of each row.
        may_fail: rows that are left out from where they fail.

    Returns:
        What there is after each measurement; always the same object.

    Raises:
        WorkerError: any other row failed.
    """
    workers = list(workers)
    samples = Samples({worker.row: {} for worker in workers}, {worker.row: {} for worker in workers})
    for number, name in enumerate(names, 1):
        print(f"{name} ({number} of {len(names)}): {MEASUREMENTS[name]}", file=sys.stderr)
        for worker in list(workers):
            try:
                samples.first_seconds[worker.row][name] = worker.prepare(name)
            except WorkerError as error:
                if worker.row not in may_fail:
                    raise
                samples.left_out[worker.row] = str(error)
                print(f"{worker.row} is left out from here on. {error}", file=sys.stderr)
                workers.remove(worker)
        taken: dict[str, list[float]] = {worker.row: [] for worker in workers}
        for _ in range(rounds):
            for worker in workers:
                taken[worker.row].append(worker.sample(name))
        for worker in workers:
            samples.seconds[worker.row][name] = taken[worker.row]
            if name == "step":
                samples.peak_memory[worker.row] = worker.peak_memory()
        yield samples
