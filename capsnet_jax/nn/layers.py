"""Layers of capsules: the first ones, and those that route to each other."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from capsnet_jax.capsules import Capsules, Routed
from capsnet_jax.errors import UsageError
from capsnet_jax.nn.fast.fused_dynamic import FUSED
from capsnet_jax.nn.initializers import TORCH, Initializer, Scheme, new_param, unit_variance_uniform
from capsnet_jax.nn.precision import at_least_float32
from capsnet_jax.nn.stem import Convolution, Features
from capsnet_jax.ops import capsule_norm, exponential_squash, squash
from capsnet_jax.routing import Routing, get_routing

SQUASHES = {"squash": squash, "exponential": exponential_squash}
IMPLEMENTATIONS = ("auto", "votes", "fused")
FEWEST_EXAMPLES = 16  # with fewer, votes are faster on CPU; with more, they are slower; see docs/performance.md


class PrimaryCapsules(nnx.Module):
    """The first capsules: all groups of them are the channels of one fat convolution.

    Args:
        in_channels: number of channels of the features.
        groups: number of capsules at each position.
        dim: pose size.
        kernel_size: height and width of the convolution, in pixels of the features.
        stride: step of the convolution.
        scale: factor of the poses. The reference model starts at 0.01, where routing has next to no effect; it grows
            into it. Networks of several capsule layers need about 1, as squash makes short vectors shorter still.
        depthwise: each channel of the poses sees one channel of the features.
        squash: "none"; or "squash" or "exponential", the functions of `ops`. Poses are then squashed after scale and
            bias, `squash(scale * product + bias)`, in place of `scale * (product + bias)`.
        activation: "norm", the length of the pose; or "sigmoid", of one more channel for each capsule.
        scheme: distributions of the weights.
        param_dtype: dtype of the weights.
        rngs: source of the initial weights.

    Raises:
        UsageError: the squash or the activation is unknown, or channels of a depthwise convolution do not fit.
    """

    def __init__(
        self,
        in_channels: int,
        groups: int,
        dim: int,
        *,
        kernel_size: int = 9,
        stride: int = 2,
        scale: float = 0.01,
        depthwise: bool = False,
        squash: str = "none",
        activation: str = "norm",
        scheme: Scheme = TORCH,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        for name, value, choices in (
            ("primary_squash", squash, ("none", *SQUASHES)),
            ("primary_activation", activation, ("norm", "sigmoid")),
        ):
            if value not in choices:
                raise UsageError(f"{name} is {value!r}; expected {', '.join(choices)}.")
        self.groups = groups
        self.dim = dim
        self.scale = scale
        self.squash = squash
        self.activation = activation
        self.convolution = Convolution(
            in_channels,
            groups * (dim + (activation == "sigmoid")),
            kernel_size=kernel_size,
            stride=stride,
            depthwise=depthwise,
            kernel_initializer=scheme.kernel,
            bias_initializer=scheme.bias,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, features: Features) -> Capsules:
        product, bias = at_least_float32(self.convolution.without_bias(features)), self.convolution.bias[...]
        poses = self.scale * product + (self.scale if self.squash == "none" else 1) * bias
        poses = rearrange(
            poses, "b height width (groups channels) -> b (height width groups) channels", groups=self.groups
        )
        if self.activation == "sigmoid":
            poses, logits = poses[..., :-1], poses[..., -1]
            return Capsules(self._squashed(poses), jax.nn.sigmoid(logits))
        poses = self._squashed(poses)
        return Capsules(poses, capsule_norm(poses))

    def _squashed(self, poses: Float[Array, "b i d"]) -> Float[Array, "b i d"]:
        return poses if self.squash == "none" else SQUASHES[self.squash](poses)


class CapsuleLayer(nnx.Module):
    """Capsules whose poses are what the capsules below them agree on.

    Every input capsule votes for the pose of every output capsule through a weight matrix of their own; a routing
    algorithm makes output capsules of the votes, for each example alone. Layers stack:

        CapsuleLayer(1152, 8, 32, 8, rngs=rngs)
        CapsuleLayer(32, 8, 16, 12, rngs=rngs)
        CapsuleLayer(16, 12, 10, 16, rngs=rngs)

    Args:
        in_capsules: number of input capsules.
        in_dim: pose size of the input capsules.
        out_capsules: number of output capsules.
        out_dim: pose size of the output capsules.
        routing: a name in `ROUTINGS`, `package.module:function`, or the function itself; see `get_routing`.
        num_iterations: number of routing iterations, for routings that iterate.
        implementation: "votes", which any routing works on; "fused", without votes, for routings in `FUSED`; or "auto",
            the latter where it can be had, for 16 examples or more on one device. Both compute the same; "fused" has no
            derivative in forward mode (`jax.jvp`).
        recompute: votes and routing are computed again in the backward pass, in place of being kept for it; "fused"
            always does that.
        initializer: distribution of the weight, given the number of inputs of an output.
        param_dtype: dtype of the weights.
        rngs: source of the initial weights.

    Raises:
        UsageError: the routing is unknown or refuses its arguments, or there is no such implementation of it.
    """

    def __init__(
        self,
        in_capsules: int,
        in_dim: int,
        out_capsules: int,
        out_dim: int,
        *,
        routing: str | Callable[..., Routed] = "dynamic",
        num_iterations: int = 3,
        implementation: str = "auto",
        recompute: bool = False,
        initializer: Callable[[int], Initializer] = unit_variance_uniform,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.routing = get_routing(routing, num_iterations=num_iterations)
        fused_function(self.routing, implementation, FEWEST_EXAMPLES)  # may refuse
        self.implementation = implementation
        self.recompute = recompute
        shape = (in_capsules, in_dim, out_capsules, out_dim)
        self.weight = new_param(initializer(in_dim), shape, param_dtype, rngs)
        self.routing_weights = new_routing_weights(self.routing, *shape, param_dtype)

    def __call__(self, capsules: Capsules) -> Capsules:
        routed = self.route(capsules)
        return Capsules(routed.poses, routed.activations)

    def route(self, capsules: Capsules) -> Routed:
        """The output capsules together with the couplings of every vote."""
        if self.implementation != "votes":
            # The only place that needs the batch size as a number: a program exported for all sizes has none.
            fused = fused_function(self.routing, self.implementation, len(capsules.poses))
            if fused is not None:
                return fused(capsules.poses, self.weight[...], **self._routing_weights())
        return (jax.checkpoint(self._route) if self.recompute else self._route)(capsules)

    def votes(self, poses: Float[Array, "b i d"]) -> Float[Array, "b i o h"]:
        """What each input capsule predicts for each output capsule."""
        weight = self.weight[...]
        return at_least_float32(jnp.einsum("bid,idoh->bioh", poses.astype(weight.dtype), weight))

    def _route(self, capsules: Capsules) -> Routed:
        weights = self._routing_weights()

        def route(votes: Float[Array, "i o h"], activations: Float[Array, " i"], poses: Float[Array, "i d"]) -> Routed:
            return self.routing(votes, activations, poses=poses, **weights)

        return jax.vmap(route)(self.votes(capsules.poses), capsules.activations, capsules.poses)

    def _routing_weights(self) -> dict[str, Array]:
        return {name: weight[...] for name, weight in self.routing_weights.items()}


def fused_function(routing: Routing, implementation: str, num_examples: int) -> Callable[..., Routed] | None:
    """The routing without votes, if that is what this implementation means; None if it is of votes.

    Raises:
        UsageError: there is no such implementation, or none of this routing.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UsageError(f"routing_implementation is {implementation!r}; expected {', '.join(IMPLEMENTATIONS)}.")
    function = FUSED.get(routing.function)
    if implementation == "fused" and function is None:
        known = ", ".join(function.__name__ for function in FUSED)
        raise UsageError(f"Routing {routing.name} has no implementation without votes; expected {known}.")
    # Across devices the gradient of each chunk of the weight would be summed by itself, not all gradients at once.
    better = jax.device_count() == 1 and num_examples >= FEWEST_EXAMPLES
    wanted = implementation == "fused" or (implementation == "auto" and better)
    return partial(function, **dict(routing.options)) if function is not None and wanted else None


def new_routing_weights(
    routing: Routing, in_capsules: int, in_dim: int, out_capsules: int, out_dim: int, dtype: DTypeLike
) -> nnx.Dict:
    """The weights that a routing of these sizes learns, each full of the constant that it starts from."""
    sizes = {"i": in_capsules, "d": in_dim, "o": out_capsules, "h": out_dim}
    return nnx.Dict(
        {
            name: nnx.Param(jnp.full([sizes[axis] for axis in weight.axes], weight.initial, dtype))
            for name, weight in routing.weights.items()
        }
    )
