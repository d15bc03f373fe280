"""The JAX functions that the benchmark times; `capsnet_torch.benchmark` has those of PyTorch."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from flax import nnx

from capsnet_jax.capsules import Capsules
from capsnet_jax.compilation import compile_lean, compiler_options
from capsnet_jax.config import Config
from capsnet_jax.data import make_dataset
from capsnet_jax.data.augmentation import Augmentation
from capsnet_jax.errors import UsageError
from capsnet_jax.nn.model import CapsNet
from capsnet_jax.nn.precision import for_products
from capsnet_jax.ops import mask_by_label, to_unit_range
from capsnet_jax.train.loop import Trainer
from capsnet_jax.train.memory import available_memory, peak_memory
from capsnet_jax.train.optimizer import create_optimizer
from capsnet_jax.train.sharding import on_all
from capsnet_jax.train.step import create_state, make_train_step

Calls = list[tuple[Callable[[], Any], int | float]]
"""Functions to time, each with its weight in the sum of their times."""


@dataclasses.dataclass
class Work:
    """The functions to time, for random images and labels.

    Args:
        config: a `Config` as JSON: model, batch size, precision, losses.
        shift: largest shift of training images, as a fraction of their size.
        train_images: number of training images in an epoch.
        test_images: number of test images that are evaluated after it.
        evaluation_batch: batch size of that evaluation.
        gemm_sizes: number of rows and columns of the matrices of "gemm", by platform.

    Attributes:
        platform: "cpu" or "gpu".
        device: name of the device.

    Raises:
        UsageError: there are several devices.
    """

    config: Mapping[str, Any]
    shift: float
    train_images: int
    test_images: int
    evaluation_batch: int
    gemm_sizes: Mapping[str, int]

    def __post_init__(self) -> None:
        device, *others = jax.devices()
        if others:
            raise UsageError(f"There are {1 + len(others)} devices; expected one, as with CUDA_VISIBLE_DEVICES=0.")
        self.platform, self.device = device.platform, device.device_kind
        self.load(self.config)

    def load(self, config: Mapping[str, Any]) -> None:
        """Use another config."""
        self._config = Config.from_json(config)
        self._training = self._config.training
        self._optimizer = create_optimizer(self._training, self.train_images // self._training.batch_size)
        self._pixels, self._labels = jax.device_put(random_images(self._config, self._training.batch_size))
        self._images, self._dtype = to_unit_range(self._pixels), jnp.dtype(self._training.precision)

    def prepare(self, name: str) -> Calls:
        """Return what to time for a measurement, a key of `MEASUREMENTS`."""
        method = getattr(self, name, None)
        return method() if method else self._part(name)

    def warmed_up(self) -> None:
        """Do nothing: JAX cannot reset its peak memory, which therefore counts from the start of the process."""

    def block(self, result: Any) -> None:
        """Wait until the result of a call is available."""
        jax.block_until_ready(result)

    def size(self, result: Any) -> int:
        """Return the number of bytes of the result of a call."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(result))

    def peak_device_memory(self) -> int | None:
        """Return the largest number of bytes in use so far; None if unknown."""
        return peak_memory()

    def memory_in_use(self) -> int:
        """Return the number of bytes in use on the GPU."""
        return (jax.devices()[0].memory_stats() or {})["bytes_in_use"]

    def free_memory(self) -> float:
        """Return the number of free bytes of the GPU or the machine."""
        return available_memory()

    def temp_bytes(self) -> int:
        """Return the bytes of temporary arrays that XLA planned for the last part that was prepared."""
        analysis: Any = self._compiled_part.memory_analysis()
        return analysis.temp_size_in_bytes

    def step(self) -> Calls:
        graphdef, state = create_state(self._new_model(), self._optimizer)
        train_step = compiled(make_train_step(graphdef, self._optimizer, self._training), donate_argnums=0)
        arguments = state, self._images, self._labels
        # The first call compiles, as in training; it is timed separately.
        program = cache(lambda: compile_lean(train_step, *arguments))
        return [(iterate(program, *arguments), 1)]

    def inference(self) -> Calls:
        graphdef, params, *rest = nnx.split(self._new_model(), nnx.Param, ...)

        @compiled
        def encode(params: nnx.State, images: jax.Array) -> Capsules:
            return nnx.merge(graphdef, for_products(params, self._dtype), *rest, copy=True).encode(images)

        return [(lambda: encode(params, self._images), 1)]

    def optimizer(self) -> Calls:
        params = nnx.state(self._new_model(), nnx.Param)

        def update(state: Any, gradient: nnx.State) -> Any:
            params, opt_state = state
            updates, opt_state = self._optimizer.update(gradient, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        program = compiled(update, donate_argnums=0)
        return [(iterate(lambda: program, (params, self._optimizer.init(params)), random_like(params)), 1)]

    def augmentation(self) -> Calls:
        augmentation = Augmentation(shift=self.shift)
        augmented = compiled(lambda key, pixels: augmentation(key, to_unit_range(pixels)))
        key = jax.random.key(0)
        return [(lambda: augmented(key, self._pixels), 1)]

    def dispatch(self) -> Calls:
        """Dispatch a chunk of steps, and divide its time by their number."""
        trainer = self._new_trainer()
        order = np.arange(trainer.chunk * trainer.config.batch_size, dtype=np.int32)
        indices = rearrange(order, "(steps b) -> 1 steps b", b=trainer.config.batch_size)
        data = (trainer.dataset.train_images, trainer.dataset.train_labels, indices)
        data, key = jax.device_put((data, jax.random.split(jax.random.key(0), 1)), on_all(trainer.mesh))
        return [(iterate(trainer.compiled, trainer.snapshot.state, *data, key), 1 / trainer.chunk)]

    def epoch(self) -> Calls:
        """On CPU, a chunk of steps and the evaluation of a batch, times their numbers in an epoch."""
        trainer = self._new_trainer()
        chunks = trainer.run()
        if self.platform == "cpu":
            return [
                (lambda: next(chunks), trainer.steps_per_epoch / trainer.chunk),
                (trainer.evaluate_test, self.test_images / self.evaluation_batch),
            ]
        return [(lambda: next(progress for progress in chunks if progress.ends_epoch), 1)]

    def gemm(self) -> Calls:
        size = self.gemm_sizes[self.platform]
        left, right = jax.random.uniform(jax.random.key(0), (2, size, size)).astype(self._dtype)
        product = compiled(jnp.matmul)
        return [(lambda: product(left, right), 1)]

    def _part(self, name: str) -> Calls:
        """Compute a part of the model, and the gradients of its weights and input for random cotangents."""
        model = self._new_model()
        model.train()
        last = model.capsule_layers[-1]
        under_kernel = getattr(last, "under_kernel", lambda poses: poses)  # of convolutional capsules
        features, capsules, class_poses = random_like(jax.eval_shape(self._intermediates, self._images))
        # Each part has a layer, a function `(layer, input, images, labels)`, and the input that needs a gradient.
        layer, function, inputs = {
            "stem": (model.stem, lambda layer, _, images, labels: layer(images), ()),
            "primary": (model.primary_capsules, lambda layer, features, *_: layer(features), features),
            "votes": (last, lambda layer, poses, *_: layer.votes(under_kernel(poses)), capsules.poses),
            "routing": (last, lambda layer, capsules, *_: layer(capsules), capsules),
            "decoder": (
                model.decoder,
                lambda layer, poses, images, labels: layer(mask_by_label(poses, labels)),
                class_poses,
            ),
        }[name]
        graphdef, params, *rest = nnx.split(layer, nnx.Param, ...)

        def forward(params: nnx.State, inputs: Any, *data: jax.Array) -> Any:
            layer = nnx.merge(graphdef, for_products(params, self._dtype), *rest, copy=True)
            return function(layer, inputs, *data)

        def forward_and_backward(params: nnx.State, inputs: Any, cotangents: Any, *data: jax.Array) -> Any:
            outputs, pullback = jax.vjp(lambda params, inputs: forward(params, inputs, *data), params, inputs)
            return outputs, pullback(cotangents)  # XLA would remove computations of unused outputs

        data = self._images, self._labels  # passed as arguments, because XLA folds constants
        arguments = params, inputs, random_like(jax.eval_shape(forward, params, inputs, *data)), *data
        program = self._compiled_part = compiled(forward_and_backward).lower(*arguments).compile()
        return [(lambda: program(*arguments), 1)]

    def _intermediates(self, images: jax.Array) -> tuple[jax.Array, Capsules, jax.Array]:
        """Compute the features of the stem, the input capsules of the last layer, and the class poses."""
        model = self._new_model()
        nnx.update(model, for_products(nnx.state(model, nnx.Param), self._dtype))
        features = model.stem(images)
        capsules = model.primary_capsules(features)
        *hidden, last = model.capsule_layers
        for layer in hidden:
            capsules = layer(capsules)
        return features, capsules, last(capsules).poses

    def _new_model(self) -> CapsNet:
        return CapsNet.from_config(self._config.model, rngs=nnx.Rngs(0))

    def _new_trainer(self) -> Trainer:
        test_images = self.evaluation_batch if self.platform == "cpu" else self.test_images
        endless = dataclasses.replace(self._config, training=dataclasses.replace(self._training, epochs=10**6))
        return random_trainer(endless, self.train_images, test_images, augment=(f"shift={self.shift}",))


def compiled(function: Callable[..., Any], **options: Any) -> jax.stages.Wrapped:
    """Compile as training and evaluation do; options are for `jax.jit`."""
    return jax.jit(function, compiler_options=compiler_options(), **options)


def random_images(config: Config, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw images [count height width channels] in uint8, and labels [count]."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *config.model.image_shape), dtype=np.uint8)
    return images, rng.integers(0, config.model.num_classes, count, dtype=np.int32)


def random_like(tree: Any) -> Any:
    """Draw arrays of the shapes and dtypes of the leaves, uniform in [0, 1)."""
    key = jax.random.key(0)
    return jax.tree.map(lambda leaf: jax.random.uniform(key, leaf.shape, jnp.float32).astype(leaf.dtype), tree)


def random_trainer(config: Config, train_images: int, test_images: int, *, augment: Sequence[str]) -> Trainer:
    """Make a trainer for random images and labels."""
    dataset = make_dataset(
        *random_images(config, train_images),
        *random_images(config, test_images),
        num_classes=config.model.num_classes,
    )
    return Trainer(
        lambda seed: CapsNet.from_config(config.model, rngs=nnx.Rngs(seed)), dataset, config.training, augment=augment
    )


def iterate(program: Callable[[], Callable[..., Any]], state: Any, *arguments: Any) -> Callable[[], Any]:
    """Make a function without arguments that calls a program and replaces the state, which is donated, by the new one.

    Args:
        program: returns a compiled `(state, *arguments) -> (state, result)`.
        state: the first state.
        arguments: the same in every call.
    """

    def call() -> Any:
        nonlocal state
        state, result = program()(state, *arguments)
        return state, result

    return call
