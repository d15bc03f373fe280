"""Layers: convolutions of images, the first capsules, capsules that route to each other, and the decoder."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from capsnet_jax.capsules import Capsules, Routed
from capsnet_jax.errors import UsageError
from capsnet_jax.nn.fast.choice import Choice, choose_convolution, choose_routing
from capsnet_jax.nn.fast.convolution import convolve, depthwise
from capsnet_jax.nn.fast.fused_dynamic import FUSED
from capsnet_jax.nn.initializers import TORCH, Initializer, Scheme, new_param
from capsnet_jax.ops import (
    at_least_float32,
    capsule_norm,
    exponential_squash,
    positions_after,
    squash,
    standardize_images,
)
from capsnet_jax.routing import Routing, get_routing

Images = Float[Array, "b height width channels"]
Features = Float[Array, "b out_height out_width features"]

SQUASHES = {"squash": squash, "exponential": exponential_squash}


class Convolution(nnx.Module):
    """A convolution without padding, plus a bias.

    Args:
        in_channels: number of channels of the images.
        out_channels: number of channels of the result.
        kernel_size: height and width of the kernel, in pixels.
        stride: step of the kernel, in pixels.
        depthwise: each channel has a filter of its own, and sees no other; needs as many channels out as in.
        kernel_initializer: distribution of the kernel, given the number of inputs of an output.
        bias_initializer: distribution of the bias.
        param_dtype: dtype of the weights.
        rngs: source of the initial weights.

    Raises:
        UsageError: the numbers of channels of a depthwise convolution differ.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int,
        stride: int = 1,
        depthwise: bool = False,
        kernel_initializer: Callable[[int], Initializer] = TORCH.kernel,
        bias_initializer: Callable[[int], Initializer] = TORCH.bias,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if depthwise and in_channels != out_channels:
            raise UsageError(f"A depthwise convolution has {out_channels} channels for the {in_channels} it sees.")
        self.stride = stride
        self.depthwise = depthwise
        seen = 1 if depthwise else in_channels
        fan_in = seen * kernel_size**2
        shape = (kernel_size, kernel_size, seen, out_channels)
        self.kernel = new_param(kernel_initializer(fan_in), shape, param_dtype, rngs)
        self.bias = new_param(bias_initializer(fan_in), (out_channels,), param_dtype, rngs)

    def __call__(self, images: Images) -> Features:
        product = self.without_bias(images)
        return (product + self.bias[...]).astype(product.dtype)

    def without_bias(self, images: Images) -> Features:
        """The products alone, in the dtype of the kernel."""
        kernel = self.kernel[...]
        return (depthwise if self.depthwise else convolve)(images.astype(kernel.dtype), kernel, self.stride)

    def choice(self, shape: Sequence[int]) -> Choice:
        """The implementation for images of this shape, `[b height width channels]`."""
        if self.depthwise:
            return Choice("taps", "a depthwise convolution has no other implementation")
        return choose_convolution(shape, self.kernel.shape, self.stride, self.kernel.dtype)

    def out_shape(self, shape: Sequence[int]) -> tuple[int, int, int, int]:
        """The shape of the features of images of this shape."""
        return (shape[0], *positions_after(shape[1:3], self.kernel.shape[:2], self.stride), self.kernel.shape[-1])


