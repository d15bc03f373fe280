"""Feed every layer of a JAX model with another model's values of the layers below, to see which layers differ alone."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from capsnet_jax.capsules import Capsules
from capsnet_jax.nn.model import CapsNet
from capsnet_jax.ops import capsule_norm

KINDS = ("poses", "activations")
A_NORM = 1e-4  # largest distance of activations from the norms of poses, if that is what they are


@jax.custom_jvp
def _replaced(own: jax.Array, given: jax.Array) -> jax.Array:
    """Return the given value, with the derivative of the own one."""
    return given


_replaced.defjvp(lambda primals, tangents: (primals[1], tangents[0]))


def feed(model: CapsNet, given: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Replace the result of each layer by the given one, wherever another layer takes it.

    Derivatives are those of the model at the given values. Where only poses are given, and activations are norms, the
    activations are those of the given poses.

    Args:
        model: the model, which is changed.
        given: values under the names of `values.in_jax`.

    Returns:
        What the layers compute themselves from these inputs; it is filled while the model is called.
    """
    own: dict[str, jax.Array] = {}
    last = len(model.capsule_layers) - 1
    # The capsules of the last layer may be given as outputs of the model.
    given = {f"{kind} {last}": given[f"encoded {kind}"] for kind in KINDS if f"encoded {kind}" in given} | dict(given)

    def through(name: str, value: jax.Array) -> jax.Array:
        own.setdefault(name, value)
        return _replaced(value, given[name].astype(value.dtype)) if name in given else value

    def capsules_through(names: str, capsules: Capsules) -> Capsules:
        poses, activations = capsules
        replaced = through(names.format("poses"), poses)
        are_norms = jnp.abs(capsule_norm(poses) - activations).max() < A_NORM
        activations = jnp.where(are_norms, capsule_norm(replaced), activations)
        return Capsules(replaced, through(names.format("activations"), activations))

    convolutions = [*model.stem.convolutions[1:], model.primary_capsules.convolution]
    for number, convolution in enumerate(convolutions):
        _change(convolution, "without_bias", lambda call, images, n=number: call(through(f"stem {n}", images)))
    _change(model, "primary_capsules", lambda call, features: capsules_through("primary {}", call(features)))
    for number, layer in enumerate(model.capsule_layers):
        _change(layer, "votes", lambda call, poses, n=number: through(f"votes {n}", call(poses)))
        _change(layer, "capsules_of", lambda call, routed, n=number: capsules_through(f"{{}} {n}", call(routed)))
    if model.decoder is not None:
        _change(model, "decode", lambda call, *capsules: through("reconstructions", call(*capsules)))
        _change(
            model.decoder,
            "hidden_features",
            lambda call, poses: tuple(through(f"decoder {n}", features) for n, features in enumerate(call(poses))),
        )
    return own


def _change(module: Any, method: str, change: Callable[..., Any]) -> None:
    """Replace a method or layer of one module by a function of it and its arguments."""
    right = getattr(module, method)
    setattr(module, method, lambda *arguments: change(right, *arguments))
