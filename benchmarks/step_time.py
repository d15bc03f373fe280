"""Times one training step of the full-size model in JAX and in PyTorch, side by side on the same machine.

    python benchmarks/step_time.py --json benchmarks/results/step_time.json

Each framework has a process of its own; they take turns (A B A B ...), so that whatever else the machine does hits both
alike. Both start from the same weights, on the same random images and random labels, in float32. Compilation and the
first steps are not counted; the clock is read when the loss of the step has arrived.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

RECONSTRUCTION_WEIGHT = 10.0
WARM_UP_STEPS = 3


def make_jax_step(images: np.ndarray, labels: np.ndarray) -> Callable[[], float]:
    """A function that trains for one step and returns the loss."""
    import jax
    import optax
    from flax import nnx

    from capsnet_jax import CapsNet
    from capsnet_jax.training import create_state, make_train_step

    optimizer = optax.adam(1e-3)
    graphdef, state = create_state(CapsNet(rngs=nnx.Rngs(0)), optimizer)
    train_step = make_train_step(graphdef, optimizer, reconstruction_weight=RECONSTRUCTION_WEIGHT)
    train_step = jax.jit(train_step, donate_argnums=0)
    batch = jax.device_put((images, labels))

    def step() -> float:
        nonlocal state
        state, losses = train_step(state, *batch)
        return float(losses.total)

    return step


def make_torch_step(images: np.ndarray, labels: np.ndarray) -> Callable[[], float]:
    """A function that trains for one step, eagerly, and returns the loss."""
    import torch

    from capsnet_torch import CapsNet
    from capsnet_torch.training import train_step

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = CapsNet().to(device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    batch = torch.tensor(images.transpose(0, 3, 1, 2).copy()).to(device), torch.tensor(labels).long().to(device)

    def step() -> float:
        return train_step(model, optimizer, *batch, reconstruction_weight=RECONSTRUCTION_WEIGHT).total.item()

    return step


FRAMEWORKS = {"jax": make_jax_step, "torch_eager": make_torch_step}


def work(framework: str, batch_size: int, connection: Connection) -> None:
    """Runs a step whenever told to, and sends back how long it took."""
    rng = np.random.default_rng(0)
    images = rng.random((batch_size, 28, 28, 1), dtype=np.float32)
    step = FRAMEWORKS[framework](images, rng.integers(0, 10, batch_size, dtype=np.int32))
    start = time.perf_counter()
    step()
    connection.send(time.perf_counter() - start)
    for _ in range(WARM_UP_STEPS):
        step()
    while connection.recv():
        start = time.perf_counter()
        step()
        connection.send(time.perf_counter() - start)


def measure(batch_size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, for each framework."""
    context = multiprocessing.get_context("spawn")
    workers = {}
    for framework in FRAMEWORKS:
        connection, other_end = context.Pipe()
        context.Process(target=work, args=(framework, batch_size, other_end), daemon=True).start()
        print(f"{framework}: first step, with compilation, {connection.recv():.1f} s")
        workers[framework] = connection
    samples: dict[str, list[float]] = {framework: [] for framework in FRAMEWORKS}
    for _ in range(rounds):
        for framework, connection in workers.items():
            connection.send(True)
            samples[framework].append(connection.recv())
    for connection in workers.values():
        connection.send(False)
    return samples


def device_name() -> str:
    """What the steps ran on."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=64, help="images in a step (default: 64)")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each framework (default: 15)")
    parser.add_argument("--json", type=Path, help="write samples, medians and ratios to this file")
    arguments = parser.parse_args()

    samples = measure(arguments.batch_size, arguments.rounds)
    medians = {framework: statistics.median(seconds) for framework, seconds in samples.items()}
    for framework, seconds in samples.items():
        low, _, high = statistics.quantiles(seconds, n=4)
        print(
            f"{framework}: median {medians[framework] * 1e3:.0f} ms, quartiles {low * 1e3:.0f} to {high * 1e3:.0f} ms"
        )
    ratio = medians["jax"] / medians["torch_eager"]
    print(f"JAX takes {ratio:.2f} times as long as PyTorch (eager).")
    if arguments.json:
        result = {
            "ratios": {"step_vs_eager": ratio},
            "median_seconds": medians,
            "samples_seconds": samples,
            "batch_size": arguments.batch_size,
            "precision": "float32",
            "device": device_name(),
            "versions": {name: version(name) for name in ("jax", "flax", "optax", "torch")},
            "commit": subprocess.run(
                ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
            ).stdout.strip(),
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