class Stem(nnx.Module):
    """Images to features: convolutions, each followed by ReLU and, if wanted, batch normalisation.

    Args:
        in_channels: number of channels of the images.
        convolutions: number of channels, kernel size and stride of each.
        batch_norm: whether features are normalised. In training they then depend on the whole batch; in evaluation
            the running means of training take its place.
        standardize: whether each image is standardised by itself first; see `standardize_images`.
        scheme: distributions of the weights.
        param_dtype: dtype of the weights.
        rngs: source of the initial weights.
    """

    def __init__(
        self,
        in_channels: int,
        convolutions: Sequence[tuple[int, int, int]],
        *,
        batch_norm: bool = False,
        standardize: bool = False,
        scheme: Scheme = TORCH,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.standardize = standardize
        channels = [in_channels, *(out_channels for out_channels, _, _ in convolutions)]
        self.convolutions = nnx.List(
            [
                Convolution(
                    channels[number],
                    out_channels,
                    kernel_size=kernel_size,
                    stride=stride,
                    kernel_initializer=scheme.stem,
                    bias_initializer=scheme.bias,
                    param_dtype=param_dtype,
                    rngs=rngs,
                )
                for number, (out_channels, kernel_size, stride) in enumerate(convolutions)
            ]
        )
        dtype = jnp.promote_types(param_dtype, jnp.float32)
        # The constants are Keras', with which Efficient-CapsNet was trained.
        new_norm = partial(nnx.BatchNorm, momentum=0.99, epsilon=1e-3, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.norms = nnx.List([new_norm(out_channels) for out_channels in channels[1:] if batch_norm])
        for norm in self.norms:  # Flax keeps running means in float32 whatever the weights are in
            norm.mean, norm.var = (nnx.BatchStat(stat[...].astype(dtype)) for stat in (norm.mean, norm.var))

    def __call__(self, images: Images) -> Features:
        return self.features(images)[-1]

    def features(self, images: Images) -> list[Features]:
        """What comes of each convolution, in order."""
        features = [standardize_images(images) if self.standardize else images]
        for number, convolution in enumerate(self.convolutions):
            rectified = jax.nn.relu(convolution(features[-1]))
            features.append(self.norms[number](rectified) if self.norms else rectified)
        return features[1:]


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
        implementation: "votes", which every routing has; "fused", without votes, of routings in `FUSED`; or "auto", the
            better one for the batch size and devices, by `choose_routing`. All compute the same.
        recompute: votes and routing are computed again in the backward pass, in place of being kept for it; "fused"
            always does that.
        scheme: distribution of the weight.
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
        scheme: Scheme = TORCH,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.routing = get_routing(routing, num_iterations=num_iterations)
        choose_routing(self.routing, implementation, 1)  # may refuse
        self.implementation = implementation
        self.recompute = recompute
        shape = (in_capsules, in_dim, out_capsules, out_dim)
        self.weight = new_param(scheme.einsum(in_dim), shape, param_dtype, rngs)
        self.routing_weights = nnx.data(new_routing_weights(self.routing, *shape, param_dtype))

    def __call__(self, capsules: Capsules) -> Capsules:
        return self.capsules_of(self.route(capsules))

    def capsules_of(self, routed: Routed) -> Capsules:
        """The output capsules alone."""
        return Capsules(routed.poses, routed.activations)

    def route(self, capsules: Capsules) -> Routed:
        """The output capsules together with the couplings of every vote."""
        if choose_routing(self.routing, self.implementation, capsules.poses.shape[0]).name == "fused":
            fused = partial(FUSED[self.routing.function], **dict(self.routing.options))
            routed = fused(capsules.poses, self.weight[...], **self._routing_weights())
        else:
            routed = (jax.checkpoint(self._route) if self.recompute else self._route)(capsules)
        if is_captured(self):
            self.sow(nnx.Intermediate, "votes", self.votes(capsules.poses))
            self.sow(nnx.Intermediate, "couplings", routed.couplings)
        return routed

    def choice(self, num_examples: int) -> Choice:
        """The implementation for batches of this size."""
        return choose_routing(self.routing, self.implementation, num_examples)

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


class Decoder(nnx.Module):
    """Capsules, all but those of the labels zero, to images in (0, 1): three dense layers.

    Args:
        num_classes: number of capsules.
        class_dim: pose size of the capsules.
        hidden: widths of the two hidden layers.
        image_shape: height, width and number of channels of the images.
        outer_bias: whether the first and the last layer have a bias, as the one between them has.
        scheme: distributions of the weights.
        param_dtype: dtype of the weights.
        rngs: source of the initial weights.
    """

    def __init__(
        self,
        num_classes: int,
        class_dim: int,
        hidden: tuple[int, int],
        image_shape: tuple[int, int, int],
        *,
        outer_bias: bool = False,
        scheme: Scheme = TORCH,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        first, second = hidden
        per_capsules = num_classes * class_dim
        self.from_capsules = new_param(scheme.einsum(per_capsules), (num_classes, class_dim, first), param_dtype, rngs)
        self.hidden_weight = new_param(scheme.kernel(first), (first, second), param_dtype, rngs)
        self.hidden_bias = new_param(scheme.bias(first), (second,), param_dtype, rngs)
        self.to_pixels = new_param(scheme.einsum(second), (second, *image_shape), param_dtype, rngs)
        self.outer_bias = outer_bias
        if outer_bias:
            self.first_bias = new_param(scheme.bias(per_capsules), (first,), param_dtype, rngs)
            self.pixel_bias = new_param(scheme.bias(second), image_shape, param_dtype, rngs)

    def __call__(self, poses: Float[Array, "b o h"]) -> Float[Array, "b height width channels"]:
        _, features = self.hidden_features(poses)
        to_pixels = self.to_pixels[...]
        pixels = at_least_float32(jnp.tensordot(features.astype(to_pixels.dtype), to_pixels, axes=1))
        if self.outer_bias:
            pixels += self.pixel_bias[...]
        return jax.nn.sigmoid(pixels)

    def hidden_features(self, poses: Float[Array, "b o h"]) -> tuple[Float[Array, "b first"], Float[Array, "b second"]]:
        """What comes of each of the two hidden layers."""
        from_capsules, hidden = self.from_capsules[...], self.hidden_weight[...]
        first = jnp.einsum("boh,ohf->bf", poses.astype(from_capsules.dtype), from_capsules)
        if self.outer_bias:
            first += self.first_bias[...]
        first = jax.nn.relu(first)
        return first, jax.nn.relu(first.astype(hidden.dtype) @ hidden + self.hidden_bias[...])


def is_captured(module: nnx.Module) -> bool:
    """Whether `nnx.capture` is collecting intermediates of this module; outside it, `sow` would keep them for good."""
    return hasattr(module, "__captures__")


def new_routing_weights(
    routing: Routing, in_capsules: int, in_dim: int, out_capsules: int, out_dim: int, dtype: DTypeLike
) -> dict[str, nnx.Param]:
    """The weights that a routing of these sizes learns, each full of the constant that it starts from."""
    sizes = {"i": in_capsules, "d": in_dim, "o": out_capsules, "h": out_dim}
    return {
        name: nnx.Param(jnp.full([sizes[axis] for axis in weight.axes], weight.initial, dtype))
        for name, weight in routing.weights.items()
    }
