"""What a GPU would run in a training step: compile for one that need not be there, and describe the kernels.

Times are bounds, not measurements: of each kernel, the larger of its bytes at the bandwidth of the memory and its
matrix products at the rate of the tensor cores (a roofline). Launches take no time, and no operand is in a cache.
"""

import itertools
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from flax import nnx
from jax.experimental import topologies

from capsnet_benchmark.flops import training_flops
from capsnet_benchmark.hlo import Kernel, kernels_of_loop, parse_program
from capsnet_benchmark.measurements import SIZES
from capsnet_jax.config import Config
from capsnet_jax.data import Dataset
from capsnet_jax.errors import UsageError, in_words
from capsnet_jax.nn.model import CapsNet
from capsnet_jax.tables import markdown_table, number_cell
from capsnet_jax.train.loop import Trainer

GPUS = Path(__file__).parent / "gpus"
PARTS = ("augmentation", "stem", "primary_capsules", "votes", "routing", "decoder", "losses", "casts", "optimizer")
"""Parts of a training step, the names of `jax.named_scope` in the model and the step; all else is "other"."""
FIELD = re.compile(r"\b(\w+) *[:{]")  # of a target_config
CONVOLUTIONS = ("stem", "primary_capsules")
COLUMNS = {"kernels": ("kernels", 1.0, 0), "flops": ("GFLOP", 1e-9, 1), "needed_flops": ("needed", 1e-9, 1)}
COLUMNS |= {"bytes": ("MB", 1e-6, 1), "seconds": ("bound us", 1e6, 1)}
"""Heading, factor and decimals of each number of a part."""
MEASURED = ("stem", "primary", "votes", "routing", "decoder", "optimizer", "augmentation", "step", "epoch")
"""Measurements of the benchmark that a plan has bounds for."""
IN_KERNELS = ("flops", "bytes", "seconds")
BOUNDS = (
    "Times are bounds, not measurements: of each kernel, the larger of its bytes at the bandwidth of the memory and "
    "its matrix products at the rate of the tensor cores. Launches take no time, and no operand is in a cache."
)


class Gpu(NamedTuple):
    """A GPU, from public figures.

    Attributes:
        name: name of the device.
        target_config: what XLA asks about it, a `GpuTargetConfigProto` as text.
        bytes_per_second: bandwidth of its memory.
        flops_per_second: rate of its matrix products, by the dtype of the operands in HLO, such as "bf16".
    """

    name: str
    target_config: str
    bytes_per_second: float
    flops_per_second: dict[str, float]

    def seconds(self, kernel: Kernel) -> float:
        """Bound the time of a launch of a kernel from below.

        Raises:
            UsageError: the rate of its products is not known.
        """
        rate = self.flops_per_second.get(kernel.dtype, 0) if kernel.flops else 1
        if not rate:
            known = ", ".join(self.flops_per_second)
            raise UsageError(
                f"{kernel.name} multiplies {kernel.dtype}; expected flops_per_second for it, not only {known}."
            )
        return max(kernel.bytes / self.bytes_per_second, kernel.flops / rate)


def read_gpu(name: str) -> Gpu:
    """Read the description of a GPU.

    Args:
        name: a file, or the name of one in `capsnet_benchmark/gpus` without its suffix.

    Raises:
        UsageError: there is no such GPU or file, or the file is wrong.
    """
    known = sorted(path.stem for path in GPUS.glob("*.toml"))
    path = GPUS / f"{name}.toml" if name in known else Path(name)
    if not path.is_file():
        raise UsageError(f"The GPU is {name!r}; expected {', '.join(known)} or a file like {GPUS / known[0]}.toml.")
    try:
        fields, example = (tomllib.loads(file.read_text()) for file in (path, GPUS / f"{known[0]}.toml"))
        target_config = fields["target_config"]
        # XLA crashes if it divides by a number that is missing.
        if missing := {*FIELD.findall(example["target_config"])} - {*FIELD.findall(target_config)}:
            raise ValueError(f"target_config has no {min(missing)}")
        if zeros := re.findall(r"\b(?!minor\b)(\w+): *(?:0(?![.\d])|-)", target_config):
            raise ValueError(f"{zeros[0]} is not positive")
        (bandwidth,) = map(int, re.findall(r"\bmemory_bandwidth: *(\d+)", target_config))
        (device,) = re.findall(r'\bdevice_description_str: *"(.+)"', target_config)
        rates = {dtype: float(rate) for dtype, rate in fields["flops_per_second"].items()}
        if not all(rate > 0 for rate in rates.values()):
            raise ValueError("flops_per_second is not positive")
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path} does not describe a GPU ({in_words(error)}); expected target_config and flops_per_second, as in "
            f"{GPUS / known[0]}.toml."
        ) from error
    return Gpu(device, target_config, bandwidth, rates)


