"""Training and evaluation: the model is split once, and whole chunks of steps run as one compiled program."""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from capsnet_jax.config import TrainingConfig
from capsnet_jax.data import Dataset, to_unit_range
from capsnet_jax.data.augmentation import random_shift
from capsnet_jax.errors import UsageError
from capsnet_jax.losses import margin_loss, reconstruction_loss
from capsnet_jax.model import CapsNet

EVALUATION_BATCH = 250  # images; it divides the 10,000 test images of most sets, and its patches fit in 1 GB


class TrainState(NamedTuple):
    """All that a training step changes."""

    params: nnx.State
    opt_state: optax.OptState
    step: Int[Array, ""]


class Losses(NamedTuple):
    """The loss that training minimises, its parts, and the share of right answers; each a mean over the batch."""

    total: Float[Array, "*steps"]
    margin: Float[Array, "*steps"]
    reconstruction: Float[Array, "*steps"]
    accuracy: Float[Array, "*steps"]


class Evaluation(NamedTuple):
    """Right answers among all images."""

    num_correct: int
    num_images: int

    @property
    def accuracy(self) -> float:
        return self.num_correct / self.num_images


class Progress(NamedTuple):
    """Where training stands after a chunk of steps.

    Attributes:
        epoch: number of the epoch, from 1.
        step: number of training steps done, over all epochs.
        steps_per_epoch: number of training steps in an epoch.
        losses: the fields of `Losses`, as means over the steps of this epoch so far.
        images_per_second: speed of training in this chunk; the first one of a run is compiled, too.
        test: evaluation on all test images, after the last chunk of an epoch.
    """

    epoch: int
    step: int
    steps_per_epoch: int
    losses: dict[str, float]
    images_per_second: float
    test: Evaluation | None


class NonFiniteLossError(ArithmeticError):
    """The loss is not a number, or infinite."""


def compute_losses(
    model: CapsNet,
    images: Float[Array, "b height width channels"],
    labels: Int[Array, " b"],
    *,
    reconstruction_weight: float,
) -> Losses:
    """The losses of a batch of images in [0, 1]."""
    capsules = model.encode(images)
    margin = margin_loss(capsules.activations, labels).mean()
    reconstruction = reconstruction_loss(model.decode(capsules.poses, labels), images).mean()
    accuracy = (capsules.activations.argmax(axis=1) == labels).mean(dtype=margin.dtype)
    return Losses(margin + reconstruction_weight * reconstruction, margin, reconstruction, accuracy)


def create_state(model: CapsNet, optimizer: optax.GradientTransformation) -> tuple[nnx.GraphDef, TrainState]:
    """Splits a model, once, into what is compiled and what is trained."""
    graphdef, params = nnx.split(model)
    # Training donates its state; the copy leaves the caller's model alive.
    params = jax.tree.map(jnp.copy, params)
    return graphdef, TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def make_train_step(
    graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, *, reconstruction_weight: float
) -> Callable[..., tuple[TrainState, Losses]]:
    """A pure function `(state, images, labels) -> (state, losses before the step)`."""

    def loss(params: nnx.State, images: Array, labels: Array) -> tuple[Array, Losses]:
        model = nnx.merge(graphdef, params)
        losses = compute_losses(model, images, labels, reconstruction_weight=reconstruction_weight)
        return losses.total, losses

    def train_step(state: TrainState, images: Array, labels: Array) -> tuple[TrainState, Losses]:
        grads, losses = jax.grad(loss, has_aux=True)(state.params, images, labels)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1), losses

    return train_step


def make_train_chunk(
    train_step: Callable[..., tuple[TrainState, Losses]], *, shift: float
) -> Callable[..., tuple[TrainState, Losses]]:
    """A compiled function that runs a training step for each row of indices, without coming back to the host.

    Args:
        train_step: what `make_train_step` gave.
        shift: largest random shift of an image, as a fraction of its size.

    Returns:
        A function `(state, images, labels, indices, key) -> (state, losses of each step)`. The state is donated.
        The randomness of a step depends on the key and the number of the step alone.
    """

    def train_chunk(
        state: TrainState,
        images: Shaped[Array, "images height width channels"],
        labels: Int[Array, " images"],
        indices: Int[Array, "steps b"],
        key: PRNGKeyArray,
    ) -> tuple[TrainState, Losses]:
        def body(state: TrainState, batch: Int[Array, " b"]) -> tuple[TrainState, Losses]:
            step_key = jax.random.fold_in(key, state.step)
            shifted = random_shift(step_key, to_unit_range(images[batch]), fraction=shift)
            return train_step(state, shifted, labels[batch])

        return jax.lax.scan(body, state, indices)

    return jax.jit(train_chunk, donate_argnames="state")


