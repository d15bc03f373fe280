"""Show what a GPU would run in a training step, without a GPU: kernels, operations, bytes and memory.

    python benchmarks/gpu_plan.py --preset readable --batch-size 256 --precision bfloat16 --json plan.json
    python benchmarks/gpu_plan.py --preset readable --routing my_module:my_routing --against plan.json
    python benchmarks/gpu_plan.py --preset readable --measured gpu-bfloat16.json gpu-parts.json

XLA compiles a chunk of training steps for the GPU, which is described by a file in capsnet_benchmark/gpus. Times are
bounds, not measurements: of each kernel, the larger of its bytes at the bandwidth of the memory and its matrix products
at the rate of the tensor cores. Launches take no time, and no operand is in a cache. Needs pip install ".[gpu-plan]".
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # where this runs, whether there is a GPU or not

from capsnet_benchmark.plan import compile_chunk, describe, describe_measured, read_gpu, summarize
from capsnet_benchmark.results import origin
from capsnet_jax.errors import UsageError
from capsnet_jax.files import replace_file
from capsnet_jax.presets import get_preset


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="readable", help="of model, losses and augmentation (default: readable)")
    parser.add_argument("--batch-size", type=int, default=256, help="images in a step (default: 256)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16", help="default: bfloat16")
    parser.add_argument("--routing", help="a name, with options, or package.module:function; default: of the preset")
    parser.add_argument("--routing-implementation", choices=("auto", "votes", "fused"), default="auto")
    parser.add_argument("--steps", type=int, default=10, help="training steps in the program (default: 10)")
    parser.add_argument("--gpu", default="h100", help="h100, h200 or a file that describes another (default: h100)")
    parser.add_argument("--largest", type=int, default=0, help="also list this many kernels that take longest")
    parser.add_argument("--json", type=Path, help="file for the plan")
    parser.add_argument("--hlo", type=Path, help="file for the text of the program")
    parser.add_argument("--against", type=Path, help="an earlier plan, to be shown beside this one")
    parser.add_argument(
        "--measured", type=Path, nargs="+", help="files of capsnet benchmark --json, to be shown beside"
    )
    options = parser.parse_args(arguments)
    try:
        print(run(options))
    except UsageError as error:
        parser.error(str(error))


def run(options: argparse.Namespace) -> str:
    """Compile, write the files and return the tables."""
    before = options.against and read_plan(options.against)
    measured = [read_results(path) for path in options.measured or ()]
    for path in (options.json, options.hlo):
        if path and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
            raise UsageError(f"The file is {path}; expected one in a folder that exists and can be written to.")
    gpu, config = read_gpu(options.gpu), get_preset(options.preset)
    sys.path.append("")  # find the user's routings in the working directory, as the command does
    model = {
        "routing": options.routing or config.model.routing,
        "routing_implementation": options.routing_implementation,
    }
    training = {"batch_size": options.batch_size, "precision": options.precision}
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **model),
        training=dataclasses.replace(config.training, **training),
    )
    described = {"preset": options.preset, **model, **training, "steps": options.steps, **origin(["jax"], gpu.name)}
    trainer, compiled = compile_chunk(config, gpu, options.steps)
    if options.hlo:
        replace_file(options.hlo, compiled.as_text() or "")
    plan = described | summarize(config, gpu, options.steps, trainer, compiled)
    if options.json:
        replace_file(options.json, json.dumps(plan, indent=1) + "\n")
    tables = [describe(plan, before, largest=options.largest)]
    return "\n\n".join([*tables, describe_measured(plan, measured)] if measured else tables)


def read_results(path: Path) -> dict[str, Any]:
    """Read what `capsnet benchmark --json` has written.

    Raises:
        UsageError: the file is something else, or has no row of JAX.
    """
    try:
        results = json.loads(path.read_text())
        results["median_seconds"]["jax"], *(results[name] for name in ("preset", "batch_size", "precision", "device"))
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise UsageError(f"{path} has no times of JAX; expected a file of capsnet benchmark --json.") from error
    return results


def read_plan(path: Path) -> dict[str, Any]:
    """Read a plan that `--json` has written.

    Raises:
        UsageError: the file is not one.
    """
    try:
        plan = json.loads(path.read_text())
        describe(plan)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is not a plan; expected a file that --json has written.") from error
    return plan


if __name__ == "__main__":
    main()
