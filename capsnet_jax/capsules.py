"""What flows between capsule layers, whatever the routing."""

from typing import NamedTuple

from jaxtyping import Array, Float


class Capsules(NamedTuple):
    """A layer of capsules.

    Attributes:
        poses: a capsule's vector, the instantiation parameters of the entity it stands for.
        activations: how present the entity is, in [0, 1]; for squashed capsules, the norm of the pose.
    """

    poses: Float[Array, "*batch capsules dim"]
    activations: Float[Array, "*batch capsules"]


class Routed(NamedTuple):
    """What a routing algorithm returns: the output capsules, and how the votes were shared out among them.

    Attributes:
        poses: poses of the output capsules.
        activations: activations of the output capsules, in [0, 1].
        couplings: the weight of each vote in the last iteration; they sum to 1 over the output capsules, or to what
            the routing says.
    """

    poses: Float[Array, "*batch o h"]
    activations: Float[Array, "*batch o"]
    couplings: Float[Array, "*batch i o"]
