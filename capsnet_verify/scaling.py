"""Scale the weights of capsule layers until routing matters, because otherwise no check could detect mistakes in it.

With its initial weights, the reference model has class capsules of length 4e-4. Its couplings differ from even ones by
less than any tolerance, so a model without any routing would agree.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from einops import rearrange, reduce
from flax import nnx

from capsnet_jax.capsules import Capsules
from capsnet_jax.nn.conv_capsules import ConvCapsules
from capsnet_jax.nn.layers import CapsuleLayer
from capsnet_verify.pair import Pair
from capsnet_verify.values import QUICKLY_COMPILED

ACTIVE = (0.1, 0.9)  # range of the mean activation of a layer whose routing matters
UNEVEN = 0.2  # smallest deviation of its most uneven coupling from the mean of the input capsule
LARGEST = 30  # exponent of the largest factor 2^n of a weight, and of the smallest, 2^-n


class Scaling(NamedTuple):
    """How a capsule layer was scaled.

    Attributes:
        factor: factor of its weight; a power of two, which leaves every mantissa unchanged.
        activation: mean activation of its capsules.
        unevenness: largest |c / mean - 1| of a coupling c, with the mean of the couplings of its input capsule.
    """

    factor: float
    activation: float
    unevenness: float

    @property
    def moderate(self) -> bool:
        """Whether the mean activation is neither close to 0 nor to 1."""
        return ACTIVE[0] <= self.activation <= ACTIVE[1]

    @property
    def routing_matters(self) -> bool:
        """Whether activations are moderate, and couplings uneven."""
        return self.moderate and self.unevenness >= UNEVEN


def scale_weights(pair: Pair) -> list[Scaling]:
    """Scale the weight of each capsule layer in both models, by the power of two closest to 1 at which routing matters.

    Returns:
        The scaling of each layer. If routing matters with no factor, the one with the most uneven couplings is used.
    """
    model, encoder = pair.jax_model, pair.torch_model.encoder
    graphdef, state = nnx.split(model)

    def primary_capsules(state: nnx.State) -> Capsules:
        model = nnx.merge(graphdef, state, copy=True)
        return model.primary_capsules(model.stem(pair.images))

    capsules = jax.jit(primary_capsules, compiler_options=QUICKLY_COMPILED)(state)
    torch_layers = [*encoder.hidden_capsules, encoder.primary2digit_capsules]
    scalings = []
    for layer, torch_layer in zip(model.capsule_layers, torch_layers, strict=True):
        found, capsules = _best_scaling(layer, capsules)
        layer.weight[...] *= jnp.asarray(found.factor, layer.weight.dtype)
        weight = torch_layer.input_caps2U.weight if isinstance(layer, CapsuleLayer) else torch_layer.weight
        with torch.no_grad():
            weight.mul_(found.factor)
        scalings.append(found)
    return scalings


def _best_scaling(layer: CapsuleLayer | ConvCapsules, capsules: Capsules) -> tuple[Scaling, Capsules]:
    """Find the best scaling of a layer, and the capsules that it then computes."""
    graphdef, state = nnx.split(layer)

    def measure(state: nnx.State, capsules: Capsules, factor: jax.Array) -> tuple[jax.Array, jax.Array, Capsules]:
        scaled = nnx.merge(graphdef, state, copy=True)
        scaled.weight[...] *= factor.astype(scaled.weight.dtype)
        routed = scaled.route(capsules)
        means = reduce(routed.couplings, "... i o -> ... i 1", "mean")
        poses, activations = rearrange(routed.poses, "b ... h -> b (...) h"), routed.activations
        above = Capsules(poses, rearrange(activations, "b ... -> b (...)"))
        return activations.mean(), jnp.abs(routed.couplings / means - 1).max(), above

    compiled = jax.jit(measure, compiler_options=QUICKLY_COMPILED)
    found = []
    for power in sorted(range(-LARGEST, LARGEST + 1), key=abs):
        activation, unevenness, above = compiled(state, capsules, jnp.asarray(2.0**power))
        found.append((Scaling(2.0**power, float(activation), float(unevenness)), above))
        if found[-1][0].routing_matters:
            return found[-1]
    return max(found, key=lambda pair: (pair[0].moderate, np.nan_to_num(pair[0].unevenness)))
