"""Accuracy on all images, each counted exactly once."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Int, Shaped

from capsnet_jax.ops import answers_right, to_unit_range

EVALUATION_BATCH = 250  # images; it divides the 10,000 test images of most sets, and its patches fit in 1 GB


class Evaluation(NamedTuple):
    """Right answers among all images."""

    num_correct: int
    num_images: int

    @property
    def accuracy(self) -> float:
        return self.num_correct / self.num_images


def final_line(num_correct: int, num_images: int) -> str:
    """The result of a run, as its last line tells it."""
    accuracy = num_correct / num_images
    return f"test accuracy {accuracy:.4f} on {num_images} images (error {100 * (1 - accuracy):.2f} %)"


def make_count_correct(graphdef: nnx.GraphDef, sharding: NamedSharding | None = None) -> Callable[..., Int[Array, ""]]:
    """A compiled function `(state of the model, images, labels, counted) -> right answers among the counted`.

    Args:
        graphdef: of the model.
        sharding: how a batch is spread over devices; None to leave it to the compiler.
    """

    @jax.jit
    def count_correct(state: nnx.State, images: Array, labels: Array, counted: Bool[Array, " b"]) -> Int[Array, ""]:
        if sharding is not None:
            images = jax.lax.with_sharding_constraint(images, sharding)
        model = nnx.merge(graphdef, state)
        model.eval()
        activations = model.encode(to_unit_range(images)).activations
        return jnp.sum(answers_right(activations, labels) & counted)

    return count_correct


def evaluate(
    count_correct: Callable[..., Int[Array, ""]],
    state: nnx.State,
    images: Shaped[np.ndarray, "images height width channels"],
    labels: Int[np.ndarray, "images *classes"],
    *,
    batch_size: int = EVALUATION_BATCH,
    num_devices: int = 1,
) -> Evaluation:
    """Counts right answers over all images, each exactly once.

    Args:
        count_correct: what `make_count_correct` gave.
        state: weights of the model, and running means, as `nnx.split` gives them.
        images: as in a `Dataset`.
        labels: class indices, one or several for each image.
        batch_size: images in one program call; the last batch is padded with images that are not counted.
        num_devices: a batch is made large enough to be shared out evenly among so many.
    """
    batch_size = -(-min(batch_size, len(images)) // num_devices) * num_devices
    correct = jnp.zeros((), jnp.int32)
    for start in range(0, len(images), batch_size):
        indices = np.arange(start, start + batch_size)
        counted = indices < len(images)
        indices = np.minimum(indices, len(images) - 1)
        correct += count_correct(state, images[indices], labels[indices], counted)
    return Evaluation(int(correct), len(images))