def compile_chunk(config: Config, gpu: Gpu, steps: int) -> tuple[Trainer, jax.stages.Compiled]:
    """Compile the program of several training steps, as training runs it, for a GPU that need not be there.

    Args:
        config: model, augmentation, batch size and precision.
        gpu: the GPU.
        steps: number of training steps in the program.

    Raises:
        UsageError: XLA for GPUs is not installed, does not accept the description of the GPU, or the config is wrong.
    """
    if steps < 2:
        raise UsageError(f"steps is {steps}, and must be at least 2, because a single step is not a loop.")
    try:
        devices = topologies.get_topology_desc(
            platform="cuda", target_config=gpu.target_config, topology="1x1x1"
        ).devices
    except NotImplementedError as error:
        raise UsageError('XLA for NVIDIA GPUs is not installed: pip install ".[gpu-plan]".') from error
    except jax.errors.JaxRuntimeError as error:
        raise UsageError(f"XLA does not accept the target_config of {gpu.name} ({in_words(error)}).") from error
    # Arrays of one number that is repeated: the program depends on shapes alone.
    images = np.broadcast_to(np.uint8(0), (SIZES["train_images"], *config.model.image_shape))
    labels = np.broadcast_to(np.int32(0), len(images))
    dataset = Dataset(images, labels, images[:1], labels[:1], tuple(map(str, range(config.model.num_classes))))
    # The model asks for the platform to choose its implementations.
    with mock.patch.object(jax, "default_backend", return_value="gpu"):
        trainer = Trainer(
            lambda seed: CapsNet.from_config(config.model, rngs=nnx.Rngs(seed)),
            dataset,
            config.training,
            augment=config.data.augment,
            stream=False,
            devices=devices,
        )
        return trainer, trainer.compiled(steps)


def summarize(config: Config, gpu: Gpu, steps: int, trainer: Trainer, compiled: jax.stages.Compiled) -> dict[str, Any]:
    """Summarize a compiled program, as JSON types; arguments as for `compile_chunk`, and its results.

    Returns:
        - "parts": by part of a step, "kernels", "flops", "needed_flops", "bytes" and "seconds"; "total" is their sum.
        - "kernels": each kernel of a step, with its part.
        - "memory": bytes of the program at its "peak", of "temporary" arrays, training "images" and "state", and of
          the state that is "aliased", which means written in place.
        - "convolution_flops" over the direct algorithm, and names of "dilated" convolutions.
        - "host": names of instructions that exchange data with the host.
        - "steps_per_epoch".

    Raises:
        UsageError: the program is not understood.
    """
    kernels = [
        {
            **kernel._asdict(),
            "operations": kernel.operations[:1],
            "part": part_of(kernel.operations),
            "seconds": gpu.seconds(kernel),
        }
        for kernel in kernels_of_loop(parse_program(compiled.as_text() or ""), steps)
    ]
    needed = {part: config.training.batch_size * flops for part, flops in training_flops(config.model).items()}
    parts: dict[str, dict[str, float]] = {}
    for part in (*PARTS, "other"):
        here = [kernel for kernel in kernels if kernel["part"] == part]
        sums = {name: sum(each["launches"] * each[name] for each in here) for name in ("flops", "bytes", "seconds")}
        numbers = {"kernels": sum(kernel["launches"] for kernel in here), "needed_flops": needed.get(part, 0), **sums}
        if any(numbers.values()):
            parts[part] = numbers
    analysis: Any = compiled.memory_analysis()
    state = jax.tree.leaves(compiled.in_avals[0][0])
    memory = {
        "peak": analysis.peak_memory_in_bytes,
        "temporary": analysis.temp_size_in_bytes,
        "images": trainer.dataset.train_images.nbytes,
        "state": sum(leaf.size * leaf.dtype.itemsize for leaf in state),
        "aliased": analysis.alias_size_in_bytes,
    }
    return {
        "parts": parts,
        "total": {name: sum(numbers[name] for numbers in parts.values()) for name in COLUMNS},
        "convolution_flops": sum(parts[part]["flops"] for part in CONVOLUTIONS)
        / sum(needed[part] for part in CONVOLUTIONS),
        "dilated": [kernel["name"] for kernel in kernels if kernel["is_dilated"]],
        "host": [kernel["name"] for kernel in kernels if kernel["uses_host"]],
        "memory": memory,
        "steps_per_epoch": trainer.steps_per_epoch,
        "kernels": kernels,
    }


