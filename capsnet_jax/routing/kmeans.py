"""Routing by soft spherical k-means."""

import jax
import jax.numpy as jnp
from einops import reduce
from jaxtyping import Array, Float

from capsnet_jax.capsules import Routed
from capsnet_jax.ops import capsule_norm, direction, squash
from capsnet_jax.routing.arguments import check_arguments


def kmeans(votes: Float[Array, "i o h"], activations: Float[Array, " i"], *, num_iterations: int = 3) -> Routed:
    r"""Soft spherical k-means: dynamic routing whose logits are cosines, recomputed instead of accumulated.

    Starting from $s_o = \sum_i u_{io} / O$, repeat `num_iterations` - 1 times:

    $$c_{io} = \mathrm{softmax}_o \frac{u_{io} \cdot s_o}{\|u_{io}\| \|s_o\|}, \quad s_o = \sum_i c_{io} u_{io}$$

    and finally $v_o = \mathrm{squash}(s_o)$.

    Args:
        votes: $u_{io}$ of one example.
        activations: not used.
        num_iterations: number of times the output capsules are computed, one more than the authors' code counts. 1 is
            the same as `uniform`.

    Returns:
        The squashed output capsules, their norms as activations, and the couplings of the last iteration.

    Raises:
        UsageError: votes or activations have a wrong shape, or `num_iterations` is less than 1.

    References:
        https://github.com/leftthomas/CapsuleLayer, k_means_routing with the cosine similarity.
        Dhillon, Modha, "Concept Decompositions for Large Sparse Text Data Using Clustering" (2001), section 3.
    """
    check_arguments("kmeans", votes, activations, num_iterations=num_iterations)
    num_outputs = votes.shape[1]
    couplings = jnp.full_like(votes[..., 0], 1 / num_outputs)
    centers = reduce(votes, "i o h -> o h", "sum") / num_outputs
    for _ in range(num_iterations - 1):
        couplings = jax.nn.softmax(jnp.einsum("ioh,oh->io", direction(votes), direction(centers)), axis=1)
        centers = jnp.einsum("io,ioh->oh", couplings, votes)
    poses = squash(centers)
    return Routed(poses, capsule_norm(poses), couplings)
