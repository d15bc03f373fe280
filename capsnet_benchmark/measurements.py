"""The measurements, and the loop in which the rows of the table take turns."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from capsnet_benchmark.processes import Worker, WorkerError
from capsnet_jax.train.evaluation import EVALUATION_BATCH

MEASUREMENTS = {
    "step": "a training step: forward, losses, backward, Adam",
    "inference": "class capsules of a batch, without gradients",
    "routing": "the last capsule layer alone, forward and backward",
    "stem": "the convolutions below the primary capsules, forward and backward",
    "primary": "the primary capsules, forward and backward",
    "votes": "the votes of the last capsule layer alone, forward and backward",
    "decoder": "the decoder, forward and backward",
    "optimizer": "the update by Adam",
    "augmentation": "random shifts of a batch",
    "dispatch": "a training step with random shifts, until the host is free for the next",
    "epoch": "training on 60,000 images with random shifts, and evaluation on 10,000",
    "gemm": "a large product of square matrices, whose speed is the limit",
}
"""Descriptions by name, in the order of measurement; peak memory is read after the first."""

SIZES: dict[str, Any] = {
    "shift": 0.1,  # largest shift of training images, as a fraction of their size: as in the reference model
    "train_images": 60000,  # as in MNIST
    "test_images": 10000,
    "evaluation_batch": EVALUATION_BATCH,
    "gemm_sizes": {"cpu": 2048, "gpu": 8192},  # rows and columns; larger products are no faster
}
"""Arguments of both classes `Work`, except the config."""


@dataclass
class Samples:
    """The measurements so far, by row.

    Attributes:
        seconds: all samples of each measurement.
        first_seconds: seconds of the first call of each measurement, which compiles.
        peak_memory: bytes, read after the training steps and before anything else; None if unknown.
        left_out: the error of a row that failed.
    """

    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    first_seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    peak_memory: dict[str, int | None] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def measure(
    workers: Sequence[Worker], names: Sequence[str], *, rounds: int, may_fail: Sequence[str] = ()
) -> Iterator[Samples]:
    """Take samples of each measurement, interleaved: one sample of each row in every round.

    Args:
        workers: a worker for each row, in the order in which they take turns.
        names: keys of `MEASUREMENTS`.
        rounds: number of samples of each row.
        may_fail: rows that are left out after an error.

    Returns:
        The samples so far after each measurement, always as the same object.

    Raises:
        WorkerError: any other row failed.
    """
    workers = list(workers)
    samples = Samples({worker.row: {} for worker in workers}, {worker.row: {} for worker in workers})
    for number, name in enumerate(names, 1):
        print(f"{name} ({number} of {len(names)}): {MEASUREMENTS[name]}", file=sys.stderr)
        for worker in list(workers):
            try:
                samples.first_seconds[worker.row][name] = worker.ask("prepare", name)
            except WorkerError as error:
                if worker.row not in may_fail:
                    raise
                samples.left_out[worker.row] = str(error)
                print(f"{worker.row} is left out from here on. {error}", file=sys.stderr)
                workers.remove(worker)
        rows = [[worker.ask("sample") for worker in workers] for _ in range(rounds)]
        for worker, *seconds in zip(workers, *rows, strict=True):
            samples.seconds[worker.row][name] = seconds
            if name == "step":
                samples.peak_memory[worker.row] = worker.ask("peak_memory")
        yield samples
