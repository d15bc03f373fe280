"""A JAX model and its twin on shared weights, and everything they compute in order, ready to be compared."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from einops import rearrange
from flax import nnx

import capsnet_jax
import capsnet_torch
from capsnet_jax.layers import CapsuleLayer
from capsnet_jax.training import compute_losses
from capsnet_jax.weights import to_torch
from capsnet_torch import layers as torch_layers
from capsnet_torch import training as torch_training

# All sizes differ, so that no transposed axis fits by chance; a primary scale of 1 gives capsules of visible length.
BATCH = 3
IMAGE_SHAPE = (22, 24, 2)
NUM_CLASSES = 5
HOT = {
    "stem_channels": 7,
    "stem_kernel": 3,
    "primary_groups": 3,
    "primary_dim": 4,
    "primary_kernel": 5,
    "primary_scale": 1.0,
    "class_dim": 6,
    "decoder_hidden": (11, 13),
}
RECONSTRUCTION_WEIGHT = 10.0


class Pair(NamedTuple):
    """Two models of the same weights, and the same batch for each of them."""

    jax_model: capsnet_jax.CapsNet
    torch_model: capsnet_torch.CapsNet
    images: jax.Array
    labels: jax.Array

    @property
    def torch_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        return to_channels_first(self.images), torch.tensor(np.asarray(self.labels)).long()


def make_pair(
    dtype: str,
    *,
    image_shape: tuple[int, int, int] = IMAGE_SHAPE,
    num_classes: int = NUM_CLASSES,
    batch: int = BATCH,
    num_labels: int = 1,
    **options: Any,
) -> Pair:
    """A pair with seeded weights and images; float64 needs `jax.enable_x64`."""
    options = HOT | options
    initial_weights = options.pop("initial_weights", "torch")
    jax_model = capsnet_jax.CapsNet(
        image_shape, num_classes, **options, initial_weights=initial_weights, param_dtype=dtype, rngs=nnx.Rngs(1)
    )
    # What a routing learns starts from a constant, often zero, which would hide what is wrong with it.
    weights_rng = np.random.default_rng(3)
    for layer in jax_model.encoder.capsule_layers:
        for weight in layer.routing_weights.values():
            weight[...] += jnp.asarray(0.5 * weights_rng.normal(size=weight.shape), dtype)
    torch_model = capsnet_torch.CapsNet(image_shape, num_classes, **options).to(getattr(torch, dtype))
    torch_model.load_state_dict({name: torch.from_numpy(array) for name, array in to_torch(jax_model).items()})
    rng = np.random.default_rng(2)
    images = jnp.asarray(rng.random((batch, *image_shape)), dtype)
    labels = rng.integers(0, num_classes, batch)
    if num_labels > 1:
        labels = np.stack([rng.permutation(num_classes)[:num_labels] for _ in range(batch)])
    return Pair(jax_model, torch_model, images, jnp.asarray(labels, "int32"))


def divergences(pair: Pair) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, JAX value and PyTorch value of everything from image to gradients, in the order it is computed."""
    pair.jax_model.train()
    pair.torch_model.train()
    graphdef, params, batch_stats = nnx.split(pair.jax_model, nnx.Param, ...)
    ours = jax.jit(lambda *args: _jax_values(graphdef, *args))(params, batch_stats, pair.images, pair.labels)
    grads = to_torch(nnx.merge(graphdef, ours.pop("gradients"), batch_stats))
    grads = {name: grad for name, grad in grads.items() if "running" not in name}
    theirs, torch_grads = _torch_values(pair.torch_model, *pair.torch_batch)
    assert set(ours) == set(theirs)
    assert set(grads) == set(torch_grads)
    for name in theirs:  # under jit, JAX sorts the keys of a dict
        yield name, np.asarray(ours[name]), theirs[name].numpy(force=True)
    for name in reversed(grads):  # from the output back to the input
        yield f"gradient {name}", grads[name], torch_grads[name].numpy(force=True)


def to_channels_first(images: Any) -> torch.Tensor:
    return torch.tensor(rearrange(np.asarray(images), "b h w c -> b c h w").copy())


def _jax_values(
    graphdef: nnx.GraphDef, params: nnx.State, batch_stats: nnx.State, images: jax.Array, labels: jax.Array
) -> dict[str, Any]:
    model = nnx.merge(graphdef, params, batch_stats, copy=True)
    values = {"stem": model.encoder.stem(images)}
    capsules = model.encoder.primary_capsules(values["stem"])
    values |= {"primary poses": capsules.poses, "primary activations": capsules.activations}
    for number, layer in enumerate(model.encoder.capsule_layers):
        routed = layer.route(capsules)
        seen = capsules.poses if isinstance(layer, CapsuleLayer) else layer.under_kernel(capsules.poses)
        values |= {f"votes {number}": layer.votes(seen), f"couplings {number}": routed.couplings}
        capsules = layer(capsules)
        values |= {f"poses {number}": capsules.poses, f"activations {number}": capsules.activations}
    # The model's own composition, in case the one above is not its own.
    capsules = model.encode(images)
    values |= {"encoded poses": capsules.poses, "encoded activations": capsules.activations}
    values["reconstructions"] = model.decode(capsules.poses, labels)

    def loss(params: nnx.State) -> tuple[jax.Array, Any]:
        model = nnx.merge(graphdef, params, batch_stats, copy=True)
        losses = compute_losses(model, images, labels, reconstruction_weight=RECONSTRUCTION_WEIGHT)
        return losses.total, losses

    values["gradients"], losses = jax.grad(loss, has_aux=True)(params)
    return values | {f"{name} loss": getattr(losses, name) for name in ("margin", "reconstruction", "total")}


def _torch_values(
    model: capsnet_torch.CapsNet, images: torch.Tensor, labels: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    channels_last = "b channels height width -> b height width channels"
    values = {"stem": rearrange(model.encoder.stem(images), channels_last)}
    capsules = model.encoder.primary_capsules(images)
    values |= {"primary poses": capsules.poses, "primary activations": capsules.activations}
    layers = [*model.encoder.hidden_capsules, model.encoder.primary2digit_capsules]
    for number, layer in enumerate(layers):
        routed = layer.route(capsules)
        seen = capsules.poses if isinstance(layer, torch_layers.CapsuleLayer) else layer.under_kernel(capsules.poses)
        values |= {f"votes {number}": layer.votes(seen), f"couplings {number}": routed.couplings}
        capsules = layer(capsules)
        values |= {f"poses {number}": capsules.poses, f"activations {number}": capsules.activations}
    capsules = model.encode(images)
    values |= {"encoded poses": capsules.poses, "encoded activations": capsules.activations}
    values["reconstructions"] = rearrange(model.decode(capsules.poses, labels), channels_last)
    losses = torch_training.compute_losses(model, images, labels, reconstruction_weight=RECONSTRUCTION_WEIGHT)
    values |= {f"{name} loss": getattr(losses, name) for name in ("margin", "reconstruction", "total")}
    model.zero_grad()
    losses.total.backward()
    return values, {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
