"""Mistakes in a weight map that no shape tells, found by taking each of them back."""

import itertools
from collections.abc import Iterator, Mapping

import torch
from einops import rearrange
from torch import Tensor

from capsnet_jax.nn.layers import CapsuleLayer
from capsnet_verify.foreign_module import ForeignModule, Seen

SWAPPED = "mixed up in the map; swapped, {agrees}"


def mended(foreign: ForeignModule) -> Iterator[tuple[str, Seen]]:
    """Each mistake that the map may have, in words, and what forward gives if it is taken back.

    The words have a place, "agrees", for what comes of that.

    Weights of one shape may be mixed up, axes of one size transposed, and input capsules be in order of groups first,
    while ours are in order of positions first.
    """
    weights = foreign.weights.values()
    for one, other in itertools.combinations(weights, 2):
        if one.tensor.shape == other.tensor.shape and one.axes == other.axes:
            swapped = {one.name: other.tensor, other.name: one.tensor}
            yield f'"{one.name}" and "{other.name}" are {SWAPPED}', _with(foreign, swapped)
    for weight in weights:
        for first, second in itertools.combinations(range(weight.tensor.dim()), 2):
            if weight.tensor.shape[first] == weight.tensor.shape[second] > 1:
                transposed = {weight.name: weight.tensor.transpose(first, second)}
                yield f'axes {first} and {second} of "{weight.name}" are {SWAPPED}', _with(foreign, transposed)
    yield from _groups_first(foreign)


def _groups_first(foreign: ForeignModule) -> Iterator[tuple[str, Seen]]:
    encoder = foreign.pair.jax_model
    layer, groups = encoder.capsule_layers[0], encoder.primary_capsules.groups
    if not isinstance(layer, CapsuleLayer):
        return
    last = len(encoder.capsule_layers) == 1
    name = f"encoder.{'primary2digit_capsules' if last else 'hidden_capsules.0'}.input_caps2U.weight"
    weight = foreign.weights[name]
    for axis, size in enumerate(weight.tensor.shape):
        if size == layer.weight.shape[0]:
            ordered = rearrange(weight.tensor.movedim(axis, 0), "(p g) ... -> (g p) ...", g=groups).movedim(0, axis)
            words = (
                f'input capsules, axis {axis} of "{weight.name}", are in order of groups, then positions, and ours of '
                f"positions, then groups; as (g p) -> (p g) with g = {groups} in the map, {{agrees}}"
            )
            yield words, _with(foreign, {weight.name: ordered})


def _with(foreign: ForeignModule, others: Mapping[str, Tensor]) -> Seen:
    """What forward gives with other weights, which are then put back."""
    tensors = {weight.name: weight.tensor for weight in foreign.weights.values()}
    before = {name: tensors[name].detach().clone() for name in others}
    others = {name: tensor.detach().clone() for name, tensor in others.items()}
    with torch.no_grad():
        try:
            for name, tensor in others.items():
                tensors[name].copy_(tensor)
            return foreign.call()
        finally:
            for name, tensor in before.items():
                tensors[name].copy_(tensor)
