"""The layers of a capsule network: stem, primary capsules, dense capsule layers and decoder."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from capsnet_jax.capsules import Capsules, Routed
from capsnet_jax.errors import UsageError, check_sizes
from capsnet_jax.nn.fast.choice import Choice, Size, choose_convolution, choose_routing
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

SQUASHES = {"none": lambda poses: poses, "squash": squash, "exponential": exponential_squash}


class Convolution(nnx.Module):
    """A two-dimensional convolution without padding, with a bias.

    Unlike `nnx.Conv`, it uses the fastest implementation for its shapes; see `nn/fast`.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        kernel_size: height and width of the kernel, in pixels.
        stride: stride of the kernel, in pixels.
        depthwise: convolve each channel with its own filter; needs `out_channels == in_channels`.
        kernel_init: initializer of the kernel, given its fan-in.
        bias_init: initializer of the bias, given the fan-in of the kernel.
        param_dtype: dtype of the parameters.
        rngs: source of the initial parameters.

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
        kernel_init: Callable[[int], Initializer] = TORCH.kernel,
        bias_init: Callable[[int], Initializer] = TORCH.bias,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_sizes(in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size, stride=stride)
        if depthwise and in_channels != out_channels:
            raise UsageError(
                f"A depthwise convolution has {in_channels} input and {out_channels} output channels; expected the "
                "same number."
            )
        self.stride = stride
        self.depthwise = depthwise
        seen = 1 if depthwise else in_channels
        fan_in = seen * kernel_size**2
        shape = (kernel_size, kernel_size, seen, out_channels)
        self.kernel = new_param(kernel_init(fan_in), shape, param_dtype, rngs)
        self.bias = new_param(bias_init(fan_in), (out_channels,), param_dtype, rngs)

    def __call__(self, images: Images) -> Features:
        product = self.without_bias(images)
        return (product + self.bias[...]).astype(product.dtype)

    def without_bias(self, images: Images) -> Features:
        """Convolve without adding the bias; the result has the dtype of the kernel."""
        kernel = self.kernel[...]
        return (depthwise if self.depthwise else convolve)(images.astype(kernel.dtype), kernel, self.stride)

    def choice(self, shape: Sequence[int]) -> Choice:
        """Return the implementation for images of this shape, `[b height width channels]`."""
        if self.depthwise:
            return Choice("taps", "a depthwise convolution has no other implementation")
        return choose_convolution(shape, self.kernel.shape, self.stride, self.kernel.dtype)

    def out_shape(self, shape: Sequence[int]) -> tuple[int, int, int, int]:
        """Compute the output shape for images of this shape, `[b height width channels]`."""
        return (shape[0], *positions_after(shape[1:3], self.kernel.shape[:2], self.stride), self.kernel.shape[-1])


