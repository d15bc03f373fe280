"""The PyTorch functions that the benchmark times; `capsnet_benchmark.jax_work` has those of JAX."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from capsnet_torch.augmentation import random_shift, to_unit_range
from capsnet_torch.capsules import Capsules
from capsnet_torch.model import CapsNet
from capsnet_torch.ops import answers_right
from capsnet_torch.step import train_step

Calls = list[tuple[Callable[[], Any], int | float]]
"""Functions to time, each with its weight in the sum of their times."""
# Full-size training steps of 64 images on 2 CPU cores, torch 2.13, interleaved, the fastest of 10: eager 736 ms,
# compiled 604, with "max-autotune" 615; in the layout channels_last 776, 625 and 615 ms. Medians do not differ by more.
BEST_MODE = {"cpu": "default", "gpu": "max-autotune"}


@dataclass
class Work:
    """The functions to time, for random images and labels.

    Args:
        config: a `Config` of `capsnet_jax` as JSON: model, batch size, precision, losses.
        shift: largest shift of training images, as a fraction of their size.
        train_images: number of training images in an epoch.
        test_images: number of test images that are evaluated after it.
        evaluation_batch: batch size of that evaluation.
        gemm_sizes: number of rows and columns of the matrices of "gemm", by platform.
        compile_mode: mode of `torch.compile`; "best" for the fastest on such a device, "eager" for no compilation.

    Attributes:
        platform: "cpu" or "gpu".
        device: name of the device.
    """

    config: Mapping[str, Any]
    shift: float
    train_images: int
    test_images: int
    evaluation_batch: int
    gemm_sizes: Mapping[str, int]
    compile_mode: str

    def __post_init__(self) -> None:
        on_gpu = torch.cuda.is_available()
        self.platform, self.device = ("gpu", torch.cuda.get_device_name()) if on_gpu else ("cpu", "cpu")
        self._on = torch.device("cuda" if on_gpu else "cpu")
        if on_gpu:
            torch.set_float32_matmul_precision("high")  # TF32, as in JAX
            torch.backends.cudnn.allow_tf32 = True
            torch.backends.cudnn.benchmark = True
        self._compiles = self.compile_mode != "eager"
        self.load(self.config)

    def load(self, config: Mapping[str, Any]) -> None:
        """Use another config."""
        self._training, sizes = config["training"], config["model"]
        self._dtype = getattr(torch, self._training["precision"])
        height, width, channels = sizes["image_shape"]
        self._num_classes, self._image_shape = sizes["num_classes"], (channels, height, width)
        layout = torch.channels_last if self.platform == "gpu" else torch.contiguous_format
        model = CapsNet.from_config(sizes).to(self._on)
        self._model = model.to(memory_format=layout)  # type: ignore[call-overload]  # not in torch's annotations
        self._optimizer = torch.optim.Adam(self._model.parameters(), self._training["learning_rate"], fused=True)
        self._pixels, self._labels = self._new_images(self._training["batch_size"])
        self._images = to_unit_range(self._pixels).to(memory_format=layout)

    def prepare(self, name: str) -> Calls:
        """Return what to time for a measurement, a key of `capsnet_benchmark.measurements.MEASUREMENTS`."""
        if self._compiles:  # otherwise the compiler is not even imported, which saves memory
            torch.compiler.reset()  # the number of compiled programs of a function is limited
        self._model.train(name != "inference")
        method = getattr(self, name, None)
        return method() if method else self._part(name)

    def warmed_up(self) -> None:
        """Reset the peak memory of the GPU, as algorithms with more memory are tried out in the first call."""
        if self.platform == "gpu":
            torch.cuda.reset_peak_memory_stats()

    def block(self, result: Any) -> None:
        """Wait until the GPU has finished."""
        if self.platform == "gpu":
            torch.cuda.synchronize()

    def size(self, result: tuple[Tensor | None, ...]) -> int:
        """Return the number of bytes of the result of a call."""
        return sum(tensor.nbytes for tensor in result if tensor is not None)

    def peak_device_memory(self) -> int | None:
        """Return the largest number of bytes of tensors on the GPU so far; None without a GPU."""
        return torch.cuda.max_memory_allocated() if self.platform == "gpu" else None

    def memory_in_use(self) -> int:
        """Return the number of bytes of tensors on the GPU."""
        return torch.cuda.memory_allocated()

    def step(self) -> Calls:
        train = self._new_train_step()
        return [(lambda: train(self._images, self._labels), 1)]

    def inference(self) -> Calls:
        encode = self._new_encode()
        return [(lambda: encode(self._images), 1)]

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
        """On CPU, a step and the evaluation of a batch, times their numbers in an epoch."""
        batch_size, on_cpu = self._training["batch_size"], self.platform == "cpu"
        steps, batches = self.train_images // batch_size, self.test_images // self.evaluation_batch
        images, labels = self._new_images(self.train_images)
        test_images, test_labels = self._new_images(self.evaluation_batch if on_cpu else self.test_images)
        train, encode = self._new_train_step(self._new_augmentation()), self._new_encode()

        def train_steps(count: int) -> Any:
            self._model.train()
            order = torch.randperm(len(images), device=self._on)[: count * batch_size]
            losses = (train(images[indices], labels[indices]) for indices in order.split(batch_size))
            return sum(losses, start=torch.zeros((), device=self._on)).item()

        def evaluate() -> Any:
            self._model.eval()
            batches = zip(*(data.split(self.evaluation_batch) for data in (test_images, test_labels)), strict=True)
            right = (answers_right(encode(to_unit_range(x)).activations, y).sum() for x, y in batches)
            return sum(right, start=torch.zeros((), device=self._on)).item()

        if on_cpu:
            return [(lambda: train_steps(1), steps), (evaluate, batches)]
        return [(lambda: (train_steps(steps), evaluate()), 1)]

    def gemm(self) -> Calls:
        size = self.gemm_sizes[self.platform]
        left, right = torch.rand(2, size, size, device=self._on).to(self._dtype)
        return [(lambda: left @ right, 1)]

    def _new_images(self, count: int) -> tuple[Tensor, Tensor]:
        """Draw images [count channels height width] in uint8, and labels [count]."""
        pixels = torch.randint(0, 256, (count, *self._image_shape), dtype=torch.uint8, device=self._on)
        return pixels, torch.randint(0, self._num_classes, (count,), device=self._on)

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        mode = BEST_MODE[self.platform] if self.compile_mode == "best" else self.compile_mode
        return torch.compile(function, mode=mode) if self._compiles else function

    @contextmanager
    def _step(self) -> Iterator[None]:
        """Compute in the precision of the config; CUDA graphs may reuse the memory of earlier results."""
        if self._compiles:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self._on.type, torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            yield

    def _new_encode(self) -> Callable[[Tensor], Capsules]:
        compiled = self._compiled(self._model.encode)

        def encode(images: Tensor) -> Capsules:
            with torch.no_grad(), self._step():
                return compiled(images)

        return encode

    def _new_train_step(self, augmented: Callable[[Tensor], Tensor] = lambda images: images) -> Callable[..., Tensor]:
        """Make a function `(images, labels) -> loss` that trains, and does not wait for the loss."""
        compiled = self._compiled(train_step)
        options = {name: self._training[name] for name in ("loss", "reconstruction_weight", "reconstruction_error")}

        def train(images: Tensor, labels: Tensor) -> Tensor:
            with self._step():
                return compiled(self._model, self._optimizer, augmented(images), labels, **options).total.detach()

        return train

    def _new_augmentation(self) -> Callable[[Tensor], Tensor]:
        return self._compiled(lambda pixels: random_shift(to_unit_range(pixels), fraction=self.shift))

    def _part(self, name: str) -> Calls:
        """Compute a part of the model, and the gradients of its weights and input for random cotangents."""
        model, encoder = self._model, self._model.encoder
        stem, (convolution, to_capsules) = encoder.image2primary_capsules[:-2], encoder.image2primary_capsules[-2:]
        last = encoder.primary2digit_capsules
        under_kernel = getattr(last, "under_kernel", lambda poses: poses)  # of convolutional capsules
        with torch.no_grad(), self._step():
            features = encoder.stem(self._images)
            capsules = to_capsules(features, convolution)
            for layer in encoder.hidden_capsules:
                capsules = layer(capsules)
            class_poses = last(capsules).poses
        # Each part has a layer, a function of the inputs, and the inputs that need a gradient.
        parts: dict[str, Any] = {
            "stem": (stem, lambda: encoder.stem(self._images), ()),
            "primary": (convolution, lambda features: to_capsules(features, convolution), (features,)),
            "votes": (last, lambda poses: last.votes(under_kernel(poses)), (capsules.poses,)),
            "routing": (last, lambda *capsules: last(Capsules(*capsules)), capsules),
            "decoder": (model.decoder, lambda poses: model.decode(poses, self._labels), (class_poses,)),
        }
        layer, function, inputs = parts[name]
        inputs = tuple(tensor.detach().requires_grad_() for tensor in inputs)
        compiled = self._compiled(function)
        cotangents: list[Tensor] = []

        def call() -> tuple[Tensor | None, ...]:
            with self._step():
                outputs = compiled(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            if not cotangents:
                cotangents.extend(torch.rand_like(output) for output in outputs)
            gradients = torch.autograd.grad(outputs, [*inputs, *layer.parameters()], cotangents, allow_unused=True)
            return *(output.detach() for output in outputs), *gradients

        return [(call, 1)]
