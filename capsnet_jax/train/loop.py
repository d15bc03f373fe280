"""The training loop: from any number of seeds side by side, on all devices, from the beginning or from a checkpoint."""

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
from jaxtyping import Float, Int

from capsnet_jax.config import TrainingConfig
from capsnet_jax.data import Dataset
from capsnet_jax.data.augmentation import Augmentation
from capsnet_jax.errors import UsageError
from capsnet_jax.nn.model import CapsNet
from capsnet_jax.train.evaluation import Evaluation, evaluate, make_count_correct
from capsnet_jax.train.feeding import Feed, should_stream
from capsnet_jax.train.memory import program_memory
from capsnet_jax.train.optimizer import create_optimizer, learning_rate
from capsnet_jax.train.programs import ChunkPrograms, steps_per_chunk
from capsnet_jax.train.progress import Progress, SeedProgress
from capsnet_jax.train.sharding import along, data_mesh, on_all, place_tree
from capsnet_jax.train.step import StepMetrics, TrainState, check_finite, create_state


class Snapshot(NamedTuple):
    """All that the rest of a training depends on; what a checkpoint holds.

    Attributes:
        state: of every seed; stacked, if there are several.
        sums: of the metrics of the steps of the epoch that is under way, for its means.
    """

    state: TrainState
    sums: Float[np.ndarray, "seeds metrics"]