class Stem(nnx.Module):
    """Convolutions from images to features, each followed by ReLU and optionally batch normalization.

    Args:
        in_channels: number of channels of the images.
        convolutions: number of output channels, kernel size and stride of each convolution.
        batch_norm: whether to normalize features over the batch. In evaluation mode, running averages are used.
        standardize: whether to standardize each image first; see `standardize_images`.
        scheme: initial distributions of the parameters.
        param_dtype: dtype of the parameters.
        rngs: source of the initial parameters.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from capsnet_jax import Stem
        >>> stem = Stem(1, [(16, 5, 1), (32, 3, 2)], rngs=nnx.Rngs(0))
        >>> nnx.jit(stem)(jnp.ones((4, 28, 28, 1))).shape
        (4, 11, 11, 32)
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
        new_convolution = partial(
            Convolution, kernel_init=scheme.stem, bias_init=scheme.bias, param_dtype=param_dtype, rngs=rngs
        )
        layers: list[Convolution] = []
        for out_channels, kernel_size, stride in convolutions:
            layers.append(new_convolution(in_channels, out_channels, kernel_size=kernel_size, stride=stride))
            in_channels = out_channels
        self.convolutions = nnx.List(layers)
        dtype = jnp.promote_types(param_dtype, jnp.float32)
        # Momentum and epsilon are the defaults of Keras, with which Efficient-CapsNet was trained.
        new_norm = partial(nnx.BatchNorm, momentum=0.99, epsilon=1e-3, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.norms = nnx.List([new_norm(out_channels) for out_channels, _, _ in convolutions if batch_norm])
        for norm in self.norms:  # Flax keeps running averages in float32 whatever the dtype of the parameters
            norm.mean, norm.var = (nnx.BatchStat(stat[...].astype(dtype)) for stat in (norm.mean, norm.var))

    def __call__(self, images: Images) -> Features:
        return self.features(images)[-1]

    @jax.named_scope("stem")
    def features(self, images: Images) -> list[Features]:
        """Compute the features after each convolution, in order."""
        features = [standardize_images(images) if self.standardize else images]
        for number, convolution in enumerate(self.convolutions):
            rectified = jax.nn.relu(convolution(features[-1]))
            features.append(self.norms[number](rectified) if self.norms else rectified)
        return features[1:]


class PrimaryCapsules(nnx.Module):
    """The first capsules: one convolution whose output channels are split into groups of capsules.

    Capsules are in the order `(height width groups)`.

    Args:
        in_channels: number of channels of the features.
        groups: number of capsules at each position.
        dim: pose size.
        kernel_size: height and width of the convolution, in pixels of the features.
        stride: stride of the convolution.
        scale: factor of the poses. The reference model starts at 0.01, where routing has almost no effect, and learns
            longer poses. Networks with several capsule layers need about 1, because squash shrinks short vectors.
        depthwise: convolve each channel of the features with its own filter.
        squash: "none", "squash" or "exponential", the functions of `ops`. With a squash, the poses are
            `squash(scale * product + bias)`; without, they are `scale * (product + bias)`.
        activation: "norm" of the pose, or "sigmoid" of one additional channel per capsule.
        scheme: initial distributions of the parameters.
        param_dtype: dtype of the parameters.
        rngs: source of the initial parameters.

    Raises:
        UsageError: `squash` or `activation` is unknown, or the channels of a depthwise convolution do not match.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from capsnet_jax import PrimaryCapsules
        >>> primary = PrimaryCapsules(32, groups=4, dim=8, kernel_size=3, stride=2, rngs=nnx.Rngs(0))
        >>> capsules = nnx.jit(primary)(jnp.ones((4, 11, 11, 32)))  # 5 x 5 positions of 4 capsules
        >>> capsules.poses.shape, capsules.activations.shape
        ((4, 100, 8), (4, 100))
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
        if squash not in SQUASHES:
            raise UsageError(f"primary_squash is {squash!r}; expected {', '.join(SQUASHES)}.")
        if activation not in ("norm", "sigmoid"):
            raise UsageError(f"primary_activation is {activation!r}; expected norm or sigmoid.")
        check_sizes(groups=groups, dim=dim)
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
            kernel_init=scheme.kernel,
            bias_init=scheme.bias,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    @jax.named_scope("primary_capsules")
    def __call__(self, features: Features) -> Capsules:
        product, bias = at_least_float32(self.convolution.without_bias(features)), self.convolution.bias[...]
        poses = self.scale * product + (self.scale if self.squash == "none" else 1) * bias
        poses = rearrange(
            poses, "b height width (groups channels) -> b (height width groups) channels", groups=self.groups
        )
        squash = SQUASHES[self.squash]
        if self.activation == "sigmoid":
            poses, logits = poses[..., :-1], poses[..., -1]
            return Capsules(squash(poses), jax.nn.sigmoid(logits))
        poses = squash(poses)
        return Capsules(poses, capsule_norm(poses))


