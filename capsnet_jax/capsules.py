"""The two named tuples that layers and routing algorithms exchange."""

from typing import NamedTuple

from jaxtyping import Array, Float


class Capsules(NamedTuple):
    """Poses and activations of one layer of capsules.

    Attributes:
        poses: the pose vector of each capsule.
        activations: how present the entity of each capsule is, in [0, 1]. For squashed capsules this is the norm of
            the pose.

    Examples:
        >>> import jax.numpy as jnp
        >>> from capsnet_jax import Capsules
        >>> capsules = Capsules(poses=jnp.ones((4, 10, 16)), activations=jnp.ones((4, 10)))
        >>> capsules.poses.shape, capsules.activations.shape
        ((4, 10, 16), (4, 10))
    """

    poses: Float[Array, "*batch capsules dim"]
    activations: Float[Array, "*batch capsules"]


class Routed(NamedTuple):
    """The result of a routing algorithm: output capsules, and the couplings that produced them.

    Attributes:
        poses: poses of the output capsules.
        activations: activations of the output capsules, in [0, 1].
        couplings: weight of each vote in the last iteration. For most algorithms the couplings of an input capsule
            sum to 1 over the output capsules.

    Examples:
        >>> import jax.numpy as jnp
        >>> from capsnet_jax import ROUTINGS
        >>> votes, activations = jnp.ones((6, 3, 4)), jnp.ones(6)  # 6 input capsules, 3 output capsules of pose size 4
        >>> routed = ROUTINGS["uniform"](votes, activations)
        >>> routed.poses.shape, routed.activations.shape, routed.couplings.shape
        ((3, 4), (3,), (6, 3))
    """

    poses: Float[Array, "*batch o h"]
    activations: Float[Array, "*batch o"]
    couplings: Float[Array, "*batch i o"]
