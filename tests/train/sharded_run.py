"""Train in float64, alone or as one of several processes, and write the results; run by test_sharding.

python tests/train/sharded_run.py OUTPUT VARIANT [COORDINATOR NUM_PROCESSES PROCESS_ID]
"""

import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from capsnet_jax import CapsNet
from capsnet_jax.config import TrainingConfig
from capsnet_jax.interchange.weights import to_torch
from capsnet_jax.train.loop import Trainer
from capsnet_jax.train.sharding import connect
from tests.conftest import IMAGE_SHAPE, SMALL, make_small_dataset

# Two epochs of four steps, in chunks of two: one program.
CONFIG = TrainingConfig(epochs=2, batch_size=16, learning_rate=0.01, steps_per_chunk=2)
NUM_IMAGES = 70
VARIANTS = {
    "plain": {"routing": "dynamic"},
    # A routing that is quick to compile.
    "all options": {"routing": "uniform", "seeds": (0, 1), "accumulate": 2, "stream": True},
}


def train(variant: str) -> dict[str, np.ndarray]:
    """Train, and return losses of every chunk, correct answers after every epoch and final weights of each seed."""
    options = dict(VARIANTS[variant])
    model = SMALL | {"batch_norm": True, "routing": options.pop("routing")}
    fields = vars(CONFIG) | {"accumulate": options.pop("accumulate", 1)}
    dataset = make_small_dataset()
    images, labels = (np.resize(array, (NUM_IMAGES, *array.shape[1:])) for array in dataset[:2])  # some of them twice
    assert np.array_equal(images[50:], dataset.train_images[: NUM_IMAGES - 50])
    trainer = Trainer(
        lambda seed: CapsNet(IMAGE_SHAPE, 10, **model, param_dtype="float64", rngs=nnx.Rngs(seed)),
        dataset._replace(train_images=images, train_labels=labels),
        TrainingConfig(**fields),
        augment=("shift=0.2", "rotation=20"),
        **options,
    )
    progress = list(trainer.run())
    results = {
        "losses": np.array([[list(seed.chunk.values()) for seed in step.seeds] for step in progress]),
        "correct": np.array([[seed.test.num_correct for seed in step.seeds] for step in progress if step.ends_epoch]),
    }
    for index in range(len(trainer.seeds)):
        results |= {f"{index} {name}": array for name, array in to_torch(trainer.models()[index]).items()}
    return results


def main() -> None:
    output, variant, *processes = sys.argv[1:]
    if processes:
        coordinator, num_processes, process_id = processes
        connect(coordinator, int(num_processes), int(process_id))
    results = train(variant)
    if jax.process_index() == 0:
        np.savez(Path(output), devices=len(jax.devices()), **results)


if __name__ == "__main__":
    main()