def check_capsules(capsules: Any, number: int, dim: int) -> None:
    """Check that a layer gets a batch of as many capsules, of the pose size, as it was made for.

    Raises:
        UsageError: it does not.
    """
    expected = f"expected Capsules(poses, activations) of shapes (b, {number}, {dim}) and (b, {number})"
    if not isinstance(capsules, Capsules):
        raise UsageError(f"The layer got {type(capsules).__name__}; {expected}.")
    poses, activations = capsules.poses.shape, capsules.activations.shape
    if poses[1:] != (number, dim) or activations != poses[:2]:
        raise UsageError(f"The layer got capsules of shapes {poses} and {activations}; {expected}.")


class CapsuleLayer(nnx.Module):
    """A dense capsule layer: every input capsule votes for every output capsule, and routing weighs the votes.

    The vote of an input capsule for an output capsule is its pose times a weight matrix of that pair. The routing
    algorithm computes the output capsules from the votes, for each example independently.

    Args:
        in_capsules: number of input capsules.
        in_dim: pose size of the input capsules.
        out_capsules: number of output capsules.
        out_dim: pose size of the output capsules.
        routing: a name in `ROUTINGS`, `package.module:function`, or the function itself; see `get_routing`.
        num_iterations: number of routing iterations, for routings that iterate.
        implementation: "votes" computes votes first; "fused" never stores them and exists for the routings in `FUSED`;
            "auto" picks the faster one for the batch size and devices. The results are equal.
        recompute: recompute votes and routing in the backward pass instead of storing them (rematerialization);
            "fused" always does.
        scheme: initial distribution of the weight.
        param_dtype: dtype of the parameters.
        rngs: source of the initial parameters.

    Raises:
        UsageError: the routing is unknown or refuses its options, or has no such implementation.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from capsnet_jax import Capsules, CapsuleLayer
        >>> layer = CapsuleLayer(100, 8, 10, 16, routing="dynamic", rngs=nnx.Rngs(0))
        >>> capsules = nnx.jit(layer)(Capsules(poses=jnp.ones((4, 100, 8)), activations=jnp.ones((4, 100))))
        >>> capsules.poses.shape, capsules.activations.shape
        ((4, 10, 16), (4, 10))
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
        check_sizes(in_capsules=in_capsules, in_dim=in_dim, out_capsules=out_capsules, out_dim=out_dim)
        self.routing = get_routing(routing, num_iterations=num_iterations)
        self.implementation = implementation
        self.recompute = recompute
        shape = (in_capsules, in_dim, out_capsules, out_dim)
        self.weight = new_param(scheme.einsum(in_dim), shape, param_dtype, rngs)
        self.routing_weights = nnx.data(new_routing_weights(self.routing, *shape, param_dtype))
        self.choice(num_examples=1)  # raises if there is no such implementation

    def __call__(self, capsules: Capsules) -> Capsules:
        return self.capsules_of(self.route(capsules))

    def capsules_of(self, routed: Routed) -> Capsules:
        """Drop the couplings of a routing result."""
        return Capsules(routed.poses, routed.activations)

    @jax.named_scope("routing")
    def route(self, capsules: Capsules) -> Routed:
        """Compute the output capsules and the couplings of all votes; `nnx.capture` also collects both."""
        check_capsules(capsules, *self.weight.shape[:2])
        if self._choice(capsules.poses.shape[0]).name == "fused":
            options = dict(self.routing.options) | self._routing_weights()
            routed = FUSED[self.routing.function](capsules.poses, self.weight[...], **options)
        else:
            routed = (jax.checkpoint(self._route) if self.recompute else self._route)(capsules)
        if is_captured(self):
            self.sow(nnx.Intermediate, "votes", self.votes(capsules.poses))
            self.sow(nnx.Intermediate, "couplings", routed.couplings)
        return routed

    def choice(self, num_examples: Size) -> Choice:
        """Return the implementation for batches of this size."""
        return self._choice(num_examples)

    # Apart from `choice`, because `nnx.tabulate` traces the public methods of modules, which must return arrays.
    def _choice(self, num_examples: Size) -> Choice:
        in_capsules, _, out_capsules, out_dim = self.weight.shape
        votes = (num_examples, in_capsules, out_capsules, out_dim)
        return choose_routing(self.routing, self.implementation, votes)

    @jax.named_scope("votes")
    def votes(self, poses: Float[Array, "b i d"]) -> Float[Array, "b i o h"]:
        """Compute the vote of each input capsule for each output capsule."""
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
    """Three dense layers that reconstruct images with pixels in (0, 1) from class capsules.

    Args:
        num_classes: number of class capsules.
        class_dim: pose size of the class capsules.
        hidden: widths of the two hidden layers.
        image_shape: height, width and number of channels of the images.
        outer_bias: whether the first and the last layer have a bias; the middle one always has.
        scheme: initial distributions of the parameters.
        param_dtype: dtype of the parameters.
        rngs: source of the initial parameters.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from capsnet_jax import Decoder
        >>> decoder = Decoder(10, 16, (64, 128), (28, 28, 1), rngs=nnx.Rngs(0))
        >>> poses = jnp.zeros((4, 10, 16)).at[:, 3].set(0.25)  # only the capsule of class 3
        >>> nnx.jit(decoder)(poses).shape
        (4, 28, 28, 1)
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
        check_sizes(num_classes=num_classes, class_dim=class_dim, first_hidden=first, second_hidden=second)
        fan_in = num_classes * class_dim
        self.from_capsules = new_param(scheme.einsum(fan_in), (num_classes, class_dim, first), param_dtype, rngs)
        self.hidden_weight = new_param(scheme.kernel(first), (first, second), param_dtype, rngs)
        self.hidden_bias = new_param(scheme.bias(first), (second,), param_dtype, rngs)
        self.to_pixels = new_param(scheme.einsum(second), (second, *image_shape), param_dtype, rngs)
        self.outer_bias = outer_bias
        if outer_bias:
            self.first_bias = new_param(scheme.bias(fan_in), (first,), param_dtype, rngs)
            self.pixel_bias = new_param(scheme.bias(second), image_shape, param_dtype, rngs)

    @jax.named_scope("decoder")
    def __call__(self, poses: Float[Array, "b o h"]) -> Float[Array, "b height width channels"]:
        _, features = self.hidden_features(poses)
        # As a matrix, or XLA would transpose its gradient.
        to_pixels = rearrange(self.to_pixels[...], "features ... -> features (...)")
        pixels = at_least_float32(features.astype(to_pixels.dtype) @ to_pixels)
        pixels = pixels.reshape(-1, *self.to_pixels.shape[1:])
        if self.outer_bias:
            pixels += self.pixel_bias[...]
        return jax.nn.sigmoid(pixels)

    def hidden_features(self, poses: Float[Array, "b o h"]) -> tuple[Float[Array, "b first"], Float[Array, "b second"]]:
        """Compute the features of the two hidden layers."""
        from_capsules = rearrange(self.from_capsules[...], "o h features -> (o h) features")
        hidden = self.hidden_weight[...]
        first = rearrange(poses, "b o h -> b (o h)").astype(from_capsules.dtype) @ from_capsules
        if self.outer_bias:
            first += self.first_bias[...]
        first = jax.nn.relu(first)
        return first, jax.nn.relu(first.astype(hidden.dtype) @ hidden + self.hidden_bias[...])


def is_captured(module: nnx.Module) -> bool:
    """Return whether `nnx.capture` is active. Outside it, `sow` would keep the arrays in the module."""
    return hasattr(module, "__captures__")


def new_routing_weights(
    routing: Routing, in_capsules: int, in_dim: int, out_capsules: int, out_dim: int, dtype: DTypeLike
) -> dict[str, nnx.Param]:
    """Create the learned weights of a routing algorithm, each filled with its initial value."""
    sizes = {"i": in_capsules, "d": in_dim, "o": out_capsules, "h": out_dim}
    return {
        name: nnx.Param(jnp.full([sizes[axis] for axis in weight.axes], weight.initial, dtype))
        for name, weight in routing.weights.items()
    }
