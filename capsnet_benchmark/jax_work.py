"""What is measured of the JAX model; the twin's is `capsnet_torch.benchmark`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from capsnet_benchmark.jax_epoch import Calls, dispatch, parts_of_epoch, whole_epoch
from capsnet_benchmark.jax_gradient import forward_and_backward, random_like
from capsnet_jax.capsules import Capsules
from capsnet_jax.config import Config
from capsnet_jax.data import make_dataset
from capsnet_jax.data.augmentation import Augmentation
from capsnet_jax.errors import UsageError
from capsnet_jax.nn.layers import CapsuleLayer
from capsnet_jax.nn.model import CapsNet
from capsnet_jax.nn.precision import for_products
from capsnet_jax.ops import mask_by_label, to_unit_range
from capsnet_jax.train.loop import Trainer
from capsnet_jax.train.memory import compile_lean, peak_memory
from capsnet_jax.train.optimizer import create_optimizer
from capsnet_jax.train.step import TrainState, create_state, make_train_step


class Work:
    """The measurements; the method of a name gives what is called, and how often that is to be counted.

    Args:
        config: that of a run, as JSON.
        shift: largest shift of training images, as a fraction of their size.
        train_images: number of images in an epoch.
        test_images: number of images that are evaluated after it.
        evaluation_batch: number of them that are evaluated at once.
        gemm_sizes: rows and columns of the matrices whose product is the limit, by platform.

    Attributes:
        platform: "cpu" or "gpu".
        device: its name, where it is a GPU.
    """

    def __init__(
        self,
        *,
        config: Mapping[str, Any],
        shift: float,
        train_images: int,
        test_images: int,
        evaluation_batch: int,
        gemm_sizes: Mapping[str, int],
    ):
        device, *others = jax.devices()
        if others:
            raise UsageError(f"There are {1 + len(others)} devices; expected one, as with CUDA_VISIBLE_DEVICES=0.")
        self.platform, self.device = device.platform, device.device_kind
        self._config = Config.from_json(config)
        self._training = self._config.training
        self._image_shape, self._num_classes = self._config.model.image_shape, self._config.model.num_classes
        self._shift = shift
        self._train_images, self._test_images, self._evaluation_batch = train_images, test_images, evaluation_batch
        self._steps = train_images // self._training.batch_size
        self._gemm_size = gemm_sizes[self.platform]
        self._optimizer = create_optimizer(self._training, self._steps)
        rng = np.random.default_rng(0)
        count = self._training.batch_size
        self._pixels = jax.device_put(rng.integers(0, 256, (count, *self._image_shape), dtype=np.uint8))
        self._labels = jax.device_put(rng.integers(0, self._num_classes, count, dtype=np.int32))
        self._images = to_unit_range(self._pixels)

    def prepare(self, name: str) -> Calls:
        """What a measurement calls, each with how often it is to be counted."""
        return getattr(self, name)()

    def warmed_up(self) -> None:
        """The peak of the memory counts from the beginning: JAX cannot forget it."""

    def block(self, result: Any) -> None:
        """Waits for what a call gave."""
        jax.block_until_ready(result)

    def peak_device_memory(self) -> int | None:
        """The most bytes in use on the GPU so far; None without one."""
        return peak_memory() if self.platform == "gpu" else None

    def step(self) -> Calls:
        train_step, state = self._new_training()
        train_step, program = jax.jit(train_step, donate_argnums=0), None

        def call() -> Any:
            nonlocal state, program
            if program is None:  # in the first call, which is timed by itself
                program = compile_lean(train_step, state, self._images, self._labels)
            state, metrics = program(state, self._images, self._labels)
            return metrics

        return [(call, 1)]

    def inference(self) -> Calls:
        graphdef, params, *rest = nnx.split(self._new_model(), nnx.Param, ...)

        @jax.jit
        def encode(params: nnx.State, images: jax.Array) -> Capsules:
            return nnx.merge(graphdef, self._in_precision(params), *rest, copy=True).encode(images)

        return [(lambda: encode(params, self._images), 1)]

    def routing(self) -> Calls:
        layer, capsules = self._last_layer()
        return self._gradient(
            layer, lambda layer, poses, activations: layer(Capsules(poses, activations)), capsules[:1], capsules[1:]
        )

    def stem(self) -> Calls:
        stem = self._new_model().stem
        stem.train()
        return self._gradient(stem, lambda stem, images: stem(images), (), (self._images,))

    def primary(self) -> Calls:
        encoder = self._in_precision_model()
        features = random_like(jax.eval_shape(encoder.stem, self._images))
        return self._gradient(self._new_model().primary_capsules, lambda layer, features: layer(features), (features,))

    def votes(self) -> Calls:
        layer, capsules = self._last_layer()

        def votes(layer: Any, poses: jax.Array) -> jax.Array:
            return layer.votes(poses if isinstance(layer, CapsuleLayer) else layer.under_kernel(poses))

        return self._gradient(layer, votes, capsules[:1])

    def decoder(self) -> Calls:
        model = self._new_model()
        poses = random_like(jax.eval_shape(model.encode, self._images)).poses
        return self._gradient(
            model.decoder,
            lambda decoder, poses, labels: decoder(mask_by_label(poses, labels)),
            (poses,),
            (self._labels,),
        )

    def optimizer(self) -> Calls:
        params = nnx.state(self._new_model(), nnx.Param)
        state = (params, self._optimizer.init(params))
        gradient = random_like(params)

        def update(state: Any, gradient: nnx.State) -> Any:
            params, opt_state = state
            updates, opt_state = self._optimizer.update(gradient, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        update = jax.jit(update, donate_argnums=0)

        def call() -> Any:
            nonlocal state
            state = update(state, gradient)
            return state

        return [(call, 1)]

    def augmentation(self) -> Calls:
        augmentation = Augmentation(shift=self._shift)
        augmented = jax.jit(lambda key, pixels: augmentation(key, to_unit_range(pixels)))
        key = jax.random.key(0)
        return [(lambda: augmented(key, self._pixels), 1)]

    def dispatch(self) -> Calls:
        return dispatch(self._new_trainer())

    def epoch(self) -> Calls:
        if self.platform == "cpu":
            return parts_of_epoch(self._new_trainer(), self._test_images / self._evaluation_batch)
        return whole_epoch(self._new_trainer())

    def gemm(self) -> Calls:
        dtype = jnp.dtype(self._training.precision)
        left, right = jax.random.uniform(jax.random.key(0), (2, self._gemm_size, self._gemm_size)).astype(dtype)
        product = jax.jit(jnp.matmul)
        return [(lambda: product(left, right), 1)]

    def _new_model(self) -> CapsNet:
        return CapsNet.from_config(self._config.model, rngs=nnx.Rngs(0))

    def _new_trainer(self) -> Trainer:
        """On random images; on CPU, with as few test images as are evaluated at once."""
        rng = np.random.default_rng(0)
        arrays: list[np.ndarray] = []
        for count in (self._train_images, self._evaluation_batch if self.platform == "cpu" else self._test_images):
            arrays.append(rng.integers(0, 256, (count, *self._image_shape), dtype=np.uint8))
            arrays.append(rng.integers(0, self._num_classes, count))
        dataset = make_dataset(*arrays, num_classes=self._num_classes)
        endless = dataclasses.replace(self._training, epochs=10**6)
        return Trainer(lambda seed: self._new_model(), dataset, endless, augment=(f"shift={self._shift}",))

    def _new_training(self) -> tuple[Callable[..., Any], TrainState]:
        training = self._training
        graphdef, state = create_state(self._new_model(), self._optimizer)
        train_step = make_train_step(
            graphdef,
            self._optimizer,
            precision=training.precision,
            loss=training.loss,
            reconstruction_weight=training.reconstruction_weight,
            reconstruction_error=training.reconstruction_error,
        )
        return train_step, state

    def _in_precision(self, params: nnx.State) -> nnx.State:
        return for_products(params, jnp.bfloat16) if self._training.precision == "bfloat16" else params

    def _in_precision_model(self) -> CapsNet:
        graphdef, params, *rest = nnx.split(self._new_model(), nnx.Param, ...)
        return nnx.merge(graphdef, self._in_precision(params), *rest)

    def _last_layer(self) -> tuple[Any, Capsules]:
        """The layer, and random capsules of the shapes that it is given."""

        def below(images: jax.Array) -> Capsules:
            encoder = self._in_precision_model()
            capsules = encoder.primary_capsules(encoder.stem(images))
            for layer in list(encoder.capsule_layers)[:-1]:
                capsules = layer(capsules)
            return capsules

        return self._new_model().capsule_layers[-1], random_like(jax.eval_shape(below, self._images))

    def _gradient(self, layer: Any, function: Callable[..., Any], inputs: Any, fixed: Any = ()) -> Calls:
        return [(forward_and_backward(layer, function, inputs, fixed, in_precision=self._in_precision), 1)]
