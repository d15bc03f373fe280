"""One training step: loss, gradient, update."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from capsnet_jax.config import TrainingConfig
from capsnet_jax.errors import UsageError
from capsnet_jax.nn.losses import margin_loss, reconstruction_loss, spread_loss, spread_margin
from capsnet_jax.nn.model import CapsNet
from capsnet_jax.nn.precision import for_products
from capsnet_jax.ops import answers_right
from capsnet_jax.train.freezing import freeze_layers, is_frozen


class TrainState(NamedTuple):
    """Everything that a training step updates.

    Attributes:
        params: weights that are trained.
        average: exponential moving average of these weights; empty if none is kept.
        frozen: weights, running means and variances of frozen layers.
        batch_stats: running means and variances of batch normalization in all other layers.
        opt_state: state of the optimizer.
        step: number of training steps done.
    """

    params: nnx.State
    average: nnx.State
    frozen: nnx.State
    batch_stats: nnx.State
    opt_state: optax.OptState
    step: Int[Array, "*seeds"]

    @property
    def weights(self) -> nnx.State:
        """Weights to evaluate and save, the moving average if there is one, and all batch statistics."""
        return nnx.merge_state(self.average or self.params, self.frozen, self.batch_stats)


class StepMetrics(NamedTuple):
    """Loss, accuracy and gradient norm of one step, each a mean over the batch, before the update.

    Attributes:
        total: the loss that is minimized.
        margin: the margin or spread loss in it.
        reconstruction: the reconstruction loss in it, before it is weighted.
        accuracy: fraction of images that are classified correctly.
        gradient_norm: global norm of the gradient before clipping; None if only losses are computed.
    """

    total: Float[Array, "..."]
    margin: Float[Array, "..."]
    reconstruction: Float[Array, "..."]
    accuracy: Float[Array, "..."]
    gradient_norm: Float[Array, "..."] | None = None


@jax.named_scope("losses")
def compute_losses(
    model: CapsNet,
    images: Float[Array, "b height width channels"],
    labels: Int[Array, "b *classes"],
    *,
    reconstruction_weight: float,
    reconstruction_error: str = "mean",
    loss: str = "margin",
    step: Int[Array, ""] | int = 0,
) -> StepMetrics:
    """Compute the losses and the accuracy of a batch.

    Args:
        model: the model, in training mode if batch normalization should use this batch.
        images: pixels in [0, 1].
        labels: class indices, one or several for each image.
        reconstruction_weight: weight of the reconstruction loss; 0 skips the decoder.
        reconstruction_error: "mean" over the pixels, or their "sum".
        loss: "margin" or "spread".
        step: number of training steps done, on which the margin of the spread loss depends.

    Raises:
        UsageError: the loss is unknown or does not allow several labels, or the model has no decoder.
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
        return StepMetrics(margin, margin, jnp.zeros_like(margin), accuracy)
    reconstructions = model.decode(capsules.poses, labels)
    reconstruction = reconstruction_loss(reconstructions, images, error=reconstruction_error).mean()
    return StepMetrics(margin + reconstruction_weight * reconstruction, margin, reconstruction, accuracy)


def create_state(
    model: CapsNet, optimizer: optax.GradientTransformation, *, average: bool = False, freeze: Sequence[str] = ()
) -> tuple[nnx.GraphDef, TrainState]:
    """Split a model into its static graph definition and the initial training state.

    Args:
        model: initial weights; they are copied, because training donates its state.
        optimizer: the optimizer, as for `make_train_step`.
        average: whether to keep a moving average of the weights.
        freeze: layers that are not trained, as in `TrainingConfig`.

    Raises:
        UsageError: there is no such layer to freeze, or no weight is left to train.
    """
    model = nnx.clone(model)
    model.train()
    freeze_layers(model, freeze)
    kinds = (nnx.All((nnx.Param, nnx.BatchStat), is_frozen(freeze)), nnx.Param, nnx.BatchStat)
    frozen, params, batch_stats = jax.tree.map(jnp.copy, nnx.state(model, *kinds))
    means = jax.tree.map(jnp.copy, params) if average else nnx.State({})
    state = TrainState(params, means, frozen, batch_stats, optimizer.init(params), jnp.zeros((), jnp.int32))
    return nnx.graphdef(model), state


