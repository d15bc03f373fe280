"""Self-attention routing of Efficient-CapsNet, which does not iterate."""

import jax
import jax.numpy as jnp
from einops import reduce
from jaxtyping import Array, Float

from capsnet_jax.capsules import Routed
from capsnet_jax.ops import capsule_norm, exponential_squash
from capsnet_jax.routing.arguments import check_arguments, learns


@learns(prior="i o")
def self_attention(
    votes: Float[Array, "i o h"], activations: Float[Array, " i"], *, prior: Float[Array, "i o"] | float = 0.0
) -> Routed:
    r"""Self-attention routing: an input capsule sends more where its vote agrees with the votes of all input capsules.

    $$a_{io} = \frac{1}{\sqrt h} u_{io} \cdot \sum_k u_{ko}, \quad
      c_{io} = \mathrm{softmax}_o(a_{io}) + B_{io}, \quad
      v_o = \mathrm{squash}\Bigl(\sum_i c_{io} u_{io}\Bigr)$$

    with $\mathrm{squash}(s) = (1 - e^{-\|s\|}) s / \|s\|$. Summing over k first avoids the matrix of all pairs of votes
    whose rows the paper sums.

    Args:
        votes: $u_{io}$ of one example.
        activations: not used.
        prior: $B_{io}$, learned and added to the couplings.

    Returns:
        The squashed output capsules, their norms as activations, and the couplings $c$, which sum to 1 plus the prior.

    Raises:
        UsageError: votes or activations have a wrong shape.

    References:
        Mazzia, Salvetti, Chiaberge, "Efficient-CapsNet: Capsule Network with Self-Attention Routing" (2021),
        section 3.2. https://arxiv.org/abs/2101.12491
    """
    check_arguments("self_attention", votes, activations)
    # Scale before the product: XLA may round a scaled product differently in the two places where the softmax reads it,
    # and large logits then overflow.
    total = reduce(votes, "i o h -> o h", "sum") / votes.shape[-1] ** 0.5
    attention = jnp.einsum("ioh,oh->io", votes, total)
    couplings = jax.nn.softmax(attention, axis=1) + prior
    poses = exponential_squash(jnp.einsum("io,ioh->oh", couplings, votes))
    return Routed(poses, capsule_norm(poses), couplings)
