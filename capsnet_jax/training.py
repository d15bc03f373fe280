"""Training: the model is split once, and whole chunks of steps run as one compiled program."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from capsnet_jax.config import TrainingConfig
from capsnet_jax.data import Dataset, to_unit_range
from capsnet_jax.data.augmentation import random_shift
from capsnet_jax.errors import UsageError
from capsnet_jax.evaluation import Evaluation, evaluate, make_count_correct
from capsnet_jax.losses import margin_loss, reconstruction_loss, spread_loss, spread_margin
from capsnet_jax.model import CapsNet
from capsnet_jax.optimizer import create_optimizer


class TrainState(NamedTuple):
    """All that a training step changes: weights, running means of batch normalisation, and the optimiser's state."""

    params: nnx.State
    batch_stats: nnx.State
    opt_state: optax.OptState
    step: Int[Array, ""]


class Losses(NamedTuple):
    """The loss that training minimises, its parts, and the share of right answers; each a mean over the batch."""

    total: Float[Array, "*steps"]
    margin: Float[Array, "*steps"]
    reconstruction: Float[Array, "*steps"]
    accuracy: Float[Array, "*steps"]


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
    reconstruction_error: str = "mean",
    loss: str = "margin",
    step: Int[Array, ""] | int = 0,
) -> Losses:
    """The losses of a batch of images in [0, 1].

    Args:
        model: in training mode, if it has batch normalisation that shall see this batch.
        images: of the shape that the model was made for.
        labels: class indices.
        reconstruction_weight: weight of the reconstruction; 0 leaves the decoder out.
        reconstruction_error: "mean" over the pixels, or their "sum".
        loss: "margin" or "spread".
        step: number of training steps done, on which the margin of the spread loss depends.

    Raises:
        UsageError: the loss is unknown, or the model has no decoder to reconstruct with.
    """
    capsules = model.encode(images)
    if loss == "margin":
        margin = margin_loss(capsules.activations, labels).mean()
    elif loss == "spread":
        margin = spread_loss(capsules.activations, labels, margin=spread_margin(step)).mean()
    else:
        raise UsageError(f"loss is {loss!r}; expected margin or spread.")
    accuracy = (capsules.activations.argmax(axis=1) == labels).mean(dtype=margin.dtype)
    if reconstruction_weight == 0:
        return Losses(margin, margin, jnp.zeros_like(margin), accuracy)
    reconstructions = model.decode(capsules.poses, labels)
    reconstruction = reconstruction_loss(reconstructions, images, error=reconstruction_error).mean()
    return Losses(margin + reconstruction_weight * reconstruction, margin, reconstruction, accuracy)


def create_state(model: CapsNet, optimizer: optax.GradientTransformation) -> tuple[nnx.GraphDef, TrainState]:
    """Splits a model, once, into what is compiled and what is trained."""
    model = nnx.clone(model)
    model.train()
    # Training donates its state; the copy leaves the caller's model alive.
    params, batch_stats = (jax.tree.map(jnp.copy, nnx.state(model, kind)) for kind in (nnx.Param, nnx.BatchStat))
    return nnx.graphdef(model), TrainState(params, batch_stats, optimizer.init(params), jnp.zeros((), jnp.int32))


def make_train_step(
    graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, **options: Any
) -> Callable[..., tuple[TrainState, Losses]]:
    """A pure function `(state, images, labels) -> (state, losses before the step)`; options as of `compute_losses`."""

    def loss(
        params: nnx.State, batch_stats: nnx.State, images: Array, labels: Array, step: Array
    ) -> tuple[Array, tuple[Losses, nnx.State]]:
        model = nnx.merge(graphdef, params, batch_stats, copy=True)
        losses = compute_losses(model, images, labels, step=step, **options)
        return losses.total, (losses, nnx.state(model, nnx.BatchStat))

    def train_step(state: TrainState, images: Array, labels: Array) -> tuple[TrainState, Losses]:
        grads, (losses, batch_stats) = jax.grad(loss, has_aux=True)(
            state.params, state.batch_stats, images, labels, state.step
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, batch_stats, opt_state, state.step + 1), losses

    return train_step


