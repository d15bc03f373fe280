"""A JAX model and the same model in PyTorch, with the same weights and the same batch."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

import capsnet_jax
import capsnet_torch
from capsnet_jax.errors import UsageError, in_words
from capsnet_jax.interchange.weights import from_torch, to_torch, weight_table
from capsnet_jax.routing import get_routing
from capsnet_torch.routing import ROUTINGS
from capsnet_verify.subjects import Settings, Subject

FEWEST_IMAGES = 3  # with fewer, mixing up two examples is hard to distinguish from averaging them


class Pair(NamedTuple):
    """Two models with the same weights, a batch, and the loss that they minimize.

    Attributes:
        jax_model: the JAX model, of `dtype`; for bfloat16 its weights are float32, and operands of products bfloat16.
        torch_model: the model of `capsnet_torch`; in float32 if `dtype` is bfloat16.
        images: images with pixels in [0, 1].
        labels: class indices, one or several for each image.
        dtype: float64, float32 or bfloat16.
        loss: options of `compute_losses` in both packages.
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


@contextmanager
def both_on(device: str, dtype: str) -> Iterator[None]:
    """Make both frameworks compute on a device, "cpu" or "gpu", in this dtype and without TF32.

    Raises:
        UsageError: there is no GPU that both can use.
    """
    if device == "gpu" and not (jax.default_backend() == "gpu" and torch.cuda.is_available()):
        raise UsageError("There is no GPU that both JAX and PyTorch can use; expected --device cpu.")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with (
        torch.device("cuda" if device == "gpu" else "cpu"),
        jax.default_device(jax.devices(device)[0]),
        jax.default_matmul_precision("highest"),
        jax.enable_x64(dtype == "float64"),
    ):
        yield


def new_pair(subject: Subject, settings: Settings) -> Pair:
    """Create a model in JAX and in PyTorch, in training mode, and a batch of random images and labels.

    Args:
        subject: the model; if it has no weights, random ones are drawn from PyTorch's distributions.
        settings: how to compare; a dtype of float64 needs `jax.enable_x64`.

    Raises:
        UsageError: sizes do not fit, weights belong to another model, or the two models have different weights.
    """
    config, training = subject.run.config.model, subject.run.config.training
    dtype = "float64" if settings.dtype == "float64" else "float32"
    rng = np.random.default_rng(settings.seed)
    # First, as it explains sizes that do not fit; and abstract, as JAX would compile a program for each shape to draw.
    jax_model = nnx.eval_shape(lambda: capsnet_jax.CapsNet.from_config(config, param_dtype=dtype, rngs=nnx.Rngs(0)))
    torch_model = _new_twin(subject, settings, dtype, rng)
    # Copies, because JAX may read a NumPy array later. Counts of batches are not used.
    drawn = {
        name: np.array(tensor.numpy(force=True))
        for name, tensor in torch_model.state_dict().items()
        if "num_batches" not in name
    }
    _check_same_names([row.name for row in weight_table(jax_model)], drawn)
    state = subject.state or {name: add_noise(name, array, rng) for name, array in drawn.items()}
    if settings.torch_state is not None:
        try:
            from_torch(nnx.clone(jax_model), settings.torch_state)  # refuses weights of another model
        except UsageError as error:
            raise UsageError(f"In the PyTorch model: {error}") from error
    from_torch(jax_model, state)
    weights = to_torch(jax_model) if settings.torch_state is None else settings.torch_state
    torch_model.load_state_dict({name: torch.tensor(array) for name, array in weights.items()}, strict=False)
    jax_model.train()
    torch_model.train()
    loss = {
        "reconstruction_weight": training.reconstruction_weight if config.decoder_hidden else 0.0,
        "reconstruction_error": training.reconstruction_error,
        "loss": training.loss,
    }
    size = settings.batch_size or FEWEST_IMAGES
    batch = _draw_batch(rng, size, jax_model, subject.run.labels_per_image, dtype)
    return Pair(jax_model, torch_model, *batch, settings.dtype, loss)


def with_batch(pair: Pair, size: int, *, seed: int) -> Pair:
    """Return the models with a random batch of this size, or with their own batch if it has this size."""
    if size == len(pair.images):
        return pair
    rng, labels_per_image = np.random.default_rng((seed, size)), pair.labels[0].size
    images, labels = _draw_batch(rng, size, pair.jax_model, labels_per_image, pair.images.dtype)
    return pair._replace(images=images, labels=labels)


def to_channels_first(images: Any) -> torch.Tensor:
    """Convert images of JAX to a tensor with channels first."""
    return torch.tensor(rearrange(np.asarray(images), "b h w c -> b c h w").copy())


def _draw_batch(
    rng: np.random.Generator, size: int, model: capsnet_jax.CapsNet, labels_per_image: int, dtype: DTypeLike
) -> tuple[Float[Array, "b height width channels"], Int[Array, "b *classes"]]:
    images = jnp.asarray(rng.random((size, *model.config.image_shape)), dtype)
    labels = np.stack([rng.permutation(model.config.num_classes)[:labels_per_image] for _ in range(size)])
    return images, jnp.asarray(labels if labels_per_image > 1 else labels[:, 0], "int32")


def _new_twin(subject: Subject, settings: Settings, dtype: str, rng: np.random.Generator) -> capsnet_torch.CapsNet:
    config, options = subject.run.config.model, dict(vars(subject.run.config.model))
    if settings.torch_routing is not None:
        options["routing"] = settings.torch_routing
    elif get_routing(config.routing).name not in ROUTINGS:
        raise UsageError(f"Routing {config.routing} has no twin in PyTorch; expected --torch-routing, too.")
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = capsnet_torch.CapsNet.from_config(options)
    model = model.to(getattr(torch, dtype))
    if settings.torch_routing is not None:  # a function of the user may raise anything, forward or backward
        images = rng.random((2, *config.image_shape)).astype(dtype)
        try:
            capsules = model.encode(to_channels_first(images))
            (capsules.poses.sum() + capsules.activations.sum()).backward()
        except (Exception, SystemExit) as error:
            raise UsageError(f"The routing of the PyTorch model raises {in_words(error)}.") from error
        model.zero_grad()
    return model


def add_noise(name: str, array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add noise to a weight that is constant, often zero, which would hide mistakes."""
    if ".routing_weights." in name:
        return array + 0.5 * rng.normal(size=array.shape).astype(array.dtype)
    if np.ndim(array) and np.ptp(array) == 0:  # of batch normalization
        return array + rng.uniform(-0.3, 0.3, array.shape).astype(array.dtype)
    return array


def _check_same_names(in_jax: Collection[str], in_torch: Collection[str]) -> None:
    missing, unknown = sorted(set(in_torch) - set(in_jax)), sorted(set(in_jax) - set(in_torch))
    if missing or unknown:
        raise UsageError(
            f"The two models have different weights: PyTorch has {', '.join(missing) or 'none'} beyond those of JAX, "
            f"JAX {', '.join(unknown) or 'none'} beyond those of PyTorch."
        )
