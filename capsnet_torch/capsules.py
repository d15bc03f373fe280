"""What flows between capsule layers, whatever the routing."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class Capsules(NamedTuple):
    """Poses and activations of a layer of capsules; see `capsnet_jax.capsules.Capsules`."""

    poses: Float[Tensor, "b capsules dim"]
    activations: Float[Tensor, "b capsules"]


class Routed(NamedTuple):
    """Output capsules and the couplings of the last iteration; see `capsnet_jax.capsules.Routed`."""

    poses: Float[Tensor, "b *positions o h"]
    activations: Float[Tensor, "b *positions o"]
    couplings: Float[Tensor, "b *positions i o"]
