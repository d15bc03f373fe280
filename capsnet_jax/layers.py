"""Layers that own weights: a convolution, the first capsules, and capsules that route to capsules."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from capsnet_jax.capsules import Capsules, Routed
from capsnet_jax.convolution import convolve
from capsnet_jax.initializers import Initializer, fan_in_uniform, unit_variance_uniform
from capsnet_jax.ops import capsule_norm
from capsnet_jax.routing import get_routing


class Convolution(nnx.Module):
    """A convolution without padding, plus a bias.

    Args:
        in_channels: number of channels of the images.
        out_channels: number of channels of the result.
        kernel_size: height and width of the kernel, in pixels.
        stride: step of the kernel, in pixels.
        param_dtype: dtype of the weights.
        rngs: source of the initial weights.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int,
        stride: int = 1,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.stride = stride
        initializer = fan_in_uniform(in_channels * kernel_size**2)
        self.kernel = new_param(initializer, (kernel_size, kernel_size, in_channels, out_channels), param_dtype, rngs)
        self.bias = new_param(initializer, (out_channels,), param_dtype, rngs)

    def __call__(self, images: Float[Array, "b height width channels"]) -> Float[Array, "b out_height out_width out"]:
        return convolve(images, self.kernel[...], self.stride) + self.bias[...]


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
        param_dtype: dtype of the weights.
        rngs: source of the initial weights.
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
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dim = dim
        self.scale = scale
        self.convolution = Convolution(
            in_channels, groups * dim, kernel_size=kernel_size, stride=stride, param_dtype=param_dtype, rngs=rngs
        )

    def __call__(self, features: Float[Array, "b height width channels"]) -> Capsules:
        poses = self.scale * rearrange(
            self.convolution(features), "b height width (groups d) -> b (height width groups) d", d=self.dim
        )
        return Capsules(poses, capsule_norm(poses))


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
        routing: a name in `ROUTINGS`, `package.module:function`, or the function itself.
        num_iterations: number of routing iterations, for routings that iterate.
        param_dtype: dtype of the weights.
        rngs: source of the initial weights.

    Raises:
        UsageError: the routing is unknown or refuses its arguments.
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
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.routing = get_routing(routing, num_iterations=num_iterations)
        shape = (in_capsules, in_dim, out_capsules, out_dim)
        self.weight = new_param(unit_variance_uniform(in_dim), shape, param_dtype, rngs)

    def __call__(self, capsules: Capsules) -> Capsules:
        routed = self.route(capsules)
        return Capsules(routed.poses, routed.activations)

    def route(self, capsules: Capsules) -> Routed:
        """The output capsules together with the couplings of every vote."""
        return jax.vmap(self.routing)(self.votes(capsules.poses), capsules.activations)

    def votes(self, poses: Float[Array, "b i d"]) -> Float[Array, "b i o h"]:
        """What each input capsule predicts for each output capsule."""
        return jnp.einsum("bid,idoh->bioh", poses, self.weight[...])


def new_param(initializer: Initializer, shape: tuple[int, ...], dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Param:
    """A weight drawn from the next key of `rngs.params`."""
    return nnx.Param(initializer(rngs.params(), shape, dtype))
