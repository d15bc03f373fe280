"""A training step, pure, and a chunk of steps as one compiled program."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from capsnet_jax.data.augmentation import Augmentation
from capsnet_jax.errors import NonFiniteLossError, UsageError
from capsnet_jax.nn.losses import margin_loss, reconstruction_loss, spread_loss, spread_margin
from capsnet_jax.nn.model import CapsNet
from capsnet_jax.nn.precision import for_products
from capsnet_jax.ops import answers_right, to_unit_range


class TrainState(NamedTuple):
    """All that a training step changes.

    Attributes:
        params: weights.
        average: their exponential moving average, where there is one; otherwise empty.
        batch_stats: running means of batch normalisation.
        opt_state: the state of the optimiser.
        step: number of training steps done.
    """

    params: nnx.State
    average: nnx.State
    batch_stats: nnx.State
    opt_state: optax.OptState
    step: Int[Array, ""]

    @property
    def weights(self) -> nnx.State:
        """What is evaluated and kept: the average of the weights, or else the weights, and the running means."""
        return nnx.merge_state(self.average or self.params, self.batch_stats)


class Losses(NamedTuple):
    """The loss that training minimises, its parts, and the share of right answers; each a mean over the batch."""

    total: Float[Array, "*steps"]
    margin: Float[Array, "*steps"]
    reconstruction: Float[Array, "*steps"]
    accuracy: Float[Array, "*steps"]


class StepMetrics(NamedTuple):
    """What is known of a training step: its `Losses`, before it, and the norm of the gradient before clipping."""

    total: Float[Array, "*steps"]
    margin: Float[Array, "*steps"]
    reconstruction: Float[Array, "*steps"]
    accuracy: Float[Array, "*steps"]
    gradient_norm: Float[Array, "*steps"]


def check_finite(metrics: Float[np.ndarray, "metrics seeds steps"], seeds: Sequence[int], *, first_step: int) -> None:
    """Refuses a loss or a gradient that is not finite.

    Args:
        metrics: those of `StepMetrics`, in that order.
        seeds: of the runs, for the message.
        first_step: number of the first step, from 1.

    Raises:
        NonFiniteLossError: names the first such step.
    """
    for name, what in (("total", "loss"), ("gradient_norm", "gradient")):
        numbers = metrics[StepMetrics._fields.index(name)]
        steps, places = np.nonzero(~np.isfinite(numbers.T))
        if steps.size:
            place, step = places[0], steps[0]
            raise NonFiniteLossError(what, seeds[place], first_step + int(step), float(numbers[place, step]))


def compute_losses(
    model: CapsNet,
    images: Float[Array, "b height width channels"],
    labels: Int[Array, "b *classes"],
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
        labels: class indices, one or several for each image.
        reconstruction_weight: weight of the reconstruction; 0 leaves the decoder out.
        reconstruction_error: "mean" over the pixels, or their "sum".
        loss: "margin" or "spread".
        step: number of training steps done, on which the margin of the spread loss depends.

    Raises:
        UsageError: the loss is unknown or not one for several labels, or the model has no decoder to reconstruct with.
    """
    capsules = model.encode(images)
    if loss == "margin":
        margin = margin_loss(capsules.activations, labels).mean()
    elif loss == "spread":
        margin = spread_loss(capsules.activations, labels, margin=spread_margin(step)).mean()
    else:
        raise UsageError(f"loss is {loss!r}; expected margin or spread.")
    accuracy = answers_right(capsules.activations, labels).mean(dtype=margin.dtype)
    if reconstruction_weight == 0:
        return Losses(margin, margin, jnp.zeros_like(margin), accuracy)
    reconstructions = model.decode(capsules.poses, labels)
    reconstruction = reconstruction_loss(reconstructions, images, error=reconstruction_error).mean()
    return Losses(margin + reconstruction_weight * reconstruction, margin, reconstruction, accuracy)


