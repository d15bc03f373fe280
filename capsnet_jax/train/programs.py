"""The programs of a training: chunks of steps, from one seed or several side by side, compiled once for each length."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from capsnet_jax.config import TrainingConfig
from capsnet_jax.data import Dataset
from capsnet_jax.data.augmentation import Augmentation
from capsnet_jax.train.feeding import STREAMED_BYTES
from capsnet_jax.train.memory import compile_lean
from capsnet_jax.train.sharding import along, on_all
from capsnet_jax.train.step import TrainState, make_train_chunk, make_train_step

MOST_STEPS = 1000  # in a program that nobody can stop or watch; the full-size model takes a second or two for them


def steps_per_chunk(dataset: Dataset, config: TrainingConfig, num_seeds: int, *, stream: bool) -> int:
    """Number of training steps that run as one program, unless an epoch has fewer."""
    if config.steps_per_chunk:
        return config.steps_per_chunk
    if jax.default_backend() == "cpu":  # where a loop gains nothing, and the losses are seen the sooner
        return 1
    if not stream:
        return MOST_STEPS
    return max(STREAMED_BYTES // (dataset.train_images[0].nbytes * config.batch_size * num_seeds), 1)


class ChunkPrograms:
    """What trains on a chunk of batches; see `training.make_train_chunk` for arguments and results.

    Args:
        graphdef: of a model in training mode.
        optimizer: what makes an update of the gradient.
        state: shapes and dtypes of the state of one seed.
        dataset: only shapes and dtypes of its training images and labels matter.
        config: what a step does, and the batch size.
        augmentation: random changes of the images.
        mesh: the devices, each of which has its share of every batch.
        num_seeds: trained side by side; several are the first axis of all arguments, but of images given as a whole.
        stream: whether a chunk is given its own images, rather than all images and the indices of its own.

    Attributes:
        train_chunk: not compiled yet; its first argument, the state, is donated.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        optimizer: optax.GradientTransformation,
        state: TrainState,
        dataset: Dataset,
        config: TrainingConfig,
        *,
        augmentation: Augmentation,
        mesh: Mesh,
        num_seeds: int,
        stream: bool,
    ):
        self._state, self._data = state, (dataset.train_images, dataset.train_labels)
        self._batch_size, self._mesh, self._stream = config.batch_size, mesh, stream
        self._seeds_axis = (num_seeds,) if num_seeds > 1 else ()
        self._compiled: dict[int, jax.stages.Compiled] = {}
        train_step = make_train_step(
            graphdef,
            optimizer,
            accumulate=config.accumulate,
            ema_decay=config.ema_decay,
            precision=config.precision,
            loss=config.loss,
            reconstruction_weight=config.reconstruction_weight,
            reconstruction_error=config.reconstruction_error,
        )
        train_chunk = make_train_chunk(train_step, augmentation=augmentation, sharding=along(mesh, 0))
        if num_seeds > 1:
            data = 0 if stream else None
            train_chunk = jax.vmap(train_chunk, in_axes=(0, data, data, 0, 0))
        self.train_chunk: Any = jax.jit(train_chunk, donate_argnums=0)

    def trace(self, length: int) -> None:
        """Goes through a chunk of so many steps without numbers, for what is wrong with it to show."""
        jax.eval_shape(self.train_chunk, *self._arguments(length))

    def compiled(self, length: int) -> jax.stages.Compiled:
        """The program of a chunk of so many steps."""
        if length not in self._compiled:
            self._compiled[length] = compile_lean(self.train_chunk, *self._arguments(length))
        return self._compiled[length]

    def _arguments(self, length: int) -> tuple[Any, ...]:
        """Shapes, dtypes and places of what a chunk of so many steps takes."""
        many = self._seeds_axis
        everywhere, shared = on_all(self._mesh), along(self._mesh, len(many) + 1)

        def shaped(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(many + leaf.shape, leaf.dtype, sharding=everywhere)

        state = jax.tree.map(shaped, self._state)
        key = shaped(jax.eval_shape(lambda: jax.random.key(0)))
        indices = (*many, length, self._batch_size)
        if self._stream:
            batches = [
                jax.ShapeDtypeStruct(indices + array.shape[1:], array.dtype, sharding=shared) for array in self._data
            ]
            return state, *batches, None, key
        whole = [jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=everywhere) for array in self._data]
        return state, *whole, jax.ShapeDtypeStruct(indices, jnp.int32, sharding=shared), key
