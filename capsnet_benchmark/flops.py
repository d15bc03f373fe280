"""Floating-point operations of a model, computed by the direct algorithms."""

import math
from collections.abc import Sequence

from flax import nnx

from capsnet_jax.config import ModelConfig
from capsnet_jax.nn.conv_capsules import ConvCapsules
from capsnet_jax.nn.model import CapsNet
from capsnet_jax.nn.precision import PRODUCTS


def training_flops(config: ModelConfig) -> dict[str, int]:
    """Count the floating-point operations of one training step per image, by part of the model.

    The backward pass of a layer costs twice its forward pass: once for the gradient with respect to the weights, once
    for the gradient with respect to the inputs. The lowest convolution has no gradient with respect to the images.

    Raises:
        UsageError: the images are too small for the convolutions.
    """
    forward = forward_flops(config)
    flops = {part: 3 * sum(layers) for part, layers in forward.items()}
    flops["stem"] -= forward["stem"][0]
    return flops


def forward_flops(config: ModelConfig) -> dict[str, list[int]]:
    """Count the floating-point operations of each layer for one image: two per multiplication, lowest layer first.

    Only products with weights count: convolutions, votes and the dense layers of the decoder. Routing, biases and
    elementwise functions are left out; in the reference model (0.40 GFLOP) they are less than 1 % of the total.
    Algorithms with fewer multiplications, such as convolution by Fourier transform, can be faster than this suggests.

    Returns:
        The layers of "stem", "primary_capsules", "votes" (a number for each capsule layer) and "decoder".

    Raises:
        UsageError: the images are too small for the convolutions.
    """
    model = nnx.eval_shape(lambda: CapsNet.from_config(config, rngs=nnx.Rngs(0)))
    multiplications: dict[str, list[int]] = {"stem": [], "primary_capsules": [], "votes": [], "decoder": []}
    shape: Sequence[int] = (1, *config.image_shape)
    convolutions = [("stem", each) for each in model.stem.convolutions]
    for part, convolution in (*convolutions, ("primary_capsules", model.primary_capsules.convolution)):
        shape = convolution.out_shape(shape)
        multiplications[part].append(math.prod(shape[1:3]) * convolution.kernel.size)
    for layer in model.capsule_layers:
        uses = 1  # number of products per weight
        if isinstance(layer, ConvCapsules):
            taps_per_weight = math.prod(layer.kernel_size) // layer.weight.shape[0]
            uses = math.prod(layer.out_grid) * layer.rows * taps_per_weight
        multiplications["votes"].append(uses * layer.weight.size)
    if model.decoder is not None:
        weights = nnx.to_flat_state(nnx.state(model.decoder, nnx.Param))
        multiplications["decoder"] = [weight.size for path, weight in weights if path[-1] in PRODUCTS]
    return {part: [2 * number for number in numbers] for part, numbers in multiplications.items()}
