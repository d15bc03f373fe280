"""What is measured of a training that is under way: an epoch, and what the host does in a step."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from einops import rearrange

from capsnet_jax.train.loop import Trainer
from capsnet_jax.train.sharding import on_all, place_tree

Calls = list[tuple[Callable[[], Any], int | float]]
"""What a measurement calls, and how often each call counts."""


def dispatch(trainer: Trainer) -> Calls:
    """A step, as part of a chunk that is sent to the device."""
    program, state = trainer.compiled(), trainer.snapshot.state
    order = np.arange(trainer.chunk * trainer.config.batch_size, dtype=np.int32)
    indices = rearrange(order, "(steps b) -> 1 steps b", b=trainer.config.batch_size)
    data = place_tree((trainer.dataset.train_images, trainer.dataset.train_labels, indices), on_all(trainer.mesh))
    key = jax.device_put(jax.random.split(jax.random.key(0), 1), on_all(trainer.mesh))

    def call() -> Any:
        nonlocal state
        state, metrics = program(state, *data, key)
        return metrics

    return [(call, 1 / trainer.chunk)]


def whole_epoch(trainer: Trainer) -> Calls:
    """Training on all images, and the evaluation that ends it."""
    chunks = trainer.run()

    def train_and_evaluate() -> None:
        while not next(chunks).ends_epoch:
            pass

    return [(train_and_evaluate, 1)]


def parts_of_epoch(trainer: Trainer, test_batches: float) -> Calls:
    """A chunk, counted as often as an epoch has them, and the evaluation of a batch, as often as the test set has."""
    chunks = trainer.run()
    return [
        (lambda: next(chunks), trainer.steps_per_epoch / trainer.chunk),
        (trainer.evaluate_test, test_batches),
    ]
