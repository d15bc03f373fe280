"""What training tells of itself after every chunk of steps."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from capsnet_jax.train.evaluation import Evaluation
from capsnet_jax.train.step import StepMetrics


class SeedProgress(NamedTuple):
    """Where the training from one seed stands after a chunk.

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
    """Where training stands after a chunk of steps.

    Attributes:
        epoch: number of the epoch, from 1.
        step: number of training steps done, over all epochs.
        steps_per_epoch: number of training steps in an epoch.
        learning_rate: step size in the last of the steps.
        images_per_second: speed of training in this chunk, over all seeds; the first one of a run is compiled, too.
        seeds: what differs from seed to seed.
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
    def test(self) -> Evaluation | None:
        """Of all seeds together."""
        return _together([seed.test for seed in self.seeds])

    @property
    def validation(self) -> Evaluation | None:
        """Of all seeds together."""
        return _together([seed.validation for seed in self.seeds])


def _together(evaluations: Sequence[Evaluation | None]) -> Evaluation | None:
    counts = [evaluation for evaluation in evaluations if evaluation is not None]
    return Evaluation(*np.sum(counts, axis=0).tolist()) if counts else None
