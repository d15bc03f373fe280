"""The training loop: epochs of compiled chunks of steps, from one or several seeds side by side, on all devices.

States, metrics, orders of images and random keys have a leading axis of seeds everywhere, for a single seed, too.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int, Key, Shaped

from capsnet_jax.config import TrainingConfig
from capsnet_jax.data import Dataset
from capsnet_jax.data.augmentation import Augmentation
from capsnet_jax.errors import NonFiniteLossError, UsageError
from capsnet_jax.nn.fast.choice import Choice
from capsnet_jax.nn.model import CapsNet
from capsnet_jax.nn.precision import for_products
from capsnet_jax.ops import to_unit_range
from capsnet_jax.train.evaluation import Evaluation, evaluate
from capsnet_jax.train.feeding import STREAMED_BYTES, Feed, should_stream
from capsnet_jax.train.memory import compile_lean, program_memory
from capsnet_jax.train.optimizer import create_optimizer, learning_rate
from capsnet_jax.train.progress import Progress, SeedProgress
from capsnet_jax.train.sharding import along, data_mesh, on_all, place_tree
from capsnet_jax.train.step import StepMetrics, TrainState, create_state, make_train_step

MOST_STEPS = 1000  # in a program that nobody can stop or watch; the full-size model takes a second or two for them


def fit(
    model: CapsNet,
    dataset: Dataset,
    config: TrainingConfig,
    *,
    augment: Sequence[str] = (),
    stream: bool | None = None,
) -> Iterator[Progress]:
    """Train a model, and yield the progress after every chunk of steps.

    Args:
        model: the initial weights; at the end of every epoch it is given the trained ones.
        dataset: training and test images; only the former are augmented.
        config: epochs, batch size, learning rate and so on.
        augment: names of the random changes; see `Augmentation`.
        stream: as for `Trainer`.

    Returns:
        An iterator; training goes on while it is iterated over.

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


class Snapshot(NamedTuple):
    """All that the rest of a training depends on; what a checkpoint holds.

    Attributes:
        state: of every seed, stacked.
        sums: of the metrics of the steps of the epoch that is under way, for its means.
    """

    state: TrainState
    sums: Float[np.ndarray, "seeds metrics"]


