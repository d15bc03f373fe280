"""Check that an epoch is one call of one program with the same losses as several calls, and time it.

    python benchmarks/whole_epoch.py --batch-size 256 --precision bfloat16 --json benchmarks/results/epoch-gpu.json

The images are random, as many as in MNIST, with random shifts; a timed epoch includes the evaluation of the test set.
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

from capsnet_benchmark.jax_work import random_trainer
from capsnet_benchmark.measurements import SIZES
from capsnet_benchmark.results import origin
from capsnet_jax.files import replace_file
from capsnet_jax.presets import PRESETS
from capsnet_jax.train.loop import Trainer
from capsnet_jax.train.memory import peak_memory

PARTS = 2  # calls in which the epoch is trained for comparison
TOLERANCE = 1e-3  # of the mean loss: sums on a GPU have no fixed order, and differences grow from step to step


def main(arguments: Sequence[str] | None = None) -> None:
    """Exit with status 1 if an epoch takes several calls, or if its loss differs from that of several calls."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=256, help="images in a step (default: 256)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16", help="default: bfloat16")
    parser.add_argument("--epochs", type=int, default=5, help="timed epochs, after an untimed one (default: 5)")
    parser.add_argument("--small", action="store_true", help="few small images, to try the script")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args(arguments)
    config = PRESETS["digits" if options.small else "readable"]
    train_images, test_images = SIZES["train_images"], SIZES["test_images"]
    if options.small:
        train_images, test_images = 6 * options.batch_size, 10
    steps = train_images // options.batch_size

    def trainer(steps_per_chunk: int) -> Trainer:
        training = dataclasses.replace(
            config.training,
            batch_size=options.batch_size,
            precision=options.precision,
            epochs=options.epochs + 1,
            steps_per_chunk=steps_per_chunk,
        )
        in_chunks = dataclasses.replace(config, training=training)
        return random_trainer(in_chunks, train_images, test_images, augment=("shift=0.1",))

    # On a GPU the whole epoch is one chunk by default, which is to be checked here.
    whole = trainer(0 if jax.default_backend() == "gpu" else steps)
    calls, losses, seconds = 0, [], []
    start = time.perf_counter()
    for progress in whole.run():
        calls += 1
        if progress.ends_epoch:
            seconds.append(time.perf_counter() - start)
            losses.append(progress.losses["total"])
            start = time.perf_counter()
    memory, calls_of_epoch, (loss, *_) = peak_memory(), calls / len(seconds), losses
    in_parts = trainer(-(-steps // PARTS)).run()
    loss_in_parts = [next(in_parts).losses["total"] for _ in range(PARTS)][-1]
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
        f"the first, with compilation, {first:.1f} s. Mean loss {loss:.6f}; in {PARTS} calls it differs by "
        f"{difference:.0e}."
    )
    if calls_of_epoch > 1 or difference > TOLERANCE:
        sys.exit(f"Expected one call per epoch, and losses that differ by at most {TOLERANCE:.0e}.")


if __name__ == "__main__":
    main()
