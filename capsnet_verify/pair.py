"""A JAX model and its twin on shared weights and a shared batch."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import torch
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

import capsnet_jax
import capsnet_torch
from capsnet_jax.config import ModelConfig, TrainingConfig
from capsnet_jax.errors import UsageError, in_words
from capsnet_jax.interchange.weights import from_torch, to_torch, weight_table
from capsnet_jax.routing import get_routing
from capsnet_torch.routing import ROUTINGS


class Pair(NamedTuple):
    """Two models of the same weights, the same batch for each of them, and what they are to minimise.

    Attributes:
        jax_model: of `dtype`; in bfloat16 its weights are float32, and the operands of its products bfloat16.
        torch_model: the twin; in float32 if `dtype` is bfloat16.
        images: in [0, 1].
        labels: class indices, one or several for each image.
        dtype: float64, float32 or bfloat16.
        loss: options of `compute_losses` of both sides.
    """

    jax_model: capsnet_jax.CapsNet
    torch_model: capsnet_torch.CapsNet
    images: Float[Array, "b height width channels"]
    labels: Int[Array, "b *classes"]
    dtype: str
    loss: Mapping[str, Any]

    @property
    def torch_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Images, channels first, and labels."""
        return to_channels_first(self.images), torch.tensor(np.asarray(self.labels)).long()


def new_pair(
    dtype: str,
    model: ModelConfig,
    training: TrainingConfig,
    *,
    labels_per_image: int = 1,
    batch_size: int = 3,
    seed: int = 1,
    state: Mapping[str, Shaped[np.ndarray, "..."]] | None = None,
    torch_state: Mapping[str, Shaped[np.ndarray, "..."]] | None = None,
    torch_routing: str | Callable[..., Any] | None = None,
) -> Pair:
    """Both sides of a model, in training mode, and a batch of random images and labels.

    Args:
        dtype: float64, which needs `jax.enable_x64`, float32 or bfloat16.
        model: its sizes.
        training: what of it decides the loss.
        labels_per_image: number of classes that an image shows.
        batch_size: number of images.
        seed: of the weights and the batch.
        state: weights, under the twin's names; by default they are drawn as PyTorch does.
        torch_state: those of the twin, if they are to be others.
        torch_routing: that of the twin, if it is another; a name in its registry or a function.

    Raises:
        UsageError: sizes do not fit, weights are not those of the model, or the sides have not the same weights.
    """
    image_shape, num_classes = model.image_shape, model.num_classes
    param_dtype = "float64" if dtype == "float64" else "float32"
    # Without drawing its weights, for which JAX would compile a program for each shape.
    jax_model = nnx.eval_shape(
        lambda: capsnet_jax.CapsNet.from_config(model, param_dtype=param_dtype, rngs=nnx.Rngs(seed))
    )
    options = dict(vars(model))
    if torch_routing is not None:
        options["routing"] = torch_routing
    elif get_routing(model.routing).name not in ROUTINGS:
        raise UsageError(f"Routing {model.routing} has no twin in PyTorch; expected --jax-routing and --torch-routing.")
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch_model = capsnet_torch.CapsNet.from_config(options)
    torch_model = torch_model.to(getattr(torch, param_dtype))
    if torch_routing is not None:
        _try(torch_model, rng.random((2, *image_shape)).astype(param_dtype))
    # A copy, as JAX may read an array of NumPy long after it was given. Running counts of batches are read by nothing.
    drawn = {
        name: np.array(tensor.numpy(force=True))
        for name, tensor in torch_model.state_dict().items()
        if "num_batches" not in name
    }
    _check_same_names([row.name for row in weight_table(jax_model)], drawn)
    if state is None:
        state = {name: _shaken(name, array, rng) for name, array in drawn.items()}
    if torch_state is not None:
        try:
            from_torch(nnx.clone(jax_model), torch_state)  # refuses what is not of this model
        except UsageError as error:
            raise UsageError(f"Of the PyTorch side: {error}") from error
    from_torch(jax_model, state)
    weights = to_torch(jax_model) if torch_state is None else torch_state
    torch_model.load_state_dict({name: torch.tensor(array) for name, array in weights.items()}, strict=False)
    jax_model.train()
    torch_model.train()
    return Pair(
        jax_model,
        torch_model,
        *_draw_batch(rng, (batch_size, *image_shape), param_dtype, num_classes, labels_per_image),
        dtype,
        {
            "reconstruction_weight": training.reconstruction_weight if model.decoder_hidden else 0.0,
            "reconstruction_error": training.reconstruction_error,
            "loss": training.loss,
        },
    )


def with_batch(pair: Pair, size: int, *, seed: int) -> Pair:
    """The same models with a batch of another size, of random images and labels; with their own if it has that size."""
    if size == len(pair.images):
        return pair
    num_classes, labels_per_image = pair.jax_model.config.num_classes, pair.labels[0].size
    shape, rng = (size, *pair.images.shape[1:]), np.random.default_rng((seed, size))
    images, labels = _draw_batch(rng, shape, pair.images.dtype, num_classes, labels_per_image)
    return pair._replace(images=images, labels=labels)


def to_channels_first(images: Any) -> torch.Tensor:
    """Images of JAX as the twin takes them."""
    return torch.tensor(rearrange(np.asarray(images), "b h w c -> b c h w").copy())


def _draw_batch(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: DTypeLike, num_classes: int, labels_per_image: int
) -> tuple[Float[Array, "b height width channels"], Int[Array, "b *classes"]]:
    images = jnp.asarray(rng.random(shape), dtype)
    labels = np.stack([rng.permutation(num_classes)[:labels_per_image] for _ in images])
    return images, jnp.asarray(labels if labels_per_image > 1 else labels[:, 0], "int32")


def _shaken(name: str, array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A weight with noise, if it starts from a constant, often zero, which would hide what is wrong with it."""
    if ".routing_weights." in name:
        return array + 0.5 * rng.normal(size=array.shape).astype(array.dtype)
    if np.ndim(array) and np.ptp(array) == 0:  # of batch normalisation
        return array + rng.uniform(-0.3, 0.3, array.shape).astype(array.dtype)
    return array


def _try(model: capsnet_torch.CapsNet, images: Float[np.ndarray, "b height width channels"]) -> None:
    """A dry run forward and backward, as the routing may be the user's own and raise anything."""
    try:
        capsules = model.encode(to_channels_first(images))
        (capsules.poses.sum() + capsules.activations.sum()).backward()
    except Exception as error:
        raise UsageError(f"The routing of the PyTorch side raises {in_words(error)}.") from error
    model.zero_grad()


def _check_same_names(ours: Collection[str], theirs: Collection[str]) -> None:
    missing, unknown = sorted(set(theirs) - set(ours)), sorted(set(ours) - set(theirs))
    if missing or unknown:
        raise UsageError(
            f"The sides have not the same weights: PyTorch has {', '.join(missing) or 'none'} beyond those of JAX, "
            f"JAX {', '.join(unknown) or 'none'} beyond those of PyTorch."
        )
