"""Capsules made long enough for routing to matter, so that a check can see it.

As the reference model is drawn, its class capsules are 4e-4 long: couplings differ from uniform ones by less than any
tolerance, and a model with no routing at all would agree.
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

ACTIVE = (0.1, 0.9)  # between these, the mean activation of a hot layer
UNEVEN = 0.2  # at least so far is one coupling of a hot layer from the mean of its input capsule
LARGEST = 30  # power of two that weights are multiplied by, up or down


class Heat(NamedTuple):
    """How hot a layer is.

    Attributes:
        factor: that its weight was multiplied by, a power of two, which leaves every mantissa as it is.
        activation: the mean one of its capsules.
        unevenness: the largest |c / mean - 1| of a coupling c to the mean over outputs of that input capsule.
    """

    factor: float
    activation: float
    unevenness: float

    @property
    def moderate(self) -> bool:
        """Whether capsules are neither all off nor all on."""
        return ACTIVE[0] <= self.activation <= ACTIVE[1]

    @property
    def hot(self) -> bool:
        """Whether routing matters, too."""
        return self.moderate and self.unevenness >= UNEVEN


def heat(pair: Pair) -> list[Heat]:
    """Multiplies the weight of each capsule layer by the power of two next to 1 that makes the layer hot, if any does.

    Returns:
        How hot each layer is then. Where no factor makes it hot, it is the one with the most uneven couplings.
    """
    model, twin = pair.jax_model, pair.torch_model.encoder
    graphdef, state = nnx.split(model)

    def primary_capsules(state: nnx.State) -> Capsules:
        encoder = nnx.merge(graphdef, state, copy=True)
        return encoder.primary_capsules(encoder.stem(pair.images))

    capsules = jax.jit(primary_capsules, compiler_options=QUICKLY_COMPILED)(state)
    torch_layers = [*twin.hidden_capsules, twin.primary2digit_capsules]
    heats = []
    for layer, torch_layer in zip(model.capsule_layers, torch_layers, strict=True):
        found, capsules = _hottest(layer, capsules)
        layer.weight[...] *= jnp.asarray(found.factor, layer.weight.dtype)
        weight = torch_layer.input_caps2U.weight if isinstance(layer, CapsuleLayer) else torch_layer.weight
        with torch.no_grad():
            weight.mul_(found.factor)
        heats.append(found)
    return heats


def _hottest(layer: CapsuleLayer | ConvCapsules, capsules: Capsules) -> tuple[Heat, Capsules]:
    """How hot the layer is at the best factor, and its capsules then."""
    graphdef, state = nnx.split(layer)

    def measure(state: nnx.State, capsules: Capsules, factor: jax.Array) -> tuple[jax.Array, jax.Array, Capsules]:
        scaled = nnx.merge(graphdef, state, copy=True)
        scaled.weight[...] *= factor.astype(scaled.weight.dtype)
        routed = scaled.route(capsules)
        means = reduce(routed.couplings, "... i o -> ... i 1", "mean")
        flat = Capsules(
            rearrange(routed.poses, "b ... h -> b (...) h"), rearrange(routed.activations, "b ... -> b (...)")
        )
        return routed.activations.mean(), jnp.abs(routed.couplings / means - 1).max(), flat

    compiled = jax.jit(measure, compiler_options=QUICKLY_COMPILED)
    found = []
    for power in sorted(range(-LARGEST, LARGEST + 1), key=abs):
        activation, unevenness, above = compiled(state, capsules, jnp.asarray(2.0**power))
        found.append((Heat(2.0**power, float(activation), float(unevenness)), above))
        if found[-1][0].hot:
            return found[-1]
    return max(found, key=lambda pair: (pair[0].moderate, np.nan_to_num(pair[0].unevenness)))
