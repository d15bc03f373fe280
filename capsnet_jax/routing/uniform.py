"""Uniform routing: the baseline without routing, which every algorithm has to beat."""

import jax.numpy as jnp
from einops import reduce
from jaxtyping import Array, Float

from capsnet_jax.capsules import Routed
from capsnet_jax.ops import capsule_norm, squash
from capsnet_jax.routing.arguments import check_arguments


def uniform(votes: Float[Array, "i o h"], activations: Float[Array, " i"]) -> Routed:
    r"""Uniform couplings: $v_o = \mathrm{squash}(\sum_i u_{io} / O)$.

    Args:
        votes: $u_{io}$ of one example.
        activations: not used.

    Returns:
        The squashed output capsules, their norms as activations, and couplings of 1 / O.

    Raises:
        UsageError: votes or activations have a wrong shape.

    References:
        Gu, Tresp, "Improving the Robustness of Capsule Networks to Image Affine Transformations" (2019), section 4.
        https://arxiv.org/abs/1911.07968
    """
    check_arguments("uniform", votes, activations)
    num_outputs = votes.shape[1]
    poses = squash(reduce(votes, "i o h -> o h", "sum") / num_outputs)
    return Routed(poses, capsule_norm(poses), jnp.full_like(votes[..., 0], 1 / num_outputs))
