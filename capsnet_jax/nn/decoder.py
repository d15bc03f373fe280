"""From the capsules of the labels back to an image."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from capsnet_jax.nn.initializers import TORCH, Scheme, new_param
from capsnet_jax.nn.precision import at_least_float32


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