def make_count_correct(graphdef: nnx.GraphDef) -> Callable[..., Int[Array, ""]]:
    """A compiled function `(params, images, labels, counted) -> number of right answers among the counted`."""

    @jax.jit
    def count_correct(params: nnx.State, images: Array, labels: Array, counted: Bool[Array, " b"]) -> Int[Array, ""]:
        activations = nnx.merge(graphdef, params).encode(to_unit_range(images)).activations
        return jnp.sum((activations.argmax(axis=1) == labels) & counted)

    return count_correct


def evaluate(
    count_correct: Callable[..., Int[Array, ""]],
    params: nnx.State,
    images: Shaped[np.ndarray, "images height width channels"],
    labels: Int[np.ndarray, " images"],
    *,
    batch_size: int = EVALUATION_BATCH,
) -> Evaluation:
    """Counts right answers over all images, each exactly once.

    Args:
        count_correct: what `make_count_correct` gave.
        params: the weights.
        images: as in a `Dataset`.
        labels: class indices.
        batch_size: images in one program call; the last batch is padded with images that are not counted.
    """
    batch_size = min(batch_size, len(images))
    correct = jnp.zeros((), jnp.int32)
    for start in range(0, len(images), batch_size):
        indices = np.arange(start, start + batch_size)
        counted = indices < len(images)
        indices = np.minimum(indices, len(images) - 1)
        correct += count_correct(params, images[indices], labels[indices], counted)
    return Evaluation(int(correct), len(images))


def fit(model: CapsNet, dataset: Dataset, config: TrainingConfig, *, shift: float) -> Iterator[Progress]:
    """Trains with Adam, and tells how far it is after every chunk of steps.

    Args:
        model: the initial weights; at the end of every epoch it is given the weights of then.
        dataset: training and test images; only the former are shifted.
        config: epochs, batch size, learning rate and so on.
        shift: largest random shift of an image, as a fraction of its size.

    Returns:
        An iterator; what it does is done while it is gone through.

    Raises:
        UsageError: at once, if there are fewer training images than a batch, or chunks do not fill an epoch.
        NonFiniteLossError: names the first step whose loss is not finite.
    """
    steps_per_epoch = len(dataset.train_images) // config.batch_size
    if steps_per_epoch == 0:
        raise UsageError(f"batch_size is {config.batch_size}, with only {len(dataset.train_images)} training images.")
    chunk = config.steps_per_chunk or (1 if jax.default_backend() == "cpu" else steps_per_epoch)
    if steps_per_epoch % chunk:
        raise UsageError(f"steps_per_chunk is {chunk}, and must divide the {steps_per_epoch} steps of an epoch.")
    return _epochs(model, dataset, config, shift, steps_per_epoch, chunk)


def _epochs(
    model: CapsNet, dataset: Dataset, config: TrainingConfig, shift: float, steps_per_epoch: int, chunk: int
) -> Iterator[Progress]:
    optimizer = optax.adam(config.learning_rate)
    graphdef, state = create_state(model, optimizer)
    train_step = make_train_step(graphdef, optimizer, reconstruction_weight=config.reconstruction_weight)
    train_chunk = make_train_chunk(train_step, shift=shift)
    count_correct = make_count_correct(graphdef)
    order_key, step_key = jax.random.split(jax.random.key(config.seed))
    images, labels = jax.device_put((dataset.train_images, dataset.train_labels))

    for epoch in range(config.epochs):
        order = jax.random.permutation(jax.random.fold_in(order_key, epoch), len(images))
        chunks = order[: steps_per_epoch * config.batch_size].reshape(-1, chunk, config.batch_size)
        history: list[Losses] = []
        for indices in chunks:
            start = time.perf_counter()
            state, losses = train_chunk(state, images, labels, indices, step_key)
            history.append(jax.device_get(losses))  # waits for the chunk
            images_per_second = chunk * config.batch_size / (time.perf_counter() - start)
            step = epoch * steps_per_epoch + len(history) * chunk
            _check_finite(np.asarray(history[-1].total), first_step=step - chunk + 1)
            test = None
            if len(history) == len(chunks):
                nnx.update(model, jax.tree.map(jnp.copy, state.params))
                test = evaluate(count_correct, state.params, dataset.test_images, dataset.test_labels)
            means = {name: float(np.mean([getattr(losses, name) for losses in history])) for name in Losses._fields}
            yield Progress(epoch + 1, step, steps_per_epoch, means, images_per_second, test)


def _check_finite(losses: Float[np.ndarray, " steps"], *, first_step: int) -> None:
    wrong = np.flatnonzero(~np.isfinite(losses))
    if wrong.size:
        raise NonFiniteLossError(f"The loss of step {first_step + wrong[0]} is {losses[wrong[0]]}; training stopped.")