def make_train_step(
    graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, config: TrainingConfig
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    r"""Make a pure function `(state, images, labels) -> (state, metrics)`, to be compiled with `jax.jit`.

    Args:
        graphdef: static definition of the model, from `create_state`.
        optimizer: the optimizer.
        config: its fields for the losses, `precision`, `accumulate` (see `in_micro_batches`), `ema_decay` and `freeze`
            are used.

    The decay $\beta$ of the moving average $m \leftarrow \beta m + (1 - \beta) w$ is at most $(1 + t) / (10 + t)$ in
    step $t$, so that the initial weights are soon forgotten.
    """

    updated_stats = nnx.All(nnx.BatchStat, nnx.Not(is_frozen(config.freeze)))

    def loss(
        params: nnx.State, frozen: nnx.State, batch_stats: nnx.State, images: Array, labels: Array, step: Array
    ) -> tuple[Array, tuple[StepMetrics, nnx.State]]:
        if config.precision == "bfloat16":
            params, frozen = (for_products(weights, jnp.bfloat16) for weights in (params, frozen))
        model = nnx.merge(graphdef, params, frozen, batch_stats, copy=True)
        metrics = compute_losses(
            model,
            images,
            labels,
            reconstruction_weight=config.reconstruction_weight,
            reconstruction_error=config.reconstruction_error,
            loss=config.loss,
            step=step,
        )
        return metrics.total, (metrics, nnx.state(model, updated_stats))

    gradient = jax.grad(loss, has_aux=True)
    if config.accumulate > 1:
        # Compiled, so that its two calls there trace it once.
        gradient = in_micro_batches(jax.jit(gradient, inline=True), config.accumulate)
    gradient = without_axis_of_one(gradient)

    def train_step(state: TrainState, images: Array, labels: Array) -> tuple[TrainState, StepMetrics]:
        fixed = state.frozen, state.batch_stats
        grads, (metrics, batch_stats) = gradient(state.params, *fixed, images, labels, state.step)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            average = state.average
            if average:
                decay = jnp.minimum(config.ema_decay, (1 + state.step) / (10 + state.step))
                average = optax.incremental_update(params, average, 1 - decay)
            metrics = metrics._replace(gradient_norm=optax.tree.norm(grads))
        return TrainState(params, average, state.frozen, batch_stats, opt_state, state.step + 1), metrics

    return train_step


def in_micro_batches(gradient: Callable[..., Any], number: int) -> Callable[..., Any]:
    """Make a gradient function process its batch in micro-batches, one after the other, to save memory.

    With batch normalization, which normalizes each micro-batch by itself, the result is not the gradient of the whole
    batch.

    Args:
        gradient: a function `(params, frozen, batch_stats, images, labels, step)` that returns
            `(gradient, (metrics, batch_stats))`.
        number: number of micro-batches, which divides the batch size.

    Returns:
        A function of the same arguments that returns mean gradient and metrics, and the last batch statistics.
    """

    def mean_gradient(
        params: nnx.State, frozen: nnx.State, batch_stats: nnx.State, images: Array, labels: Array, step: Array
    ) -> Any:
        # Every `number`-th image, so that each device has its share of every micro-batch.
        parts = [rearrange(array, "(b parts) ... -> parts b ...", parts=number) for array in (images, labels)]

        def add_part(carry: tuple[Any, nnx.State], part: list[Array]) -> tuple[tuple[Any, nnx.State], None]:
            sums, batch_stats = carry
            grads, (metrics, batch_stats) = gradient(params, frozen, batch_stats, *part, step)
            return (jax.tree.map(jnp.add, sums, (grads, metrics)), batch_stats), None

        grads, (metrics, _) = jax.eval_shape(gradient, params, frozen, batch_stats, *(part[0] for part in parts), step)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (grads, metrics))
        (sums, batch_stats), _ = jax.lax.scan(add_part, (zeros, batch_stats), parts)
        grads, metrics = jax.tree.map(lambda leaf: leaf / number, sums)
        return grads, (metrics, batch_stats)

    return mean_gradient


def without_axis_of_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make `jax.vmap` over an axis of size 1 call the function without that axis.

    Training states have an axis of seeds even for one seed. On CPU, XLA computes a batch of one matrix product more
    slowly than the plain product.
    """
    mapped = jax.custom_batching.custom_vmap(function)

    @mapped.def_vmap
    def call(size: int, is_mapped: list[Any], *arguments: Any) -> tuple[Any, Any]:
        if size > 1:
            results = jax.vmap(function, in_axes=jax.tree.map(lambda flag: 0 if flag else None, is_mapped))(*arguments)
        else:
            single = jax.tree.map(lambda flag, leaf: leaf[0] if flag else leaf, is_mapped, list(arguments))
            results = jax.tree.map(lambda leaf: leaf[None], function(*single))
        return results, jax.tree.map(lambda _: True, results)

    return mapped
