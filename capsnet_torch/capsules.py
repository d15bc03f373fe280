"""The named tuples that layers and routing algorithms exchange; see `capsnet_jax.capsules`."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class Capsules(NamedTuple):
    """Poses and activations of a layer of capsules."""

    poses: Float[Tensor, "b capsules dim"]
    activations: Float[Tensor, "b capsules"]


class Routed(NamedTuple):
    """Output capsules of a routing, and the couplings of its last iteration."""

    poses: Float[Tensor, "b *positions o h"]
    activations: Float[Tensor, "b *positions o"]
    couplings: Float[Tensor, "b *positions i o"]