def make_train_chunk(
    train_step: Callable[..., tuple[TrainState, Losses]], *, shift: float, shift_pixels: int = 0
) -> Callable[..., tuple[TrainState, Losses]]:
    """A compiled function that runs a training step for each row of indices, without coming back to the host.

    Args:
        train_step: what `make_train_step` gave.
        shift: largest random shift of an image, as a fraction of its size.
        shift_pixels: in place of that, largest shift in whole pixels.

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
            shifted = random_shift(step_key, to_unit_range(images[batch]), fraction=shift, pixels=shift_pixels)
            return train_step(state, shifted, labels[batch])

        return jax.lax.scan(body, state, indices)

    return jax.jit(train_chunk, donate_argnames="state")


def fit(
    model: CapsNet, dataset: Dataset, config: TrainingConfig, *, shift: float, shift_pixels: int = 0
) -> Iterator[Progress]:
    """Trains with Adam, and tells how far it is after every chunk of steps.

    Args:
        model: the initial weights; at the end of every epoch it is given the weights of then.
        dataset: training and test images; only the former are shifted.
        config: epochs, batch size, learning rate and so on.
        shift: largest random shift of an image, as a fraction of its size.
        shift_pixels: in place of that, largest shift in whole pixels.

    Returns:
        An iterator; what it does is done while it is gone through.

    Raises:
        UsageError: at once, if there are fewer training images than a batch, chunks do not fill an epoch, or images
            are to be reconstructed and there is no decoder.
        NonFiniteLossError: names the first step whose loss is not finite.
    """
    steps_per_epoch, chunk = plan_epoch(model, dataset, config)
    optimizer = create_optimizer(config)
    graphdef, state = create_state(model, optimizer)
    train_chunk = make_configured_chunk(graphdef, optimizer, config, shift=shift, shift_pixels=shift_pixels)
    return _epochs(model, dataset, config, graphdef, state, train_chunk, steps_per_epoch, chunk)


def plan_epoch(model: CapsNet, dataset: Dataset, config: TrainingConfig) -> tuple[int, int]:
    """The number of training steps in an epoch, and in a chunk of it that runs as one program.

    Raises:
        UsageError: as `fit`.
    """
    steps_per_epoch = len(dataset.train_images) // config.batch_size
    if steps_per_epoch == 0:
        raise UsageError(f"batch_size is {config.batch_size}, with only {len(dataset.train_images)} training images.")
    chunk = config.steps_per_chunk or (1 if jax.default_backend() == "cpu" else steps_per_epoch)
    if steps_per_epoch % chunk:
        raise UsageError(f"steps_per_chunk is {chunk}, and must divide the {steps_per_epoch} steps of an epoch.")
    if model.decoder is None and config.reconstruction_weight:
        raise UsageError(
            f"reconstruction_weight is {config.reconstruction_weight}, and must be 0 for a model without a decoder."
        )
    return steps_per_epoch, chunk


def make_configured_chunk(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    config: TrainingConfig,
    *,
    shift: float,
    shift_pixels: int = 0,
) -> Callable[..., tuple[TrainState, Losses]]:
    """What `make_train_chunk` gives for the training step of this config."""
    train_step = make_train_step(
        graphdef,
        optimizer,
        loss=config.loss,
        reconstruction_weight=config.reconstruction_weight,
        reconstruction_error=config.reconstruction_error,
    )
    return make_train_chunk(train_step, shift=shift, shift_pixels=shift_pixels)


def order_of_epoch(
    key: PRNGKeyArray, epoch: int, *, num_images: int, chunk: int, batch_size: int
) -> Int[Array, "chunks steps b"]:
    """The images of each training step of an epoch, in an order that depends on the key and the epoch alone.

    Args:
        key: the first of the two that a run's seed is split into.
        epoch: number of the epoch, from 0.
        num_images: number of training images; the few that do not fill the last batch are left out.
        chunk: number of steps in a chunk; it divides those of an epoch.
        batch_size: images in a step.
    """
    order = jax.random.permutation(jax.random.fold_in(key, epoch), num_images)
    return order[: num_images // batch_size * batch_size].reshape(-1, chunk, batch_size)


def _epochs(
    model: CapsNet,
    dataset: Dataset,
    config: TrainingConfig,
    graphdef: nnx.GraphDef,
    state: TrainState,
    train_chunk: Callable[..., tuple[TrainState, Losses]],
    steps_per_epoch: int,
    chunk: int,
) -> Iterator[Progress]:
    count_correct = make_count_correct(graphdef)
    order_key, step_key = jax.random.split(jax.random.key(config.seed))
    images, labels = jax.device_put((dataset.train_images, dataset.train_labels))

    for epoch in range(config.epochs):
        chunks = order_of_epoch(order_key, epoch, num_images=len(images), chunk=chunk, batch_size=config.batch_size)
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
                trained = nnx.merge_state(state.params, state.batch_stats)
                nnx.update(model, jax.tree.map(jnp.copy, trained))
                test = evaluate(count_correct, trained, dataset.test_images, dataset.test_labels)
            means = {name: float(np.mean([getattr(losses, name) for losses in history])) for name in Losses._fields}
            yield Progress(epoch + 1, step, steps_per_epoch, means, images_per_second, test)


def _check_finite(losses: Float[np.ndarray, " steps"], *, first_step: int) -> None:
    wrong = np.flatnonzero(~np.isfinite(losses))
    if wrong.size:
        raise NonFiniteLossError(f"The loss of step {first_step + wrong[0]} is {losses[wrong[0]]}; training stopped.")
