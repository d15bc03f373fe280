"""What is measured of the twin; of the JAX model, `capsnet_benchmark.jax_work` measures the same."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from capsnet_torch.augmentation import random_shift, to_unit_range
from capsnet_torch.capsules import Capsules
from capsnet_torch.layers import CapsuleLayer
from capsnet_torch.model import CapsNet
from capsnet_torch.ops import answers_right
from capsnet_torch.training import train_step

Calls = list[tuple[Callable[[], Any], int | float]]
# Full-size training steps of 64 images on 2 CPU cores, torch 2.13, in turn, the fastest of 10: eager 736 ms, compiled
# 604, by "max-autotune" 615; in the layout channels_last 776, 625 and 615 ms. Medians differ no more than these.
BEST_MODE = {"cpu": "default", "gpu": "max-autotune"}


class Work:
    """The measurements; the method of a name gives what is called, and how often that is to be counted.

    Args:
        config: of a run of `capsnet_jax`, as JSON.
        shift: largest shift of training images, as a fraction of their size.
        train_images: number of images in an epoch.
        test_images: number of images that are evaluated after it.
        evaluation_batch: number of them that are evaluated at once.
        gemm_sizes: rows and columns of the matrices whose product is the limit, by platform.
        compile_mode: of `torch.compile`, or "best", the fastest; "eager" for the twin as it is.

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
        compile_mode: str,
    ):
        on_gpu = torch.cuda.is_available()
        self.platform, self.device = ("gpu", torch.cuda.get_device_name()) if on_gpu else ("cpu", "cpu")
        self._on = torch.device("cuda" if on_gpu else "cpu")
        if on_gpu:
            torch.set_float32_matmul_precision("high")  # TF32, as JAX has it
            torch.backends.cudnn.allow_tf32 = True
            torch.backends.cudnn.benchmark = True
        self._training = config["training"]
        self._dtype = getattr(torch, self._training["precision"])
        height, width, channels = config["model"]["image_shape"]
        self._num_classes, self._channels_first = config["model"]["num_classes"], (channels, height, width)
        self._shift = shift
        self._train_images, self._test_images, self._evaluation_batch = train_images, test_images, evaluation_batch
        self._gemm_size = gemm_sizes[self.platform]
        self._compiles = compile_mode != "eager"
        self._compile_mode = BEST_MODE[self.platform] if compile_mode == "best" else compile_mode
        layout = torch.channels_last if on_gpu else torch.contiguous_format
        model = CapsNet.from_config(config["model"]).to(self._on)
        self._model = model.to(memory_format=layout)  # type: ignore[call-overload]  # not in torch's annotations
        self._optimizer = torch.optim.Adam(self._model.parameters(), self._training["learning_rate"], fused=True)
        self._pixels, self._labels = self._new_images(self._training["batch_size"])
        self._images = to_unit_range(self._pixels).to(memory_format=layout)

    def prepare(self, name: str) -> Calls:
        """What a measurement calls, each with how often it is to be counted."""
        if self._compiles:  # eager, none of the compiler is loaded, for memory's sake
            torch.compiler.reset()  # what was compiled before counts against the number of programs that is allowed
        self._model.train(name != "inference")
        return getattr(self, name)()

    def warmed_up(self) -> None:
        """Counts the peak of a GPU's memory from here: trying out algorithms takes more, for once."""
        if self.platform == "gpu":
            torch.cuda.reset_peak_memory_stats()

    def block(self, result: Any) -> None:
        """Waits for all that was called."""
        if self.platform == "gpu":
            torch.cuda.synchronize()

    def peak_device_memory(self) -> int | None:
        """The most bytes of tensors on the GPU so far; None without one."""
        return torch.cuda.max_memory_allocated() if self.platform == "gpu" else None

    def step(self) -> Calls:
        train = self._new_train_step()
        return [(lambda: train(self._images, self._labels), 1)]

    def inference(self) -> Calls:
        encode = self._compiled(self._model.encode)

        def call() -> Capsules:
            with torch.no_grad(), self._step():
                return encode(self._images)

        return [(call, 1)]

    def routing(self) -> Calls:
        layer, capsules = self._last_layer()
        return self._gradient(lambda poses: layer(Capsules(poses, capsules.activations)), layer, capsules.poses)

    def stem(self) -> Calls:
        encoder = self._model.encoder
        return self._gradient(lambda: encoder.stem(self._images), encoder.image2primary_capsules[:-2])

    def primary(self) -> Calls:
        convolution, to_capsules = self._model.encoder.image2primary_capsules[-2:]
        with torch.no_grad(), self._step():
            features = self._model.encoder.stem(self._images)
        return self._gradient(lambda features: to_capsules(features, convolution), convolution, features)

    def votes(self) -> Calls:
        layer, capsules = self._last_layer()
        seen = (lambda poses: poses) if isinstance(layer, CapsuleLayer) else layer.under_kernel
        return self._gradient(lambda poses: layer.votes(seen(poses)), layer, capsules.poses)

    def decoder(self) -> Calls:
        with torch.no_grad(), self._step():
            poses = self._model.encode(self._images).poses
        return self._gradient(lambda poses: self._model.decode(poses, self._labels), self._model.decoder, poses)

    def optimizer(self) -> Calls:
        for parameter in self._model.parameters():
            parameter.grad = torch.rand_like(parameter)
        return [(self._optimizer.step, 1)]

    def augmentation(self) -> Calls:
        augmented = self._new_augmentation()
        return [(lambda: augmented(self._pixels), 1)]

    def dispatch(self) -> Calls:
        train = self._new_train_step(self._new_augmentation())
        return [(lambda: train(self._pixels, self._labels), 1)]

    def epoch(self) -> Calls:
        batch_size, on_cpu = self._training["batch_size"], self.platform == "cpu"
        steps, batches = self._train_images // batch_size, self._test_images // self._evaluation_batch
        images, labels = self._new_images(self._train_images)
        test_images, test_labels = self._new_images(self._evaluation_batch if on_cpu else self._test_images)
        train, encode = self._new_train_step(self._new_augmentation()), self._compiled(self._model.encode)

        def train_steps(count: int) -> float:
            self._model.train()
            total = torch.zeros((), device=self._on)
            for indices in torch.randperm(len(images), device=self._on)[: count * batch_size].split(batch_size):
                total += train(images[indices], labels[indices])
            return total.item()

        def evaluate() -> int:
            self._model.eval()
            right = torch.zeros((), dtype=torch.int64, device=self._on)
            for batch, of_batch in zip(
                test_images.split(self._evaluation_batch), test_labels.split(self._evaluation_batch), strict=True
            ):
                with torch.no_grad(), self._step():
                    right += answers_right(encode(to_unit_range(batch)).activations, of_batch).sum()
            return int(right.item())

        if on_cpu:
            return [(lambda: train_steps(1), steps), (evaluate, batches)]
        return [(lambda: (train_steps(steps), evaluate()), 1)]

    def gemm(self) -> Calls:
        left, right = torch.rand(2, self._gemm_size, self._gemm_size, device=self._on).to(self._dtype)
        return [(lambda: left @ right, 1)]

    def _new_images(self, count: int) -> tuple[Tensor, Tensor]:
        """Random images in uint8, and labels."""
        pixels = torch.randint(0, 256, (count, *self._channels_first), dtype=torch.uint8, device=self._on)
        return pixels, torch.randint(0, self._num_classes, (count,), device=self._on)

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, mode=self._compile_mode) if self._compiles else function

    @contextmanager
    def _step(self) -> Iterator[None]:
        """What is computed in it is in the precision, and may take the memory of what was computed in it before."""
        if self._compiles:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self._on.type, torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            yield

    def _new_train_step(
        self, augmented: Callable[[Tensor], Tensor] = lambda images: images
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """A function that trains on images and labels, and returns the loss, without waiting for it."""
        compiled = self._compiled(train_step)
        names = ("loss", "reconstruction_weight", "reconstruction_error")
        options = {name: self._training[name] for name in names}

        def train(images: Tensor, labels: Tensor) -> Tensor:
            with self._step():
                return compiled(self._model, self._optimizer, augmented(images), labels, **options).total.detach()

        return train

    def _new_augmentation(self) -> Callable[[Tensor], Tensor]:
        return self._compiled(lambda pixels: random_shift(to_unit_range(pixels), fraction=self._shift))

    def _last_layer(self) -> tuple[Any, Capsules]:
        """The last capsule layer and the capsules that it is given."""
        encoder = self._model.encoder
        with torch.no_grad(), self._step():
            capsules = encoder.primary_capsules(self._images)
            for layer in encoder.hidden_capsules:
                capsules = layer(capsules)
        return encoder.primary2digit_capsules, capsules

    def _gradient(self, function: Callable[..., Any], layer: nn.Module, *inputs: Tensor) -> Calls:
        """The function and, for a random gradient of its outputs, those by the weights of a layer and by the inputs."""
        inputs = tuple(tensor.detach().requires_grad_() for tensor in inputs)
        by = [*inputs, *layer.parameters()]
        compiled = self._compiled(function)
        cotangents: list[Tensor] = []

        def call() -> Any:
            with self._step():
                outputs = compiled(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            if not cotangents:
                cotangents.extend(torch.rand_like(output) for output in outputs)
            return torch.autograd.grad(outputs, by, cotangents, allow_unused=True)

        return [(call, 1)]
