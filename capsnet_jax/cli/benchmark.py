"""The command `capsnet benchmark`: time and memory of the model beside its PyTorch twin."""

import dataclasses
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from capsnet_benchmark.flops import training_flops
from capsnet_benchmark.measurements import GEMM_SIZES, MEASUREMENTS, TEST_IMAGES, TRAIN_IMAGES, Samples, measure
from capsnet_benchmark.processes import Worker, same_device
from capsnet_benchmark.results import origin, summarize
from capsnet_benchmark.table import describe
from capsnet_jax.config import Config
from capsnet_jax.errors import UsageError
from capsnet_jax.files import replace_file
from capsnet_jax.presets import PRESETS
from capsnet_jax.train.evaluation import EVALUATION_BATCH

ROWS = ("jax", "torch-eager", "torch-compile")
SHIFT = 0.1  # largest shift of training images, as a fraction of their size: that of the reference model
WORK = {"jax": "capsnet_benchmark.jax_work"} | dict.fromkeys(ROWS[1:], "capsnet_torch.benchmark")


@dataclass(frozen=True)
class Benchmark:
    """Times the model beside its PyTorch twin, each in a process of its own, in turn, on random images and labels.

    Every sample is taken after warming up, and when its result has arrived. On CPU the epoch is extrapolated from
    single steps and batches. The GPU is used where there is one. Nothing else should run on the machine: what takes a
    core away delays all others of a row."""

    preset: str = "readable"
    """Model and losses; the names are those of `capsnet train`."""
    image_shape: tuple[int, int, int] = (28, 28, 1)
    """Height, width and number of channels of the images."""
    num_classes: int = 10
    """Number of classes."""
    batch_size: int = 64
    """Number of images in a step."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the operands of products, in PyTorch by autocast. On a GPU, float32 is TF32 in both."""
    routing_implementation: Literal["auto", "votes", "fused"] = "auto"
    """How JAX computes dynamic routing, as an option of `capsnet train`."""
    rounds: int = 15
    """Number of samples of each measurement, from each row in turn."""
    rows: tuple[str, ...] = ROWS
    """Rows of the table: jax, torch-eager, torch-compile."""
    measure: tuple[str, ...] = tuple(MEASUREMENTS)
    """Only these measurements."""
    compile_mode: Literal["best", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "best"
    """Mode of torch.compile; best for the one that was the fastest on such a device."""
    json: Path | None = None
    """File that all samples are written to, with medians, ratios and where they come from."""

    def run(self) -> None:
        """Measures, and prints the results; the file is written anew after each measurement.

        Raises:
            UsageError: an option is wrong, PyTorch is not installed, the file cannot be written, or a process failed.
        """
        config = self.validated_config()
        flops = training_flops(config.model)
        load_before = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        options = {name: value for name, value in vars(self).items() if name not in ("json", "measure")}
        came_from: dict[str, Any] = {}
        results: dict[str, Any] = {}
        for samples, platform, device in self.take_samples(config):
            came_from = came_from or origin(self.rows, device)  # once, as the file may be one of the checkout
            results = summarize(samples, batch_size=self.batch_size, flops_per_image=flops, platform=platform)
            results |= options | {"load_before": load_before} | came_from
            if self.json is not None:
                replace_file(self.json, json.dumps(results, indent=2) + "\n")
        print(describe(results))

    def validated_config(self) -> Config:
        """What is measured; refuses what cannot be, before any process is started.

        Raises:
            UsageError: an option is wrong, PyTorch is not installed, or the file cannot be written.
        """
        _among("preset", (self.preset,), PRESETS)
        _among("rows", self.rows, ROWS)
        _among("measure", self.measure, MEASUREMENTS)
        for name, smallest in (("rounds", 2), ("batch_size", 1), ("num_classes", 2)):
            if getattr(self, name) < smallest:
                raise UsageError(f"{name} is {getattr(self, name)}, and must be at least {smallest}.")
        if min(self.image_shape) < 1:
            raise UsageError(f"image_shape is {self.image_shape}, and every size in it must be at least 1.")
        if self.batch_size > TRAIN_IMAGES:
            raise UsageError(f"batch_size is {self.batch_size}, and must be at most {TRAIN_IMAGES}, those of an epoch.")
        if set(self.rows) != {"jax"} and importlib.util.find_spec("torch") is None:
            raise UsageError(
                f'rows are {", ".join(self.rows)}, and PyTorch is not installed: pip install ".[torch]", or --rows jax.'
            )
        if self.json is not None:
            _check_writable(self.json)
        config = PRESETS[self.preset]
        if config.model.decoder_hidden is None and self.measure == ("decoder",):
            raise UsageError(f"measure is decoder, and the model of {self.preset} has none.")
        model = dataclasses.replace(config.model, routing_implementation=self.routing_implementation)
        training = dataclasses.replace(config.training, batch_size=self.batch_size, precision=self.precision)
        config = dataclasses.replace(config, model=model, training=training)
        return config.with_sizes(self.image_shape, self.num_classes)

    def take_samples(self, config: Config) -> Iterator[tuple[Samples, str, str]]:
        """After each measurement the samples so far, the platform ("cpu" or "gpu") and the name of the device."""
        has_decoder = config.model.decoder_hidden is not None
        names = [name for name in MEASUREMENTS if name in self.measure and (has_decoder or name != "decoder")]
        arguments = {
            "config": config.to_json(),
            "shift": SHIFT,
            "train_images": TRAIN_IMAGES,
            "test_images": TEST_IMAGES,
            "evaluation_batch": EVALUATION_BATCH,
            "gemm_sizes": GEMM_SIZES,
        }
        compile_modes: dict[str, dict[str, Any]] = {
            "jax": {},
            "torch-eager": {"compile_mode": "eager"},
            "torch-compile": {"compile_mode": self.compile_mode},
        }
        with ExitStack() as stack:
            workers = []
            for row in dict.fromkeys(self.rows):
                workers.append(Worker(row, WORK[row], arguments | compile_modes[row]))
                stack.callback(workers[-1].stop)
            platform, device = same_device({worker.row: worker.introduction() for worker in workers})
            for samples in measure(workers, names, rounds=self.rounds, may_fail=("torch-compile",)):
                yield samples, platform, device


def _among(name: str, values: Sequence[str], known: Sequence[str] | dict[str, Any]) -> None:
    unknown = [value for value in values if value not in known]
    if unknown or not values:
        got = repr(unknown[0]) if unknown else "empty"
        raise UsageError(f"{name} is {got}; expected {', '.join(known)}.")


def _check_writable(path: Path) -> None:
    folder = path.absolute().parent
    reason = (
        f"the folder {folder} does not exist"
        if not folder.is_dir()
        else "it is a folder"
        if path.is_dir()
        else f"the folder {folder} is read-only"
        if not os.access(folder, os.W_OK)
        else None
    )
    if reason:
        raise UsageError(f"json is {path}, which cannot be written: {reason}.")