def part_of(operations: Sequence[str]) -> str:
    """Return the innermost part of a step that the first possible path names, or "other"."""
    words = (word for path in operations for word in reversed(re.findall(r"\w+", path)))
    return next((word for word in words if word in PARTS), "other")


def describe(plan: Mapping[str, Any], before: Mapping[str, Any] | None = None, *, largest: int = 0) -> str:
    """Format a plan as a table by part, sentences, and a table of the kernels that take longest.

    Args:
        plan: the plan, from `summarize`.
        before: another plan, whose numbers are shown to the left of those of the plan.
        largest: number of kernels in the second table.
    """
    plans = [plan] if before is None else [before, plan]
    headings = [[heading] if before is None else [f"{heading} before", heading] for heading, _, _ in COLUMNS.values()]
    rows = [["part", *itertools.chain(*headings)]]
    for part in (*PARTS, "other", "total"):
        numbers = [{**each["parts"], "total": each["total"]}.get(part) for each in plans]
        if any(numbers):
            cells = [
                number_cell(of_plan and factor * of_plan[name], decimals)
                for name, (_, factor, decimals) in COLUMNS.items()
                for of_plan in numbers
            ]
            rows.append([part.replace("_", " "), *cells])
    kernels = sorted(plan["kernels"], key=lambda kernel: -kernel["launches"] * kernel["seconds"])[:largest]
    longest = [["kernel", "part", "launches", *(COLUMNS[name][0] for name in IN_KERNELS)]]
    for kernel in kernels:
        cells = [number_cell(COLUMNS[name][1] * kernel[name], COLUMNS[name][2]) for name in IN_KERNELS]
        longest.append([kernel["name"], kernel["part"].replace("_", " "), str(kernel["launches"]), *cells])
    tables = [markdown_table(rows), *(map(sentences, plans)), BOUNDS, *([markdown_table(longest)] if kernels else [])]
    return "\n\n".join(tables)


def describe_measured(plan: Mapping[str, Any], files: Sequence[Mapping[str, Any]]) -> str:
    """Format the bounds of a plan beside the times that a GPU took.

    Args:
        plan: the plan, from `summarize`.
        files: what `capsnet benchmark --json` wrote for the same model, batch size and precision.

    Raises:
        UsageError: the files have none of the times, or are of another model, batch size or precision.
    """
    for results in files:
        for option in ("preset", "batch_size", "precision"):
            if results[option] != plan[option]:
                raise UsageError(
                    f"The measured {option.replace('_', ' ')} is {results[option]}; expected {plan[option]}, as in "
                    "the plan."
                )
    medians = {name: seconds for results in files for name, seconds in results["median_seconds"]["jax"].items()}
    bounds = {part: numbers["seconds"] for part, numbers in plan["parts"].items()}
    total = plan["total"]["seconds"]
    # The benchmark times the last capsule layer with its votes.
    bounds |= {"step": total, "epoch": plan["steps_per_epoch"] * total, "primary": bounds["primary_capsules"]}
    bounds["routing"] += bounds["votes"]
    rows = [
        [name, number_cell(1e6 * bound, 1), number_cell(1e6 * measured, 1), number_cell(measured / bound, 2)]
        for name in MEASURED
        if (bound := bounds.get(name)) and (measured := medians.get(name))
    ]
    if not rows:
        raise UsageError(f"No time was measured of {', '.join(MEASURED)}; expected one or more.")
    devices = ", ".join(dict.fromkeys(results["device"] for results in files))
    heading = ["part", "bound us", "measured us", "measured / bound"]
    return f"Planned for {plan['device']}, measured on {devices}:\n\n{markdown_table([heading, *rows])}"


def sentences(plan: Mapping[str, Any]) -> str:
    """Describe in sentences what the table of a plan does not show."""
    memory = {name: f"{size / 1e6:,.0f} MB" for name, size in plan["memory"].items()}
    aliased = "all of it" if plan["memory"]["aliased"] >= plan["memory"]["state"] else memory["aliased"]
    lines = [
        f"{plan['preset']}, batch size {plan['batch_size']}, {plan['precision']}, on {plan['device']}:",
        f"Memory at its peak: {memory['peak']}; temporary arrays {memory['temporary']}, training images "
        f"{memory['images']}, state {memory['state']}, {aliased} written in place.",
        f"Convolutions: {plan['convolution_flops']:.2f} times the operations of the direct algorithm; with zeros "
        f"between the elements of an operand: {', '.join(plan['dilated']) or 'none'}.",
        f"Exchanges with the host in a chunk of steps: {', '.join(plan['host']) or 'none'}.",
        f"An epoch of {plan['steps_per_epoch']} steps: {plan['steps_per_epoch'] * plan['total']['seconds']:.2f} s.",
    ]
    return "\n".join(lines)
