"""What capsule networks minimise."""

import jax
import jax.numpy as jnp
from einops import reduce
from jaxtyping import Array, Float, Int

Images = Float[Array, "b height width channels"]


def margin_loss(
    activations: Float[Array, "b o"],
    labels: Int[Array, " b"],
    *,
    present: float = 0.9,
    absent: float = 0.1,
    absent_weight: float = 0.5,
) -> Float[Array, " b"]:
    r"""Wants the capsule of the label longer than one margin, and all others shorter than another.

    $$\sum_o T_o \max(0, m^+ - a_o)^2 + \lambda (1 - T_o) \max(0, a_o - m^-)^2$$

    Args:
        activations: $a_o$, in [0, 1].
        labels: class indices in [0, o); $T_o$ is 1 for the label and 0 elsewhere.
        present: $m^+$, the margin of the label's capsule.
        absent: $m^-$, the margin of all others.
        absent_weight: $\lambda$, the weight of the others.

    Returns:
        The loss of each example, summed over classes.

    References:
        Sabour, Frosst, Hinton, "Dynamic Routing Between Capsules" (2017), eq. 4. https://arxiv.org/abs/1710.09829
    """
    targets = jax.nn.one_hot(labels, activations.shape[1], dtype=activations.dtype)
    too_short = jnp.square(jax.nn.relu(present - activations))
    too_long = jnp.square(jax.nn.relu(activations - absent))
    return reduce(targets * too_short + absent_weight * (1 - targets) * too_long, "b o -> b", "sum")


def reconstruction_loss(reconstructions: Images, images: Images) -> Float[Array, " b"]:
    """Squared error of each example, as a mean over its pixels and channels."""
    return reduce(jnp.square(reconstructions - images), "b height width channels -> b", "mean")
