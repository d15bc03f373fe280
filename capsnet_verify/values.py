"""Compute all values to compare, from the images to the gradients, in the order in which they depend on each other."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from einops import rearrange
from flax import nnx

from capsnet_jax.interchange.weights import to_torch
from capsnet_jax.nn.model import CapsNet
from capsnet_jax.nn.precision import for_products
from capsnet_jax.ops import mask_by_label
from capsnet_jax.train.step import compute_losses
from capsnet_torch import step as torch_step
from capsnet_torch.ops import mask_by_label as torch_mask_by_label
from capsnet_verify.pair import Pair
from capsnet_verify.replay import KINDS, feed

QUICKLY_COMPILED = {"xla_backend_optimization_level": 0}
"""Compiler options that halve the time to compile; the program before code generation is the same."""
AT_REST = "poses with running means"  # in evaluation mode
CHANNELS_LAST = "b channels height width -> b height width channels"


def in_jax(pair: Pair, given: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """Compute every intermediate, loss and gradient in JAX; float32 in place of bfloat16.

    Args:
        pair: the model and the batch.
        given: values to feed to the layers above them, in place of the model's own; see `feed`.
    """
    graphdef = nnx.graphdef(pair.jax_model)
    params, batch_stats = (nnx.state(pair.jax_model, kind) for kind in (nnx.Param, nnx.BatchStat))

    def new_model(params: nnx.State) -> CapsNet:
        weights = for_products(params, jnp.bfloat16) if pair.dtype == "bfloat16" else params
        return nnx.merge(graphdef, weights, batch_stats, copy=True)

    def compute(
        params: nnx.State, images: jax.Array, labels: jax.Array, given: Mapping[str, jax.Array]
    ) -> tuple[dict[str, Any], nnx.State]:
        model = new_model(params)
        alone = feed(model, given) if given else {}
        features = model.stem.features(images)
        values = {f"stem {number}": array for number, array in enumerate(features)}
        values |= _of_capsules(model.primary_capsules(features[-1]), model.capsule_layers)
        # By the model's own method, in case it composes the layers differently from the code above.
        capsules = model.encode(images)
        values |= {"encoded poses": capsules.poses, "encoded activations": capsules.activations}
        if model.stem.norms:
            at_rest = new_model(params)
            at_rest.eval()
            values[AT_REST] = at_rest.encode(images).poses
        if model.decoder is not None:
            hidden = model.decoder.hidden_features(mask_by_label(capsules.poses, labels))
            values |= {f"decoder {number}": array for number, array in enumerate(hidden)}
            values["reconstructions"] = model.decode(capsules.poses, labels)

        def loss(params: nnx.State) -> tuple[jax.Array, Any]:
            model = new_model(params)
            if given:
                feed(model, given)
            losses = compute_losses(model, images, labels, **pair.loss)
            return losses.total, losses

        gradients, losses = jax.grad(loss, has_aux=True)(params)
        for kind in KINDS if given else ():  # if the last layer was given as outputs of the model only
            last = f"{kind} {len(model.capsule_layers) - 1}"
            alone |= {} if last in given else {f"encoded {kind}": alone[last]}
        return values | _of_losses(pair, losses) | alone, gradients

    compiled = jax.jit(compute, compiler_options=QUICKLY_COMPILED)
    values, gradients = compiled(params, pair.images, pair.labels, given or {})
    for name, gradient in to_torch(nnx.merge(graphdef, gradients, batch_stats)).items():
        if "running" not in name:
            values[f"gradient {name}"] = gradient
    dtype = "float32" if pair.dtype == "bfloat16" else None
    return {name: np.asarray(array, dtype) for name, array in values.items()}


def in_torch(pair: Pair) -> dict[str, np.ndarray]:
    """Compute the same arrays in PyTorch; the model is not changed, nor are its running means."""
    model, (images, labels) = copy.deepcopy(pair.torch_model), pair.torch_batch
    at_rest = model.eval().encode(images)  # before training mode changes the running means
    model.train()
    values = {
        f"stem {number}": rearrange(tensor, CHANNELS_LAST)
        for number, tensor in enumerate(model.encoder.features(images))
    }
    encoder = model.encoder
    values |= _of_capsules(encoder.primary_capsules(images), [*encoder.hidden_capsules, encoder.primary2digit_capsules])
    capsules = model.encode(images)
    values |= {"encoded poses": capsules.poses, "encoded activations": capsules.activations}
    if any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()):
        values[AT_REST] = at_rest.poses
    if model.decoder is not None:
        masked = torch_mask_by_label(capsules.poses, labels)
        values |= {f"decoder {number}": model.decoder[: 2 * number + 2](masked) for number in (0, 1)}
        values["reconstructions"] = rearrange(model.decode(capsules.poses, labels), CHANNELS_LAST)
    losses = torch_step.compute_losses(model, images, labels, **pair.loss)
    values |= _of_losses(pair, losses)
    losses.total.backward()
    # From the output back to the input. Without a reconstruction in the loss, the decoder has no gradient.
    for name, param in reversed(list(model.named_parameters())):
        if pair.loss["reconstruction_weight"] or not name.startswith("decoder."):
            values[f"gradient {name}"] = torch.zeros_like(param) if param.grad is None else param.grad
    return {name: tensor.numpy(force=True) for name, tensor in values.items()}


def jittered(pair: Pair, seed: int) -> Pair:
    """Change weights and images of the JAX side by a random rounding error each."""
    rng = np.random.default_rng(seed)

    def jitter(array: jax.Array) -> jax.Array:
        return array * (1 + jnp.finfo(array.dtype).eps * jnp.asarray(rng.choice([-1, 1], array.shape), array.dtype))

    model = nnx.clone(pair.jax_model)
    nnx.update(model, jax.tree.map(jitter, nnx.state(model, nnx.Param)))
    return pair._replace(jax_model=model, images=jitter(pair.images))


def _of_capsules(capsules: Any, layers: Iterable[Any]) -> dict[str, Any]:
    """Compute votes, couplings and capsules of every layer from the primary capsules on, in JAX or PyTorch."""
    values = {"primary poses": capsules.poses, "primary activations": capsules.activations}
    for number, layer in enumerate(layers):
        seen = layer.under_kernel(capsules.poses) if hasattr(layer, "under_kernel") else capsules.poses
        # Before routing, which may be inside of `jax.checkpoint`: `feed` keeps the first votes.
        values[f"votes {number}"] = layer.votes(seen)
        routed = layer.route(capsules)
        capsules = layer.capsules_of(routed)
        values[f"couplings {number}"] = routed.couplings
        values |= {f"poses {number}": capsules.poses, f"activations {number}": capsules.activations}
    return values


def _of_losses(pair: Pair, losses: Any) -> dict[str, Any]:
    names = ("margin", "reconstruction", "total") if pair.loss["reconstruction_weight"] else ("total",)
    return {f"{name} loss": getattr(losses, name) for name in names}
