"""The capsule network: an encoder of images to capsules, and a decoder of one capsule back to an image."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from capsnet_jax.capsules import Capsules, Routed
from capsnet_jax.conv_capsules import ConvCapsules
from capsnet_jax.convolution import positions_after
from capsnet_jax.decoder import Decoder
from capsnet_jax.errors import UsageError
from capsnet_jax.initializers import SCHEMES
from capsnet_jax.layers import CapsuleLayer, PrimaryCapsules
from capsnet_jax.ops import mask_by_label
from capsnet_jax.routing import get_routing
from capsnet_jax.stem import Stem


class Encoder(nnx.Module):
    """Images to capsules: convolutions, primary capsules, then any number of capsule layers.

    Args:
        stem: the convolutions.
        primary_capsules: capsules of the features of the stem.
        capsule_layers: layers that route to each other, in order.
    """

    def __init__(
        self, stem: Stem, primary_capsules: PrimaryCapsules, capsule_layers: Sequence[CapsuleLayer | ConvCapsules] = ()
    ):
        self.stem = stem
        self.primary_capsules = primary_capsules
        self.capsule_layers = nnx.List(capsule_layers)

    def __call__(self, images: Float[Array, "b height width channels"]) -> Capsules:
        capsules = self.primary_capsules(self.stem(images))
        for layer in self.capsule_layers:
            capsules = layer(capsules)
        return capsules


class CapsNet(nnx.Module):
    """A capsule network; the defaults are the reference model, 8.2 million weights on MNIST.

    A new model is in evaluation mode; `model.train()` lets batch normalisation, where there is any, see the batch.

    Args:
        image_shape: height, width and number of channels of the images.
        num_classes: number of classes, each with one capsule.
        stem_below: number of channels and kernel size of convolutions, of stride 1, below the last one of the stem.
        stem_channels: number of channels of the last convolution of the stem.
        stem_kernel: kernel size of that convolution, in pixels.
        stem_stride: stride of that convolution.
        batch_norm: whether there is a batch normalisation after each convolution of the stem.
        primary_groups: number of primary capsules at each position.
        primary_dim: pose size of the primary capsules.
        primary_kernel: kernel size of the primary capsules.
        primary_stride: stride of the primary capsules.
        primary_scale: factor of the primary poses; see `PrimaryCapsules`.
        primary_depthwise: whether each channel of the primary capsules sees one channel of the features.
        primary_squash: "none", "squash" or "exponential"; see `PrimaryCapsules`.
        primary_activation: "norm" or "sigmoid"; see `PrimaryCapsules`.
        conv_capsules: groups, pose size, kernel size and stride of each layer of convolutional capsules.
        matrix_poses: poses above the primary capsules are square matrices; see `ConvCapsules`.
        hidden_capsules: number and pose size of the capsules of each layer between those and the class capsules.
        class_dim: pose size of the class capsules.
        shared_class_transform: a group of capsules has one transformation to the class capsules for all of its
            positions, and the position is added to the votes; see `ConvCapsules`.
        decoder_hidden: widths of the two hidden layers of the decoder; None for no decoder.
        decoder_bias: whether the outer layers of the decoder have a bias.
        initial_weights: "torch" or "official", a name in `initializers.SCHEMES`.
        routing: a name in `ROUTINGS`, `package.module:function`, or the function itself; for all capsule layers. See
            `get_routing`.
        num_iterations: number of routing iterations.
        param_dtype: dtype of the weights.
        rngs: source of the initial weights.

    Raises:
        UsageError: the images are smaller than what the convolutions need, sizes do not fit, a name or the routing is
            unknown, or the routing returns what it should not.

    References:
        Sabour, Frosst, Hinton, "Dynamic Routing Between Capsules" (2017), section 4; in the variant of
        https://github.com/arogozhnikov/readable_capsnet
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (28, 28, 1),
        num_classes: int = 10,
        *,
        stem_below: Sequence[tuple[int, int]] = (),
        stem_channels: int = 256,
        stem_kernel: int = 9,
        stem_stride: int = 1,
        batch_norm: bool = False,
        primary_groups: int = 32,
        primary_dim: int = 8,
        primary_kernel: int = 9,
        primary_stride: int = 2,
        primary_scale: float = 0.01,
        primary_depthwise: bool = False,
        primary_squash: str = "none",
        primary_activation: str = "norm",
        conv_capsules: Sequence[tuple[int, int, int, int]] = (),
        matrix_poses: bool = False,
        hidden_capsules: Sequence[tuple[int, int]] = (),
        class_dim: int = 16,
        shared_class_transform: bool = False,
        decoder_hidden: tuple[int, int] | None = (512, 1024),
        decoder_bias: bool = False,
        initial_weights: str = "torch",
        routing: str | Callable[..., Routed] = "dynamic",
        num_iterations: int = 3,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if initial_weights not in SCHEMES:
            raise UsageError(f"initial_weights is {initial_weights!r}; expected {', '.join(SCHEMES)}.")
        scheme = SCHEMES[initial_weights]
        convolutions = [(channels, kernel, 1) for channels, kernel in stem_below]
        convolutions.append((stem_channels, stem_kernel, stem_stride))
        grid = _grid_of_primary_capsules(
            image_shape,
            [(kernel, stride) for _, kernel, stride in convolutions] + [(primary_kernel, primary_stride)],
            [(kernel, stride) for _, _, kernel, stride in conv_capsules],
        )
        stem = Stem(
            image_shape[-1], convolutions, batch_norm=batch_norm, scheme=scheme, param_dtype=param_dtype, rngs=rngs
        )
        primary_capsules = PrimaryCapsules(
            stem_channels,
            primary_groups,
            primary_dim,
            kernel_size=primary_kernel,
            stride=primary_stride,
            scale=primary_scale,
            depthwise=primary_depthwise,
            squash=primary_squash,
            activation=primary_activation,
            scheme=scheme,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        capsule_layers = _new_capsule_layers(
            grid,
            (primary_groups, primary_dim),
            conv_capsules,
            [*hidden_capsules, (num_classes, class_dim)],
            matrix_poses=matrix_poses,
            shared_class_transform=shared_class_transform,
            routing=get_routing(routing, num_iterations=num_iterations),
            initializer=scheme.einsum,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        height, width, channels = image_shape
        self.image_shape = (height, width, channels)
        self.encoder = Encoder(stem, primary_capsules, capsule_layers)
        self.decoder = (
            None
            if decoder_hidden is None
            else Decoder(
                num_classes,
                class_dim,
                decoder_hidden,
                self.image_shape,
                outer_bias=decoder_bias,
                scheme=scheme,
                param_dtype=param_dtype,
                rngs=rngs,
            )
        )
        self.eval()
        # A dry run: what is wrong with a routing is found here, not in the first training step.
        try:
            jax.eval_shape(self.encode, jax.ShapeDtypeStruct((1, *image_shape), param_dtype))
        except UsageError:
            raise
        except Exception as error:  # the user's function may raise anything
            reason = (str(error).strip().splitlines() or ["no message"])[0]
            raise UsageError(f"Routing {routing} raises {type(error).__name__}: {reason}") from error

    def encode(self, images: Float[Array, "b height width channels"]) -> Capsules:
        """The class capsules of images in [0, 1]; the predicted class is the one of the largest activation.

        Raises:
            UsageError: the images are not of the shape that the model was made for.
        """
        if images.shape[1:] != self.image_shape:
            raise UsageError(f"Images are of shape {images.shape[1:]}, and the model was made for {self.image_shape}.")
        return self.encoder(images)

    def decode(self, poses: Float[Array, "b o h"], labels: Int[Array, " b"]) -> Float[Array, "b height width channels"]:
        """The images that the capsules of the labels stand for, with pixels in (0, 1).

        Raises:
            UsageError: the model has no decoder.
        """
        if self.decoder is None:
            raise UsageError("The model has no decoder; decoder_hidden is None.")
        return self.decoder(mask_by_label(poses, labels))


def _new_capsule_layers(
    grid: tuple[int, int],
    primary: tuple[int, int],
    conv_capsules: Sequence[tuple[int, int, int, int]],
    dense_capsules: Sequence[tuple[int, int]],
    *,
    matrix_poses: bool,
    shared_class_transform: bool,
    **options: Any,
) -> list[CapsuleLayer | ConvCapsules]:
    """The layers above the primary capsules, each made for the grid, groups and pose size of the one below."""
    layers: list[CapsuleLayer | ConvCapsules] = []
    groups, dim = primary
    for out_groups, out_dim, kernel, stride in conv_capsules:
        sizes = (grid, groups, dim, out_groups, out_dim)
        layer = ConvCapsules(*sizes, kernel_size=kernel, stride=stride, matrix_poses=matrix_poses, **options)
        layers.append(layer)
        grid, groups, dim = layer.out_grid, out_groups, out_dim
    for number, (out_capsules, out_dim) in enumerate(dense_capsules, 1):
        shared = shared_class_transform and number == len(dense_capsules)
        if shared or matrix_poses:
            # A dense layer is a convolutional one whose kernel covers the grid.
            sizes = (grid, groups, dim, out_capsules, out_dim)
            layers.append(
                ConvCapsules(
                    *sizes,
                    kernel_size=grid,
                    matrix_poses=matrix_poses,
                    shared_transform=shared,
                    coordinate_addition=shared,
                    **options,
                )
            )
        else:
            layers.append(CapsuleLayer(math.prod(grid) * groups, dim, out_capsules, out_dim, **options))
        grid, groups, dim = (1, 1), out_capsules, out_dim
    return layers


def _grid_of_primary_capsules(
    image_shape: tuple[int, int, int], below: Sequence[tuple[int, int]], above: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """Height and width, in positions, of what these kernels and strides make of images of this shape.

    Args:
        image_shape: that of the images.
        below: kernel size and stride of each convolution, up to the primary capsules.
        above: those of layers of convolutional capsules, for which there must be room.
    """
    smallest = 1
    for kernel, stride in reversed([*below, *above]):
        smallest = (smallest - 1) * stride + kernel
    height, width, _ = image_shape
    if min(height, width) < smallest:
        raise UsageError(
            f"Images of {height} x {width} are too small: the convolutions of this model, of kernel sizes "
            f"{', '.join(str(kernel) for kernel, _ in [*below, *above])}, need at least {smallest} x {smallest}."
        )
    grid = (height, width)
    for kernel, stride in below:
        grid = positions_after(grid, (kernel, kernel), stride)
    return grid