class Trainer:
    """Training of one config from one or several seeds, each of which gets what a run of its own would get.

    Args:
        new_model: gives the model with the initial weights of a seed.
        dataset: its training images are changed at random, validation and test images never are.
        config: epochs, batch size, learning rate and so on.
        augment: names of the random changes; see `Augmentation`.
        stream: whether images are sent to the devices chunk by chunk; by default if the set is too large for them.
        seeds: trained side by side, as one program; by default the one of the config.

    Attributes:
        num_params: number of weights of a model.
        steps_per_epoch: number of training steps in an epoch.
        graphdef: of a model in training mode, for `nnx.merge`.
        chunk: number of training steps that run as one program; the last chunk of an epoch may have fewer.
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
        self._augmentation = Augmentation.parse(augment)
        model = nnx.eval_shape(lambda: new_model(self.seeds[0]))  # the shapes, without weights
        self.num_params = sum(int(np.prod(param.shape)) for param in jax.tree.leaves(nnx.state(model, nnx.Param)))
        if model.decoder is None and config.reconstruction_weight:
            raise UsageError(
                f"reconstruction_weight is {config.reconstruction_weight}, and must be 0 for a model without a decoder."
            )
        self.mesh = data_mesh(config.batch_size // config.accumulate)
        self.stream = should_stream(images) if stream is None else stream
        self.chunk = min(steps_per_chunk(dataset, config, len(self.seeds), stream=self.stream), self.steps_per_epoch)
        self._learning_rate = jax.jit(learning_rate(config, self.steps_per_epoch))
        self._optimizer = create_optimizer(config, self.steps_per_epoch)
        model.train()
        self.graphdef = nnx.graphdef(model)
        self._programs = self._new_programs()
        self._count_correct = make_count_correct(self.graphdef, along(self.mesh, 0))

    def _new_programs(self) -> ChunkPrograms:
        return ChunkPrograms(
            self.graphdef,
            self._optimizer,
            jax.eval_shape(lambda: self._new_state(self.seeds[0])),
            self.dataset,
            self.config,
            augmentation=self._augmentation,
            mesh=self.mesh,
            num_seeds=len(self.seeds),
            stream=self.stream,
        )

    @cached_property
    def _feed(self) -> Feed:
        return Feed(self.dataset.train_images, self.dataset.train_labels, self.mesh, stream=self.stream)

    @cached_property
    def _keys(self) -> tuple[list[Any], Any]:
        """The keys of the orders of the images, and of the changes of the images on the devices."""
        orders, steps = zip(*(jax.random.split(jax.random.key(seed)) for seed in self.seeds), strict=True)
        data = [jax.random.key_data(key) for key in steps]
        stacked = np.stack(data) if len(data) > 1 else np.asarray(data[0])
        return list(orders), jax.random.wrap_key_data(place_tree(stacked, on_all(self.mesh)))

    @cached_property
    def snapshot(self) -> Snapshot:
        # One by one, not as a mapped program: that would be compiled again for each routing, ten seconds on CPU.
        states = [self._new_state(seed) for seed in self.seeds]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states) if len(states) > 1 else states[0]
        return self.on_devices(Snapshot(stacked, np.zeros((len(self.seeds), len(StepMetrics._fields)))))

    def on_devices(self, snapshot: Snapshot) -> Snapshot:
        """A snapshot of arrays that every process has, with the state on all devices."""
        return snapshot._replace(state=place_tree(snapshot.state, on_all(self.mesh)))

    @property
    def last_step(self) -> int:
        """Number of training steps of the whole training."""
        return self.config.epochs * self.steps_per_epoch

    @property
    def step(self) -> int:
        """Number of training steps done."""
        return int(np.ravel(self.snapshot.state.step)[0])

    def weights(self, index: int = 0) -> nnx.State:
        """What is kept of the training from one of the seeds: weights, or their average, and running means."""
        weights = self.snapshot.state.weights
        return jax.tree.map(lambda leaf: leaf[index], weights) if len(self.seeds) > 1 else weights

    def models(self) -> list[CapsNet]:
        """For each seed a model with these weights, in evaluation mode."""
        # By way of the host, as only one of several processes may want them, which must not compute on all devices.
        weights = jax.device_get(self.snapshot.state.weights)
        models = []
        for index in range(len(self.seeds)):
            own = jax.tree.map(lambda leaf: jnp.array(leaf[index] if len(self.seeds) > 1 else leaf), weights)  # noqa: B023
            models.append(nnx.merge(self.graphdef, own))
            models[-1].eval()
        return models

    def evaluate_test(self, index: int = 0) -> Evaluation:
        """Right answers on all test images, from one of the seeds."""
        return self._evaluate(index, self.dataset.test_images, self.dataset.test_labels)

    def with_seeds(self, seeds: Sequence[int]) -> "Trainer":
        """The same training from the beginning, from other seeds; what is compiled is kept if they are as many."""
        other = copy(self)
        other.seeds = tuple(seeds)
        for name in ("snapshot", "_keys"):
            vars(other).pop(name, None)
        if len(other.seeds) != len(self.seeds):
            other._programs = other._new_programs()
        return other

    def trace(self) -> None:
        """Goes through a training step without numbers, for what is wrong with it to show; a second, not a compilation.

        Raises:
            UsageError: an augmentation does not fit the images, or the loss does not fit the labels.
        """
        self._programs.trace(self.chunk)

    def compiled(self, length: int | None = None) -> jax.stages.Compiled:
        """The program of a chunk of so many steps; by default of a whole chunk."""
        return self._programs.compiled(length or self.chunk)

    def memory(self) -> int:
        """Bytes that a device needs at most, by XLA's own account: training images, state and what a chunk needs."""
        return program_memory(self.compiled())

    def run(self) -> Iterator[Progress]:
        """Trains on from the snapshot to the last epoch, and tells how far it is after every chunk of steps.

        Raises:
            NonFiniteLossError: names the first step whose loss or gradient is not finite.
        """
        while self.step < self.last_step:
            yield from self._run_epoch()

    def _run_epoch(self) -> Iterator[Progress]:
        epoch, done = divmod(self.step, self.steps_per_epoch)
        order_keys, step_keys = self._keys
        batch_size = self.config.batch_size
        orders = [self._order(key, epoch) for key in order_keys]
        order = np.stack(orders) if len(orders) > 1 else orders[0]
        chunks = [order[..., start : start + self.chunk, :] for start in range(done, self.steps_per_epoch, self.chunk)]
        for batches in self._feed.batches(chunks):
            start = time.perf_counter()
            length = (batches.labels if batches.indices is None else batches.indices).shape[len(self.seeds) > 1]
            state, metrics = self.compiled(length)(self.snapshot.state, *batches, step_keys)
            values = np.asarray(jax.device_get(metrics), np.float64)  # waits for the chunk
            values = rearrange(values, "metrics ... steps -> metrics (...) steps")
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
            images_per_second = len(self.seeds) * length * batch_size / seconds
            rate = float(self._learning_rate(step - 1))
            yield Progress(epoch + 1, step, self.steps_per_epoch, rate, images_per_second, seeds)

    def _seed_progress(self, index: int, chunk: Float[np.ndarray, " metrics"], done: int) -> SeedProgress:
        """Of one of the seeds, after so many steps of the epoch."""
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

    def _evaluate(self, index: int, images: np.ndarray, labels: np.ndarray) -> Evaluation:
        return evaluate(self._count_correct, self.weights(index), images, labels, num_devices=self.mesh.size)

    def _order(self, key: Any, epoch: int) -> Int[np.ndarray, "steps b"]:
        """The images of each step of an epoch, which depend on the key and the epoch alone."""
        order = jax.random.permutation(jax.random.fold_in(key, epoch), len(self.dataset.train_images))
        whole_batches = np.asarray(order, np.int32)[: self.steps_per_epoch * self.config.batch_size]
        return rearrange(whole_batches, "(steps b) -> steps b", b=self.config.batch_size)

    def _new_state(self, seed: int) -> TrainState:
        return create_state(self._new_model(seed), self._optimizer, average=self.config.ema_decay > 0)[1]
