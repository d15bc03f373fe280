"""Checks that an epoch is one call of one program, which trains as the same steps in several calls do, and times it.

    python benchmarks/whole_epoch.py --batch-size 256 --precision bfloat16 --json benchmarks/results/epoch-gpu.json

On random images, as many as those of MNIST, with random shifts; a timed epoch ends with the evaluation of the test set.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from capsnet_benchmark.measurements import TEST_IMAGES, TRAIN_IMAGES
from capsnet_benchmark.results import origin
from capsnet_jax import CapsNet
from capsnet_jax.config import Config
from capsnet_jax.data import make_dataset
from capsnet_jax.files import replace_file
from capsnet_jax.presets import PRESETS
from capsnet_jax.train.loop import Trainer
from capsnet_jax.train.memory import peak_memory

PARTS = 2  # in which the epoch is trained on for comparison
TOLERANCE = 1e-3  # of the mean loss: sums of a GPU have no fixed order, and differences grow from step to step


def main(arguments: Sequence[str] | None = None) -> None:
    """The exit status is 1 if an epoch takes several calls, or its loss is another in parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=256, help="images in a step (default: 256)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16", help="default: bfloat16")
    parser.add_argument("--epochs", type=int, default=5, help="that are timed, after another one (default: 5)")
    parser.add_argument("--small", action="store_true", help="few small images, to see that all of this works")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args(arguments)
    config = PRESETS["digits" if options.small else "readable"]
    training = dataclasses.replace(
        config.training, batch_size=options.batch_size, precision=options.precision, epochs=options.epochs + 1
    )
    train_images, test_images, size = (
        (6 * options.batch_size, 10, 8) if options.small else (TRAIN_IMAGES, TEST_IMAGES, 28)
    )
    steps = train_images // options.batch_size

    def trainer(steps_per_chunk: int) -> Trainer:
        in_chunks = dataclasses.replace(training, steps_per_chunk=steps_per_chunk)
        return new_trainer(dataclasses.replace(config, training=in_chunks), train_images, test_images, size)

    # A GPU has the whole epoch as a chunk unasked, and that is what is to be seen there.
    whole = trainer(0 if jax.default_backend() == "gpu" else steps)
    calls, loss, seconds = 0, 0.0, []
    start = time.perf_counter()
    for progress in whole.run():
        calls += 1
        if progress.ends_epoch:
            seconds.append(time.perf_counter() - start)
            loss = loss or progress.losses["total"]
            start = time.perf_counter()
    memory, calls_of_epoch = peak_memory(), calls / len(seconds)
    in_parts = trainer(-(-steps // PARTS))
    *_, loss_in_parts = (progress.losses["total"] for _, progress in zip(range(PARTS), in_parts.run(), strict=False))
    difference = abs(loss_in_parts - loss) / loss
    first, *others = seconds
    results = {
        "batch_size": options.batch_size,
        "precision": options.precision,
        "steps": steps,
        "calls_per_epoch": calls_of_epoch,
        "seconds_first": first,
        "seconds_per_epoch": statistics.median(others),
        "samples_seconds": others,
        "peak_memory_bytes": memory,
        "mean_loss": loss,
        "mean_loss_in_parts": loss_in_parts,
    } | origin(["jax"], "cpu" if jax.default_backend() == "cpu" else jax.devices()[0].device_kind)
    if options.json is not None:
        replace_file(options.json, json.dumps(results, indent=2) + "\n")
    print(
        f"An epoch of {steps} steps and its evaluation: {statistics.median(others):.3f} s, calls: {calls_of_epoch:g}; "
        f"the first, with compilation, {first:.1f} s. Mean loss {loss:.6f}, in {PARTS} parts off by {difference:.0e}."
    )
    if calls_of_epoch > 1 or difference > TOLERANCE:
        sys.exit(f"Expected one call, and a loss that is off by at most {TOLERANCE:.0e}.")


def new_trainer(config: Config, train_images: int, test_images: int, size: int) -> Trainer:
    """On random images and labels."""
    rng = np.random.default_rng(0)
    arrays: list[np.ndarray] = []
    for count in (train_images, test_images):
        arrays += [rng.integers(0, 256, (count, size, size, 1), dtype=np.uint8), rng.integers(0, 10, count)]
    return Trainer(
        lambda seed: CapsNet.from_config(config.with_sizes((size, size, 1), 10).model, rngs=nnx.Rngs(seed)),
        make_dataset(*arrays, num_classes=10),
        config.training,
        augment=("shift=0.1",),
    )


if __name__ == "__main__":
    main()
