"""Count the collectives of a training step: the communication between devices in the program that XLA compiled.

    python benchmarks/collectives.py --devices 8 --preset readable --batch-size 512

The devices are simulated on the CPU. Times would mean nothing, but the collectives are the same.
"""

import argparse
import dataclasses
import math
import os
import re
from collections import Counter

COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
ARRAY = re.compile(r"([a-z]+)(\d+)\[([\d,]*)\]")


def count(program: str) -> dict[str, tuple[int, int]]:
    """Return the number of collectives of each kind in an HLO program, and the bytes of their results on one device."""
    numbers: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for results, kind in COLLECTIVE.findall(program):
        numbers[kind] += 1
        for _, bits, shape in ARRAY.findall(results):
            sizes[kind] += math.prod(map(int, filter(None, shape.split(",")))) * int(bits) // 8
    return {kind: (numbers[kind], sizes[kind]) for kind in numbers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=8, help="number of devices (default: 8)")
    parser.add_argument("--preset", default="readable", help="of the model, on images of 28 x 28 (default: readable)")
    parser.add_argument("--batch-size", type=int, default=512, help="images in a step, of all devices (default: 512)")
    options = parser.parse_args()
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={options.devices}"
    os.environ["JAX_PLATFORMS"] = "cpu"

    from capsnet_benchmark.jax_work import random_trainer
    from capsnet_jax.presets import PRESETS

    config = PRESETS[options.preset].with_sizes((28, 28, 1), 10)
    training = dataclasses.replace(config.training, batch_size=options.batch_size)
    config = dataclasses.replace(config, training=training)
    trainer = random_trainer(config, options.batch_size, 10, augment=config.data.augment)
    print(f"{options.preset}: {trainer.num_params:,} weights, {4 * trainer.num_params:,} bytes in float32")
    for kind, (number, size) in count(trainer.compiled().as_text() or "").items():
        print(f"{kind}: {number} in a step, {size:,} bytes")


if __name__ == "__main__":
    main()
