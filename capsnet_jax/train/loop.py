"""The training loop: epochs of chunks of compiled steps, for one or several seeds side by side, on all devices.

States, metrics, orders of images and random keys have a leading axis of seeds throughout, even for one seed.
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

from capsnet_jax.compilation import compile_lean, compiler_options
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
from capsnet_jax.train.memory import program_memory
from capsnet_jax.train.optimizer import create_optimizer, learning_rate
from capsnet_jax.train.progress import Progress, SeedProgress
from capsnet_jax.train.sharding import along, data_mesh, on_all, place_tree
from capsnet_jax.train.step import StepMetrics, TrainState, create_state, make_train_step

MOST_STEPS = 1000  # per program, which cannot be interrupted; a second or two on a GPU for the full-size model


def fit(
    model: CapsNet,
    dataset: Dataset,
    config: TrainingConfig,
    *,
    augment: Sequence[str] = (),
    stream: bool | None = None,
) -> Iterator[Progress]:
    """Train a model in place, and yield the progress after every chunk of steps.

    Training advances only while the iterator is consumed. The model is updated after every epoch.

    Args:
        model: the model, with the initial weights.
        dataset: training, test and, optionally, validation images.
        config: epochs, batch size, learning rate and so on.
        augment: augmentations of the training images, such as `("shift=0.1", "flip")`; see `Augmentation`.
        stream: whether to send images to the device chunk by chunk; by default only if they take more than half of its
            memory.

    Returns:
        An iterator over the progress: step, speed, losses and, after the last chunk of an epoch, accuracies.

    Raises:
        UsageError: immediately, if model, data set, config and augmentations do not fit together.
        NonFiniteLossError: while iterating, if a loss or gradient is not finite.

    Examples:
        >>> import numpy as np
        >>> from flax import nnx
        >>> from capsnet_jax import CapsNet, TrainingConfig, fit
        >>> from capsnet_jax.data import make_dataset
        >>> labels = np.arange(40) % 2
        >>> images = np.zeros((40, 8, 8, 1), np.uint8)
        >>> images[labels == 1, 2:4] = 255  # a bright stripe
        >>> dataset = make_dataset(images, labels, images, labels, num_classes=2)
        >>> sizes = {"stem_channels": 4, "stem_kernel": 3, "primary_groups": 2, "primary_kernel": 3}
        >>> model = CapsNet((8, 8, 1), 2, **sizes, primary_scale=1.0, decoder_hidden=None, rngs=nnx.Rngs(0))
        >>> config = TrainingConfig(epochs=3, batch_size=8, learning_rate=0.01, reconstruction_weight=0.0)
        >>> for progress in fit(model, dataset, config):
        ...     if progress.ends_epoch:
        ...         print(f"epoch {progress.epoch}: test accuracy {progress.test_accuracy:.2f}")
        epoch 1: test accuracy 1.00
        epoch 2: test accuracy 1.00
        epoch 3: test accuracy 1.00
    """
    trainer = Trainer(lambda seed: model, dataset, config, augment=augment, stream=stream)

    def run() -> Iterator[Progress]:
        for progress in trainer.run():
            if progress.ends_epoch:
                nnx.update(model, nnx.state(trainer.models()[0], (nnx.Param, nnx.BatchStat)))
            yield progress

    return run()


class Snapshot(NamedTuple):
    """Everything that the rest of training depends on; the content of a checkpoint.

    Attributes:
        state: training state of all seeds, stacked.
        sums: sums of the metrics over the steps of the current epoch so far.
    """

    state: TrainState
    sums: Float[np.ndarray, "seeds metrics"]


class Trainer:
    """Training from one or several seeds, each with the same result as a run of its own.

    Args:
        new_model: function of a seed that returns the model with its initial weights.
        dataset: the data set; only training images are augmented.
        config: epochs, batch size, learning rate and so on.
        augment: augmentations of the training images; see `Augmentation`.
        stream: whether to send images to the devices chunk by chunk; by default if the data set is too large for them.
        seeds: seeds to train side by side, as one program; by default the seed of the config.
        devices: devices to train on, by default all; programs also compile for devices that are not there.

    Attributes:
        num_params: number of weights of a model.
        num_frozen: number of those in frozen layers.
        steps_per_epoch: number of training steps in an epoch.
        graphdef: static definition of a model in training mode, for `nnx.merge`.
        snapshot: the current state of training; assign another one to resume from it.

    Raises:
        UsageError: the model cannot be built, has no decoder although it should reconstruct, or does not fit the
            images; an augmentation is unknown; there is no such layer to freeze; or a batch is larger than the data
            set, or not divisible by the devices.
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
        devices: Sequence[jax.Device] | None = None,
    ):
        self.dataset, self.config = dataset, config
        self.seeds = (config.seed,) if seeds is None else tuple(seeds)
        self._new_model = new_model
        images = dataset.train_images
        self.steps_per_epoch = len(images) // config.batch_size
        if self.steps_per_epoch == 0:
            raise UsageError(f"batch_size is {config.batch_size}, with only {len(images)} training images.")
        augmentation = Augmentation.parse(augment)
        self._learning_rate = jax.jit(learning_rate(config, self.steps_per_epoch))
        self._optimizer = create_optimizer(config, self.steps_per_epoch)
        self.graphdef, self._shapes = jax.eval_shape(lambda: self._create_state(self.seeds[0]))  # without weights
        model = nnx.merge(self.graphdef, self._shapes.weights)
        self.num_params, num_trained = map(number_of_weights, (nnx.state(model, nnx.Param), self._shapes.params))
        self.num_frozen = self.num_params - num_trained
        if model.decoder is None and config.reconstruction_weight:
            raise UsageError(
                f"reconstruction_weight is {config.reconstruction_weight}, and must be 0 for a model without a decoder."
            )
        self.mesh = data_mesh(config.batch_size // config.accumulate, devices)
        self.stream = should_stream(images) if stream is None else stream
        train_step = make_train_step(self.graphdef, self._optimizer, config)
        train_chunk = make_train_chunk(train_step, augmentation, along(self.mesh, 0))
        self._train_chunk = jax.jit(train_chunk, donate_argnums=0, compiler_options=compiler_options())
        self._compiled: dict[tuple[int, int], jax.stages.Compiled] = {}  # by numbers of seeds and steps

    @property
    def chunk(self) -> int:
        """Number of training steps that run as one program; the last chunk of an epoch may have fewer."""
        most = self.config.steps_per_chunk
        if not most and jax.default_backend() == "cpu":
            most = 1  # longer programs are not faster there, and show losses later
        if not most and self.stream:
            bytes_per_step = self.dataset.train_images[0].nbytes * self.config.batch_size * len(self.seeds)
            most = max(STREAMED_BYTES // bytes_per_step, 1)
        return min(most or MOST_STEPS, self.steps_per_epoch)

    @property
    def last_step(self) -> int:
        """Number of training steps in all epochs."""
        return self.config.epochs * self.steps_per_epoch

    @property
    def step(self) -> int:
        """Number of training steps done."""
        return int(np.asarray(self.snapshot.state.step)[0])

    @cached_property
    def snapshot(self) -> Snapshot:
        # Not vmapped over the seeds: that would compile for ten seconds on CPU, for each routing.
        states = [self._create_state(seed)[1] for seed in self.seeds]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *states)
        return self.on_devices(Snapshot(stacked, np.zeros((len(self.seeds), len(StepMetrics._fields)))))

    def on_devices(self, snapshot: Snapshot) -> Snapshot:
        """Put the state of a snapshot, which every process has, on all devices."""
        return snapshot._replace(state=place_tree(snapshot.state, on_all(self.mesh)))

    def with_seeds(self, seeds: Sequence[int]) -> "Trainer":
        """Make a trainer that starts from other seeds and shares the compiled programs."""
        other = copy(self)
        other.seeds = tuple(seeds)
        for name in ("snapshot", "_keys"):
            vars(other).pop(name, None)
        return other

    def run(self) -> Iterator[Progress]:
        """Train from the snapshot to the last epoch, and yield the progress after every chunk of steps.

        Raises:
            NonFiniteLossError: a loss or gradient is not finite; the message names the step.
        """
        order_keys, step_keys = self._keys
        while self.step < self.last_step:
            epoch, done = divmod(self.step, self.steps_per_epoch)
            order = np.stack([self._order(key, epoch) for key in order_keys])
            chunks = [order[:, start : start + self.chunk] for start in range(done, self.steps_per_epoch, self.chunk)]
            for indices, batches in zip(chunks, self._feed.batches(chunks), strict=True):
                start, length = time.perf_counter(), indices.shape[1]
                state, metrics = self.compiled(length)(self.snapshot.state, *batches, step_keys)
                values = np.asarray(jax.device_get(metrics), np.float64)  # [metrics seeds steps]; waits for the chunk
                seconds = time.perf_counter() - start
                done += length
                sums = self.snapshot.sums + values.sum(axis=2).T
                ends_epoch = done == self.steps_per_epoch
                self.snapshot = Snapshot(state, np.zeros_like(sums) if ends_epoch else sums)
                step = epoch * self.steps_per_epoch + done
                check_finite(values, self.seeds, first_step=step - length + 1)
                images_per_second = len(self.seeds) * length * self.config.batch_size / seconds
                seeds = []
                for index, seed in enumerate(self.seeds):
                    of_chunk, of_epoch = (
                        dict(zip(StepMetrics._fields, means.tolist(), strict=True))
                        for means in (values[:, index].mean(axis=1), sums[index] / done)
                    )
                    test = self.evaluate_test(index) if ends_epoch else None
                    validation = self._evaluate_validation(index) if ends_epoch else None
                    seeds.append(SeedProgress(seed, of_chunk, of_epoch, validation, test))
                rate = float(self._learning_rate(step - 1))
                yield Progress(epoch + 1, step, self.steps_per_epoch, rate, images_per_second, tuple(seeds))

    def models(self) -> list[CapsNet]:
        """Make a model in evaluation mode with the current weights of each seed."""
        # The weights are fetched first, because in a distributed run only one process may call this, which must not
        # compute on all devices.
        weights = jax.device_get(self.snapshot.state.weights)

        def model_of(index: int) -> CapsNet:
            model = nnx.merge(self.graphdef, jax.tree.map(lambda leaf: jnp.array(leaf[index]), weights))
            model.eval()
            return model

        return [model_of(index) for index in range(len(self.seeds))]

    def evaluate_test(self, index: int = 0) -> Evaluation:
        """Evaluate the current weights of one seed on all test images."""
        return self._evaluate(index, self.dataset.test_images, self.dataset.test_labels)

    def _evaluate_validation(self, index: int) -> Evaluation | None:
        images, labels = self.dataset.validation_images, self.dataset.validation_labels
        return None if images is None or labels is None else self._evaluate(index, images, labels)

    def _evaluate(self, index: int, images: np.ndarray, labels: np.ndarray) -> Evaluation:
        model = nnx.merge(self.graphdef, _select(self.snapshot.state.weights, index))
        return evaluate(model, images, labels, reconstruct=False, mesh=self.mesh)

    def trace(self) -> None:
        """Trace a chunk of training steps without compiling it, so that errors surface early.

        Raises:
            UsageError: an augmentation does not fit the images, or the loss does not fit the labels.
        """
        jax.eval_shape(self._train_chunk, *self._arguments(self.chunk))

    def compiled(self, length: int | None = None) -> jax.stages.Compiled:
        """Compile a chunk of `length` steps, by default of `chunk` steps; programs are cached."""
        length = length or self.chunk
        sizes = len(self.seeds), length
        if sizes not in self._compiled:
            self._compiled[sizes] = compile_lean(self._train_chunk, *self._arguments(length))
        return self._compiled[sizes]

    def memory(self) -> int:
        """Bytes that training needs on a device, according to XLA: training images, states and temporaries."""
        return program_memory(self.compiled())

    def implementations(self) -> dict[str, Choice]:
        """Implementation of each layer in training, and why it was chosen; see `CapsNet.implementations`."""
        weights = self._shapes.weights
        if self.config.precision == "bfloat16":
            weights = jax.eval_shape(lambda weights: for_products(weights, jnp.bfloat16), weights)
        model = nnx.merge(self.graphdef, weights)
        return model.implementations(self.config.batch_size // self.config.accumulate)

    def _arguments(self, length: int) -> tuple[Any, ...]:
        """Shapes, dtypes and shardings of the arguments of a chunk of `length` steps."""

        def structs(tree: Any, axes: tuple[int, ...], sharding: NamedSharding) -> Any:
            """Shapes and dtypes of a tree of arrays that are stacked along leading axes."""
            return jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct((*axes, *leaf.shape), leaf.dtype, sharding=sharding), tree
            )

        data = self.dataset.train_images, self.dataset.train_labels
        everywhere, shared = on_all(self.mesh), along(self.mesh, 2)
        seeds, batches = (len(self.seeds),), (len(self.seeds), length, self.config.batch_size)
        state, key = structs((self._shapes, jax.eval_shape(lambda: jax.random.key(0))), seeds, everywhere)
        if self.stream:
            return state, *structs([array[0] for array in data], batches, shared), None, key
        return state, *structs(data, (), everywhere), structs(np.int32(0), batches, shared), key

    @cached_property
    def _feed(self) -> Feed:
        return Feed((self.dataset.train_images, self.dataset.train_labels), self.mesh, stream=self.stream)

    @cached_property
    def _keys(self) -> tuple[list[Array], Key[Array, " seeds"]]:
        """Random keys of each seed: for the order of images, and for augmentation on the devices."""
        orders, steps = zip(*(jax.random.split(jax.random.key(seed)) for seed in self.seeds), strict=True)
        data = np.stack([jax.random.key_data(key) for key in steps])
        return list(orders), jax.random.wrap_key_data(place_tree(data, on_all(self.mesh)))

    def _order(self, key: Key[Array, ""], epoch: int) -> Int[np.ndarray, "steps b"]:
        """Shuffle the images of an epoch into batches, depending on the key and the epoch alone."""
        order = jax.random.permutation(jax.random.fold_in(key, epoch), len(self.dataset.train_images))
        whole_batches = np.asarray(order, np.int32)[: self.steps_per_epoch * self.config.batch_size]
        return rearrange(whole_batches, "(steps b) -> steps b", b=self.config.batch_size)

    def _create_state(self, seed: int) -> tuple[nnx.GraphDef, TrainState]:
        average, freeze = self.config.ema_decay > 0, self.config.freeze
        return create_state(self._new_model(seed), self._optimizer, average=average, freeze=freeze)


def make_train_chunk(
    train_step: Callable[..., tuple[TrainState, StepMetrics]], augmentation: Augmentation, sharding: NamedSharding
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """Make a function that runs several training steps for each seed on the device.

    Args:
        train_step: a function from `make_train_step`.
        augmentation: augmentation of the images, drawn again in each step.
        sharding: how a batch is split over the devices.

    Returns:
        A function `(state, images, labels, indices, key) -> (state, metrics of each step)`, to be compiled with a
        donated state. State, indices and key have a leading axis of seeds. Images and labels are the whole training
        set, and indices `[seeds steps b]` select the images of each step; if indices is None, images and labels are
        those of each step, `[seeds steps b ...]`. The randomness of a step depends on key and step number alone.
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
        state: TrainState, images: Array, labels: Array, indices: Array | None, key: Array
    ) -> tuple[TrainState, StepMetrics]:
        data = 0 if indices is None else None
        return jax.vmap(of_one_seed, in_axes=(0, data, data, 0, 0))(state, images, labels, indices, key)

    return train_chunk


def check_finite(metrics: Float[np.ndarray, "metrics seeds steps"], seeds: Sequence[int], *, first_step: int) -> None:
    """Raise an error if a loss or gradient norm is not finite.

    Args:
        metrics: fields of `StepMetrics`, in their order.
        seeds: seeds, for the message.
        first_step: number of the first of these steps, from 1.

    Raises:
        NonFiniteLossError: a value is not finite; the message names the seed and the first such step.
    """
    for name, what in (("total", "loss"), ("gradient_norm", "gradient")):
        numbers = metrics[StepMetrics._fields.index(name)]
        steps, places = np.nonzero(~np.isfinite(numbers.T))
        if steps.size:
            place, step = places[0], steps[0]
            raise NonFiniteLossError(what, seeds[place], first_step + int(step), float(numbers[place, step]))


def number_of_weights(state: nnx.State) -> int:
    """Count the numbers in a tree of arrays, or of their shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state))


@jax.jit
def _select(tree: Any, index: Int[Array, ""] | int) -> Any:
    """Select one seed in a tree of arrays."""
    return jax.tree.map(lambda leaf: leaf[index], tree)