def create_state(
    model: CapsNet, optimizer: optax.GradientTransformation, *, average: bool = False
) -> tuple[nnx.GraphDef, TrainState]:
    """Splits a model, once, into what is compiled and what is trained.

    Args:
        model: the initial weights; they are copied, as training donates its state.
        optimizer: as for `make_train_step`.
        average: whether a moving average of the weights is kept, too.
    """
    model = nnx.clone(model)
    model.train()
    params, batch_stats = (jax.tree.map(jnp.copy, nnx.state(model, kind)) for kind in (nnx.Param, nnx.BatchStat))
    means = jax.tree.map(jnp.copy, params) if average else nnx.State({})
    return nnx.graphdef(model), TrainState(params, means, batch_stats, optimizer.init(params), jnp.zeros((), jnp.int32))


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    ema_decay: float = 0.0,
    precision: str = "float32",
    **options: Any,
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    r"""A pure function `(state, images, labels) -> (state, metrics of the step)`.

    Args:
        graphdef: of `create_state`.
        optimizer: what makes an update of the gradient.
        accumulate: number of parts that the batch is gone through in, one after the other; their gradients are
            averaged, which with batch normalisation is not the gradient of the whole batch.
        ema_decay: factor $\beta$ of the moving average $m \leftarrow \beta m + (1 - \beta) w$. In step $t$ it is no
            more than $(1 + t) / (10 + t)$, so that the initial weights are soon forgotten.
        precision: "bfloat16" for operands of products in bfloat16; see `precision.for_products`.
        options: of `compute_losses`.
    """

    def loss(
        params: nnx.State, batch_stats: nnx.State, images: Array, labels: Array, step: Array
    ) -> tuple[Array, tuple[Losses, nnx.State]]:
        weights = for_products(params, jnp.bfloat16) if precision == "bfloat16" else params
        model = nnx.merge(graphdef, weights, batch_stats, copy=True)
        losses = compute_losses(model, images, labels, step=step, **options)
        return losses.total, (losses, nnx.state(model, nnx.BatchStat))

    gradient = jax.grad(loss, has_aux=True)

    def gradient_of_batch(state: TrainState, images: Array, labels: Array) -> tuple[nnx.State, Losses, nnx.State]:
        if accumulate == 1:
            grads, (losses, batch_stats) = gradient(state.params, state.batch_stats, images, labels, state.step)
            return grads, losses, batch_stats
        # Neighbours go to different parts, so that every device has its share of each.
        pattern = "(b parts) ... -> parts b ..."
        parts = rearrange(images, pattern, parts=accumulate), rearrange(labels, pattern, parts=accumulate)

        def add_part(carry: tuple[Any, nnx.State], part: tuple[Array, Array]) -> tuple[tuple[Any, nnx.State], None]:
            sums, batch_stats = carry
            grads, (losses, batch_stats) = gradient(state.params, batch_stats, *part, state.step)
            return (jax.tree.map(jnp.add, sums, (grads, losses)), batch_stats), None

        shapes = jax.eval_shape(gradient, state.params, state.batch_stats, parts[0][0], parts[1][0], state.step)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes[0], shapes[1][0]))
        (sums, batch_stats), _ = jax.lax.scan(add_part, (zeros, state.batch_stats), parts)
        grads, losses = jax.tree.map(lambda leaf: leaf / accumulate, sums)
        return grads, losses, batch_stats

    def train_step(state: TrainState, images: Array, labels: Array) -> tuple[TrainState, StepMetrics]:
        grads, losses, batch_stats = gradient_of_batch(state, images, labels)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if average:
            decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
            average = optax.incremental_update(params, average, 1 - decay)
        metrics = StepMetrics(*losses, gradient_norm=optax.tree.norm(grads))
        return TrainState(params, average, batch_stats, opt_state, state.step + 1), metrics

    return train_step


def make_train_chunk(
    train_step: Callable[..., tuple[TrainState, StepMetrics]],
    *,
    augmentation: Augmentation,
    sharding: NamedSharding | None = None,
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """A function that runs a training step for each row of indices, without coming back to the host.

    Args:
        train_step: what `make_train_step` gave.
        augmentation: random changes of the images, drawn anew in each step.
        sharding: how a batch is spread over devices; None to leave it to the compiler.

    Returns:
        A function `(state, images, labels, indices, key) -> (state, metrics of each step)`, to be compiled with a
        donated state. The indices `[steps b]` are those of the images of each step; without them, images and labels
        have these two axes themselves. The randomness of a step depends on the key and the number of the step alone.
    """

    def train_chunk(
        state: TrainState,
        images: Shaped[Array, "*images height width channels"],
        labels: Int[Array, "..."],
        indices: Int[Array, "steps b"] | None,
        key: PRNGKeyArray,
    ) -> tuple[TrainState, StepMetrics]:
        def body(state: TrainState, batch: Any) -> tuple[TrainState, StepMetrics]:
            originals, of_batch = batch if indices is None else (images[batch], labels[batch])
            if sharding is not None:
                originals, of_batch = jax.lax.with_sharding_constraint((originals, of_batch), sharding)
            step_key = jax.random.fold_in(key, state.step)
            return train_step(state, augmentation(step_key, to_unit_range(originals)), of_batch)

        return jax.lax.scan(body, state, (images, labels) if indices is None else indices)

    return train_chunk