class Trainer:
    """Training of one config from one or several seeds, each of which gets what a run of its own would get.

    Args:
        new_model: gives the model with the initial weights of a seed.
        dataset: its training images are augmented, validation and test images never are.
        config: epochs, batch size, learning rate and so on.
        augment: names of the random changes; see `Augmentation`.
        stream: whether images are sent to the devices chunk by chunk; by default if the set is too large for them.
        seeds: trained side by side, as one program; by default the one of the config.

    Attributes:
        num_params: number of weights of a model.
        steps_per_epoch: number of training steps in an epoch.
        graphdef: of a model in training mode, for `nnx.merge`.
        snapshot: where training stands; set it to resume from there.

    Raises:
        UsageError: the model cannot be built, there are fewer training images than a batch, an augmentation is unknown,
            the devices do not divide a batch, or images are to be reconstructed and there is no decoder.
    """

    def __init__(
        self,
        new_model: Callable[[int], CapsNet],
        dataset: Dataset,
        config: TrainingConfig,
        *,
        augment: Sequence[str] = (),
        stream: bool | None = None,
        seeds: Sequence[int] | None = None,
    ):
        self.dataset, self.config = dataset, config
        self.seeds = (config.seed,) if seeds is None else tuple(seeds)
        self._new_model = new_model
        images = dataset.train_images
        self.steps_per_epoch = len(images) // config.batch_size
        if self.steps_per_epoch == 0:
            raise UsageError(f"batch_size is {config.batch_size}, with only {len(images)} training images.")
        augmentation = Augmentation.parse(augment)
        model = nnx.eval_shape(lambda: new_model(self.seeds[0]))  # the shapes, without weights
        self.num_params = sum(int(np.prod(param.shape)) for param in jax.tree.leaves(nnx.state(model, nnx.Param)))
        if model.decoder is None and config.reconstruction_weight:
            raise UsageError(
                f"reconstruction_weight is {config.reconstruction_weight}, and must be 0 for a model without a decoder."
            )
        self.mesh = data_mesh(config.batch_size // config.accumulate)
        self.stream = should_stream(images) if stream is None else stream
        self._learning_rate = jax.jit(learning_rate(config, self.steps_per_epoch))
        self._optimizer = create_optimizer(config, self.steps_per_epoch)
        model.train()
        self.graphdef = nnx.graphdef(model)
        train_step = make_train_step(
            self.graphdef,
            self._optimizer,
            accumulate=config.accumulate,
            ema_decay=config.ema_decay,
            precision=config.precision,
            loss=config.loss,
            reconstruction_weight=config.reconstruction_weight,
            reconstruction_error=config.reconstruction_error,
        )
        train_chunk = make_train_chunk(train_step, augmentation, along(self.mesh, 0))
        self._train_chunk = jax.jit(train_chunk, donate_argnums=0)
        self._compiled: dict[tuple[int, int], jax.stages.Compiled] = {}  # by numbers of seeds and steps

    @property
    def chunk(self) -> int:
        """Number of training steps that run as one program; the last chunk of an epoch may have fewer."""
        most = self.config.steps_per_chunk
        if not most and jax.default_backend() == "cpu":
            most = 1  # a loop gains nothing there, and the losses are seen the sooner
        if not most and self.stream:
            bytes_per_step = self.dataset.train_images[0].nbytes * self.config.batch_size * len(self.seeds)
            most = max(STREAMED_BYTES // bytes_per_step, 1)
        return min(most or MOST_STEPS, self.steps_per_epoch)

    @property
    def last_step(self) -> int:
        """Number of training steps of the whole training."""
        return self.config.epochs * self.steps_per_epoch

    @property
    def step(self) -> int:
        """Number of training steps done."""
        return int(np.asarray(self.snapshot.state.step)[0])

    @cached_property
    def snapshot(self) -> Snapshot:
        # One by one, not as a mapped program: that would be compiled again for each routing, ten seconds on CPU.
        states = [self._new_state(seed) for seed in self.seeds]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *states)
        return self.on_devices(Snapshot(stacked, np.zeros((len(self.seeds), len(StepMetrics._fields)))))

    def on_devices(self, snapshot: Snapshot) -> Snapshot:
        """Put the state of a snapshot that every process has on all devices."""
        return snapshot._replace(state=place_tree(snapshot.state, on_all(self.mesh)))

    def with_seeds(self, seeds: Sequence[int]) -> "Trainer":
        """The same training from the beginning, from other seeds; it shares the compiled programs."""
        other = copy(self)
        other.seeds = tuple(seeds)
        for name in ("snapshot", "_keys"):
            vars(other).pop(name, None)
        return other

    def run(self) -> Iterator[Progress]:
        """Train from the snapshot to the last epoch, and yield the progress after every chunk of steps.

        Raises:
            NonFiniteLossError: names the first step whose loss or gradient is not finite.
        """
        while self.step < self.last_step:
            yield from self._run_epoch()

    def _run_epoch(self) -> Iterator[Progress]:
        epoch, done = divmod(self.step, self.steps_per_epoch)
        order_keys, step_keys = self._keys
        order = np.stack([self._order(key, epoch) for key in order_keys])
        chunks = [order[:, start : start + self.chunk] for start in range(done, self.steps_per_epoch, self.chunk)]
        for indices, batches in zip(chunks, self._feed.batches(chunks), strict=True):
            start, length = time.perf_counter(), indices.shape[1]
            state, metrics = self.compiled(length)(self.snapshot.state, *batches, step_keys)
            values = np.asarray(jax.device_get(metrics), np.float64)  # waits for the chunk
            seconds = time.perf_counter() - start
            self.snapshot = Snapshot(state, self.snapshot.sums + values.sum(axis=2).T)
            done += length
            step = epoch * self.steps_per_epoch + done
            check_finite(values, self.seeds, first_step=step - length + 1)
            seeds = tuple(
                self._seed_progress(index, values[:, index].mean(axis=1), done) for index in range(len(self.seeds))
            )
            if done == self.steps_per_epoch:
                self.snapshot = self.snapshot._replace(sums=np.zeros_like(self.snapshot.sums))
            images_per_second = len(self.seeds) * length * self.config.batch_size / seconds
            rate = float(self._learning_rate(step - 1))
            yield Progress(epoch + 1, step, self.steps_per_epoch, rate, images_per_second, seeds)

    def _seed_progress(self, index: int, chunk: Float[np.ndarray, " metrics"], done: int) -> SeedProgress:
        """The metrics of one of the seeds after so many steps of the epoch."""
        data, validation, test = self.dataset, None, None
        if done == self.steps_per_epoch:
            test = self.evaluate_test(index)
            if data.validation_images is not None and data.validation_labels is not None:
                validation = self._evaluate(index, data.validation_images, data.validation_labels)
        of_chunk, of_epoch = (
            dict(zip(StepMetrics._fields, means.tolist(), strict=True))
            for means in (chunk, self.snapshot.sums[index] / done)
        )
        return SeedProgress(self.seeds[index], of_chunk, of_epoch, validation, test)

    def weights(self, index: int = 0) -> nnx.State:
        """What is evaluated and kept of one of the seeds: weights, or their average, and running means."""
        return _select(self.snapshot.state.weights, index)

    def models(self) -> list[CapsNet]:
        """A model in evaluation mode for each seed, with the weights of now."""
        # By way of the host, as only one of several processes may want them, which must not compute on all devices.
        weights = jax.device_get(self.snapshot.state.weights)
        models = []
        for index in range(len(self.seeds)):
            own = jax.tree.map(lambda leaf: jnp.array(leaf[index]), weights)  # noqa: B023
            models.append(nnx.merge(self.graphdef, own))
            models[-1].eval()
        return models

    def evaluate_test(self, index: int = 0) -> Evaluation:
        """Evaluate the weights of one of the seeds on all test images."""
        return self._evaluate(index, self.dataset.test_images, self.dataset.test_labels)

    def _evaluate(self, index: int, images: np.ndarray, labels: np.ndarray) -> Evaluation:
        model = nnx.merge(self.graphdef, self.weights(index))
        return evaluate(model, images, labels, reconstruct=False, mesh=self.mesh)

    def trace(self) -> None:
        """Trace a training step without compiling it, to find out in a second what is wrong with it.

        Raises:
            UsageError: an augmentation does not fit the images, or the loss does not fit the labels.
        """
        jax.eval_shape(self._train_chunk, *self._arguments(self.chunk))

    def compiled(self, length: int | None = None) -> jax.stages.Compiled:
        """The program of a chunk of so many steps; by default of a whole chunk."""
        length = length or self.chunk
        sizes = len(self.seeds), length
        if sizes not in self._compiled:
            self._compiled[sizes] = compile_lean(self._train_chunk, *self._arguments(length))
        return self._compiled[sizes]

    def memory(self) -> int:
        """Bytes that a device needs at most, by XLA's own account: training images, state and what a chunk needs."""
        return program_memory(self.compiled())

    def implementations(self) -> dict[str, Choice]:
        """The implementation of each layer in training, and why it was chosen; see `CapsNet.implementations`."""

        def in_training() -> CapsNet:
            model = self._new_model(self.seeds[0])
            if self.config.precision == "bfloat16":
                nnx.update(model, for_products(nnx.state(model, nnx.Param), jnp.bfloat16))
            return model

        return nnx.eval_shape(in_training).implementations(self.config.batch_size // self.config.accumulate)

    def _arguments(self, length: int) -> tuple[Any, ...]:
        """Shapes, dtypes and shardings of the arguments of a chunk of so many steps."""
        seeds = len(self.seeds)
        everywhere, shared = on_all(self.mesh), along(self.mesh, 2)

        def of_seeds(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((seeds, *leaf.shape), leaf.dtype, sharding=everywhere)

        state, key = jax.tree.map(of_seeds, self._shapes)
        data = self.dataset.train_images, self.dataset.train_labels
        indices = (seeds, length, self.config.batch_size)
        if self.stream:
            chunk = [jax.ShapeDtypeStruct(indices + array.shape[1:], array.dtype, sharding=shared) for array in data]
            return state, *chunk, None, key
        whole = [jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=everywhere) for array in data]
        return state, *whole, jax.ShapeDtypeStruct(indices, jnp.int32, sharding=shared), key

    @cached_property
    def _shapes(self) -> tuple[TrainState, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the state and the key of one seed."""
        return jax.eval_shape(lambda: (self._new_state(self.seeds[0]), jax.random.key(0)))

    @cached_property
    def _feed(self) -> Feed:
        return Feed(self.dataset.train_images, self.dataset.train_labels, self.mesh, stream=self.stream)

    @cached_property
    def _keys(self) -> tuple[list[Array], Key[Array, " seeds"]]:
        """For each seed, the key of the orders of the images, and that of the augmentations on the devices."""
        orders, steps = zip(*(jax.random.split(jax.random.key(seed)) for seed in self.seeds), strict=True)
        data = np.stack([jax.random.key_data(key) for key in steps])
        return list(orders), jax.random.wrap_key_data(place_tree(data, on_all(self.mesh)))

    def _order(self, key: Key[Array, ""], epoch: int) -> Int[np.ndarray, "steps b"]:
        """The images of each step of an epoch, which depend on the key and the epoch alone."""
        order = jax.random.permutation(jax.random.fold_in(key, epoch), len(self.dataset.train_images))
        whole_batches = np.asarray(order, np.int32)[: self.steps_per_epoch * self.config.batch_size]
        return rearrange(whole_batches, "(steps b) -> steps b", b=self.config.batch_size)

    def _new_state(self, seed: int) -> TrainState:
        return create_state(self._new_model(seed), self._optimizer, average=self.config.ema_decay > 0)[1]


def make_train_chunk(
    train_step: Callable[..., tuple[TrainState, StepMetrics]], augmentation: Augmentation, sharding: NamedSharding
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """Make a function that runs several training steps of each seed without coming back to the host.

    Args:
        train_step: what `make_train_step` returned.
        augmentation: random changes of the images, drawn anew in each step.
        sharding: how a batch is spread over the devices.

    Returns:
        A function `(state, images, labels, indices, key) -> (state, metrics of each step)`, to be compiled with a
        donated state; all but a whole data set begins with an axis of seeds. The indices `[seeds steps b]` are those of
        the images of each step; without them, images and labels have these axes themselves. The randomness of a step
        depends on the key and the number of the step alone.
    """

    def of_one_seed(
        state: TrainState,
        images: Shaped[Array, "*images height width channels"],
        labels: Int[Array, "..."],
        indices: Int[Array, "steps b"] | None,
        key: Key[Array, ""],
    ) -> tuple[TrainState, StepMetrics]:
        def body(state: TrainState, batch: Any) -> tuple[TrainState, StepMetrics]:
            originals, of_batch = batch if indices is None else (images[batch], labels[batch])
            originals, of_batch = jax.lax.with_sharding_constraint((originals, of_batch), sharding)
            step_key = jax.random.fold_in(key, state.step)
            return train_step(state, augmentation(step_key, to_unit_range(originals)), of_batch)

        return jax.lax.scan(body, state, (images, labels) if indices is None else indices)

    def train_chunk(
        state: TrainState,
        images: Shaped[Array, "*images height width channels"],
        labels: Int[Array, "..."],
        indices: Int[Array, "seeds steps b"] | None,
        key: Key[Array, " seeds"],
    ) -> tuple[TrainState, StepMetrics]:
        data = 0 if indices is None else None
        return jax.vmap(of_one_seed, in_axes=(0, data, data, 0, 0))(state, images, labels, indices, key)

    return train_chunk


def check_finite(metrics: Float[np.ndarray, "metrics seeds steps"], seeds: Sequence[int], *, first_step: int) -> None:
    """Refuse a loss or a gradient that is not finite.

    Args:
        metrics: those of `StepMetrics`, in that order.
        seeds: of the runs, for the message.
        first_step: number of the first step, from 1.

    Raises:
        NonFiniteLossError: names the first such step.
    """
    for name, what in (("total", "loss"), ("gradient_norm", "gradient")):
        numbers = metrics[StepMetrics._fields.index(name)]
        steps, places = np.nonzero(~np.isfinite(numbers.T))
        if steps.size:
            place, step = places[0], steps[0]
            raise NonFiniteLossError(what, seeds[place], first_step + int(step), float(numbers[place, step]))


@jax.jit
def _select(tree: Any, index: Int[Array, ""] | int) -> Any:
    """The part of a tree of arrays that belongs to one seed."""
    return jax.tree.map(lambda leaf: leaf[index], tree)
