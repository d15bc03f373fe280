"""Training of a model that is there already, without a folder: what a script or a notebook asks for."""

from collections.abc import Iterator, Sequence

from flax import nnx

from capsnet_jax.config import TrainingConfig
from capsnet_jax.data import Dataset
from capsnet_jax.nn.model import CapsNet
from capsnet_jax.train.loop import Trainer
from capsnet_jax.train.progress import Progress


def fit(
    model: CapsNet,
    dataset: Dataset,
    config: TrainingConfig,
    *,
    augment: Sequence[str] = (),
    stream: bool | None = None,
) -> Iterator[Progress]:
    """Trains a model, and tells how far it is after every chunk of steps.

    Args:
        model: the initial weights; at the end of every epoch it is given the weights of then.
        dataset: training and test images; only the former are changed.
        config: epochs, batch size, learning rate and so on.
        augment: names of the random changes; see `Augmentation`.
        stream: as for `Trainer`.

    Returns:
        An iterator; what it does is done while it is gone through.

    Raises:
        UsageError: at once, as `Trainer`.
        NonFiniteLossError: names the first step whose loss or gradient is not finite.
    """
    trainer = Trainer(lambda seed: model, dataset, config, augment=augment, stream=stream)

    def run() -> Iterator[Progress]:
        for progress in trainer.run():
            if progress.ends_epoch:
                nnx.update(model, nnx.state(trainer.models()[0], (nnx.Param, nnx.BatchStat)))
            yield progress

    return run()
