"""The command `capsnet benchmark`: time and memory of the model in JAX and in PyTorch."""

import dataclasses
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from capsnet_benchmark.flops import training_flops
from capsnet_benchmark.measurements import MEASUREMENTS, SIZES, measure
from capsnet_benchmark.processes import start_workers
from capsnet_benchmark.results import describe, origin, summarize
from capsnet_jax.config import Config
from capsnet_jax.errors import UsageError
from capsnet_jax.files import replace_file
from capsnet_jax.presets import get_preset

WORK = {
    "jax": "capsnet_benchmark.jax_work",
    "torch-eager": "capsnet_torch.benchmark",
    "torch-compile": "capsnet_torch.benchmark",
}
"""The module with the class `Work` of each row."""


@dataclass(frozen=True)
class Benchmark:
    """Measure time and memory of a model in JAX and in PyTorch, in processes that take turns.

    Images and labels are random. Calls are timed after a warm-up, until the result is available. On CPU the epoch is
    extrapolated from single steps and batches. The GPU is used if there is one. Run nothing else on the machine at
    the same time, because it would distort times and ratios."""

    preset: str = "readable"
    """Preset whose model and losses are measured."""
    image_shape: tuple[int, int, int] = (28, 28, 1)
    """Height, width and number of channels of the images."""
    num_classes: int = 10
    """Number of classes."""
    batch_size: int = 64
    """Number of images in a step."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the operands of matrix products (PyTorch: autocast). On a GPU, float32 means TF32 in both frameworks."""
    routing_implementation: Literal["auto", "votes", "fused"] = "auto"
    """How JAX computes dynamic routing; see `capsnet train --help`."""
    rounds: int = 15
    """Number of samples of each measurement and row."""
    rows: tuple[str, ...] = tuple(WORK)
    """Rows of the table: jax, torch-eager, torch-compile."""
    measure: tuple[str, ...] = tuple(MEASUREMENTS)
    """Measurements to make."""
    compile_mode: Literal["best", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "best"
    """Mode of torch.compile; best is the mode that was fastest on this kind of device."""
    json: Path | None = None
    """File for all samples, medians, ratios, versions and the machine, rewritten after each measurement."""

    def run(self) -> None:
        """Measure, write the file and print the results.

        Raises:
            UsageError: an option is wrong, PyTorch is not installed, the file cannot be written, or a process failed.
        """
        config = self.validated_config()
        flops = sum(training_flops(config.model).values())
        has_decoder = config.model.decoder_hidden is not None
        names = [name for name in MEASUREMENTS if name in self.measure and (has_decoder or name != "decoder")]
        options = {name: value for name, value in vars(self).items() if name not in ("json", "measure")}
        options["load_before"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        arguments = {"config": config.to_json(), **SIZES}
        modes: dict[str, dict[str, str]] = {"torch-eager": {"compile_mode": "eager"}}
        modes["torch-compile"] = {"compile_mode": self.compile_mode}
        results: dict[str, Any] = {}
        with start_workers({row: (WORK[row], arguments | modes.get(row, {})) for row in self.rows}) as workers:
            options |= origin(self.rows, workers[0].device)  # before the file makes the checkout dirty
            for samples in measure(workers, names, rounds=self.rounds, may_fail=("torch-compile",)):
                results = summarize(
                    samples, batch_size=self.batch_size, flops_per_image=flops, platform=workers[0].platform
                )
                results |= options
                if self.json is not None:
                    replace_file(self.json, json.dumps(results, indent=2) + "\n")
        print(describe(results))

    def validated_config(self) -> Config:
        """Return the config to measure, before any process is started.

        Raises:
            UsageError: an option is wrong, PyTorch is not installed, or the file cannot be written.
        """
        for name, known in (("rows", WORK), ("measure", MEASUREMENTS)):
            values = getattr(self, name)
            unknown = [value for value in values if value not in known] or ([] if values else [None])
            if unknown:
                raise UsageError(f"{name} is {unknown[0] or 'empty'}; expected {', '.join(known)}.")
        if self.rounds < 2:
            raise UsageError(f"rounds is {self.rounds}, and must be at least 2.")
        if self.batch_size > SIZES["train_images"]:
            raise UsageError(f"batch_size is {self.batch_size}, and must be at most {SIZES['train_images']}, an epoch.")
        if set(self.rows) != {"jax"} and importlib.util.find_spec("torch") is None:
            raise UsageError(
                f'rows are {", ".join(self.rows)}, and PyTorch is not installed: pip install ".[torch]", or --rows jax.'
            )
        if self.json and (self.json.is_dir() or not os.access(self.json.absolute().parent, os.W_OK)):
            raise UsageError(f"json is {self.json}; expected a file in a folder that exists and can be written to.")
        config = get_preset(self.preset)
        if config.model.decoder_hidden is None and self.measure == ("decoder",):
            raise UsageError(f"measure is decoder, and the model of {self.preset} has none.")
        model = dataclasses.replace(config.model, routing_implementation=self.routing_implementation)
        training = dataclasses.replace(config.training, batch_size=self.batch_size, precision=self.precision)
        config = dataclasses.replace(config, model=model, training=training)
        return config.with_sizes(self.image_shape, self.num_classes)
