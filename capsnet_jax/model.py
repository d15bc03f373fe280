"""The capsule network: an encoder of images to capsules, and a decoder of one capsule back to an image."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from capsnet_jax.capsules import Capsules, Routed
from capsnet_jax.errors import UsageError
from capsnet_jax.initializers import fan_in_uniform, unit_variance_uniform
from capsnet_jax.layers import CapsuleLayer, Convolution, PrimaryCapsules, new_param
from capsnet_jax.ops import mask_by_label


class Encoder(nnx.Module):
    """Images to capsules: a convolution, ReLU, primary capsules, then any number of capsule layers.

    Args:
        stem: the first convolution.
        primary_capsules: capsules of the features of the stem.
        capsule_layers: layers that route to each other, in order.
    """

    def __init__(
        self, stem: Convolution, primary_capsules: PrimaryCapsules, capsule_layers: Sequence[CapsuleLayer] = ()
    ):
        self.stem = stem
        self.primary_capsules = primary_capsules
        self.capsule_layers = nnx.List(capsule_layers)

    def __call__(self, images: Float[Array, "b height width channels"]) -> Capsules:
        capsules = self.primary_capsules(jax.nn.relu(self.stem(images)))
        for layer in self.capsule_layers:
            capsules = layer(capsules)
        return capsules


class Decoder(nnx.Module):
    """Capsules, all but one of them zero, to images in (0, 1): three dense layers.

    Args:
        num_classes: number of capsules.
        class_dim: pose size of the capsules.
        hidden: widths of the two hidden layers.
        image_shape: height, width and number of channels of the images.
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
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        first, second = hidden
        per_capsules = unit_variance_uniform(num_classes * class_dim)
        self.from_capsules = new_param(per_capsules, (num_classes, class_dim, first), param_dtype, rngs)
        self.hidden_weight = new_param(fan_in_uniform(first), (first, second), param_dtype, rngs)
        self.hidden_bias = new_param(fan_in_uniform(first), (second,), param_dtype, rngs)
        self.to_pixels = new_param(unit_variance_uniform(second), (second, *image_shape), param_dtype, rngs)

    def __call__(self, poses: Float[Array, "b o h"]) -> Float[Array, "b height width channels"]:
        features = jax.nn.relu(jnp.einsum("boh,ohf->bf", poses, self.from_capsules[...]))
        features = jax.nn.relu(features @ self.hidden_weight[...] + self.hidden_bias[...])
        return jax.nn.sigmoid(jnp.tensordot(features, self.to_pixels[...], axes=1))


class CapsNet(nnx.Module):
    """A capsule network; the defaults are the reference model, 8.2 million weights on MNIST.

    Args:
        image_shape: height, width and number of channels of the images.
        num_classes: number of classes, each with one capsule.
        stem_channels: number of channels of the first convolution.
        stem_kernel: kernel size of the first convolution, in pixels.
        primary_groups: number of primary capsules at each position.
        primary_dim: pose size of the primary capsules.
        primary_kernel: kernel size of the primary capsules.
        primary_stride: stride of the primary capsules.
        primary_scale: factor of the primary poses; see `PrimaryCapsules`.
        hidden_capsules: number and pose size of the capsules of each layer between primary and class capsules.
        class_dim: pose size of the class capsules.
        decoder_hidden: widths of the two hidden layers of the decoder.
        routing: a name in `ROUTINGS`, `package.module:function`, or the function itself; for all capsule layers.
        num_iterations: number of routing iterations.
        param_dtype: dtype of the weights.
        rngs: source of the initial weights.

    Raises:
        UsageError: the images are smaller than what the two convolutions need, or the routing is unknown.

    References:
        Sabour, Frosst, Hinton, "Dynamic Routing Between Capsules" (2017), section 4; in the variant of
        https://github.com/arogozhnikov/readable_capsnet
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (28, 28, 1),
        num_classes: int = 10,
        *,
        stem_channels: int = 256,
        stem_kernel: int = 9,
        primary_groups: int = 32,
        primary_dim: int = 8,
        primary_kernel: int = 9,
        primary_stride: int = 2,
        primary_scale: float = 0.01,
        hidden_capsules: Sequence[tuple[int, int]] = (),
        class_dim: int = 16,
        decoder_hidden: tuple[int, int] = (512, 1024),
        routing: str | Callable[..., Routed] = "dynamic",
        num_iterations: int = 3,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        height, width, channels = image_shape
        smallest = stem_kernel + primary_kernel - 1
        if min(height, width) < smallest:
            raise UsageError(
                f"Images of {height} x {width} are too small: a stem of {stem_kernel} x {stem_kernel} under primary "
                f"capsules of {primary_kernel} x {primary_kernel} needs at least {smallest} x {smallest}."
            )
        stem = Convolution(channels, stem_channels, kernel_size=stem_kernel, param_dtype=param_dtype, rngs=rngs)
        primary_capsules = PrimaryCapsules(
            stem_channels,
            primary_groups,
            primary_dim,
            kernel_size=primary_kernel,
            stride=primary_stride,
            scale=primary_scale,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        # No data set needs arithmetic by hand: a dry run tells the number of primary capsules.
        images = jax.ShapeDtypeStruct((1, *image_shape), param_dtype)
        _, capsules, dim = jax.eval_shape(Encoder(stem, primary_capsules), images).poses.shape
        capsule_layers = []
        for out_capsules, out_dim in (*hidden_capsules, (num_classes, class_dim)):
            capsule_layers.append(
                CapsuleLayer(
                    capsules,
                    dim,
                    out_capsules,
                    out_dim,
                    routing=routing,
                    num_iterations=num_iterations,
                    param_dtype=param_dtype,
                    rngs=rngs,
                )
            )
            capsules, dim = out_capsules, out_dim
        self.image_shape = tuple(image_shape)
        self.encoder = Encoder(stem, primary_capsules, capsule_layers)
        self.decoder = Decoder(num_classes, class_dim, decoder_hidden, image_shape, param_dtype=param_dtype, rngs=rngs)
        # The same dry run through routing: one that returns wrong shapes is found here, not in the first training step.
        jax.eval_shape(self.encode, images)

    def encode(self, images: Float[Array, "b height width channels"]) -> Capsules:
        """The class capsules of images in [0, 1]; the predicted class is the one of the largest activation.

        Raises:
            UsageError: the images are not of the shape that the model was made for.
        """
        if images.shape[1:] != self.image_shape:
            raise UsageError(f"Images are of shape {images.shape[1:]}, and the model was made for {self.image_shape}.")
        return self.encoder(images)

    def decode(self, poses: Float[Array, "b o h"], labels: Int[Array, " b"]) -> Float[Array, "b height width channels"]:
        """The images that the capsules of the labels stand for, with pixels in (0, 1)."""
        return self.decoder(mask_by_label(poses, labels))
