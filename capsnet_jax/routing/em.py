"""EM routing of matrix capsules: a mixture of Gaussians fitted to the votes."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from jaxtyping import Array, Float

from capsnet_jax.capsules import Routed
from capsnet_jax.routing.arguments import check_arguments, learns


@learns(beta_u="o", beta_a="o")
def em(
    votes: Float[Array, "*positions i o h"],
    activations: Float[Array, "*positions i"],
    *,
    num_iterations: int = 3,
    beta_u: Float[Array, " o"] | float = 0.0,
    beta_a: Float[Array, " o"] | float = 0.0,
    inverse_temperature: float = 10.0,
    annealing: float = 0.95,
    min_variance: float = 0.01,
    epsilon: float = 1e-7,
    softmax: Callable[[Float[Array, "*positions i o"]], Float[Array, "*positions i o"]] = jax.nn.softmax,
) -> Routed:
    r"""Output capsules are Gaussians; each explains the votes that come near to it, and is active if it pays.

    M step, with $r_{io} = 1 / O$ at first, and in iteration $t = 1, 2, \dots$
    $\lambda_t = \lambda (1 - \mathrm{annealing}^t)$:

    $$R_o = \sum_i a_i r_{io}, \quad
      \mu_{oh} = \frac{1}{R_o} \sum_i a_i r_{io} u_{ioh}, \quad
      \sigma^2_{oh} = \frac{1}{R_o} \sum_i a_i r_{io} (u_{ioh} - \mu_{oh})^2$$

    $$a_o = \mathrm{sigmoid}\Bigl(\lambda_t
      \bigl(\beta_a - \tfrac{O}{I} \sum_h (\beta_u + \ln \sigma_{oh}) R_o\bigr)\Bigr)$$

    The paper is without $O / I$, one over the number of votes that an output of a dense layer gets if all are shared
    out evenly. It only sets the units of $\lambda$ and $\beta_a$, so that the same values suit any size of such layers.

    E step, between two M steps:

    $$r_{io} = \mathrm{softmax}_o \Bigl(\ln a_o - \sum_h \bigl(\tfrac12 \ln 2 \pi \sigma^2_{oh}
      + \frac{(u_{ioh} - \mu_{oh})^2}{2 \sigma^2_{oh}}\bigr)\Bigr)$$

    Args:
        votes: $u_{io}$, for one example; in a convolutional layer, for each position of the output.
        activations: $a_i$ of the input capsules, in [0, 1].
        num_iterations: number of M steps.
        beta_u: cost of describing a vote; learned.
        beta_a: gain of not having to describe it otherwise; learned.
        inverse_temperature: $\lambda$, reached after many iterations. The authors' code has 0.01, without $O / I$, and
            multiplies beta_a by 5000.
        annealing: how slowly it is reached; 0.95 in the authors' code.
        min_variance: added to $\sigma^2$. The smaller it is against the squares of the votes, the sooner a Gaussian
            collapses onto the few votes it fits; networks of several layers want about a tenth of them. The authors'
            code has 0.0005.
        epsilon: added to $R_o$ where it divides.
        softmax: shares out each input capsule among its parents; the default, over the last axis, has them all there.
            A convolutional capsule has parents at several positions, which its layer's softmax sees together.

    Returns:
        The means as poses, the activations, and the couplings $r$ of the last M step.

    Raises:
        UsageError: votes or activations are of a wrong shape, or `num_iterations` is less than 1.

    References:
        Hinton, Sabour, Frosst, "Matrix Capsules with EM Routing" (2018), procedure 1.
        Constants: https://github.com/google-research/google-research/tree/master/capsule_em, which also moves the means
        by 0.9 of the way only, and divides the inverse temperature of the last layer by 4; this does not.
    """
    check_arguments("em", votes, activations, num_iterations=num_iterations, positions=1)
    num_inputs, num_outputs, size = votes.shape[-3:]
    even_share = num_outputs / num_inputs
    couplings = softmax(jnp.zeros_like(votes[..., 0]))
    for iteration in range(1, num_iterations + 1):
        # M step
        shares = couplings * rearrange(activations, "... i -> ... i 1")
        mass = reduce(shares, "... i o -> ... o", "sum")
        normalized = rearrange(shares / (rearrange(mass, "... o -> ... 1 o") + epsilon), "... i o -> ... i o 1")
        means = reduce(normalized * votes, "... i o h -> ... o h", "sum")
        squares = jnp.square(votes - rearrange(means, "... o h -> ... 1 o h"))
        variances = reduce(normalized * squares, "... i o h -> ... o h", "sum") + min_variance
        log_deviations = 0.5 * jnp.log(variances)
        costs = size * beta_u + reduce(log_deviations, "... o h -> ... o", "sum")
        logits = inverse_temperature * (1 - annealing**iteration) * (beta_a - costs * mass * even_share)
        if iteration == num_iterations:
            break
        # E step
        distances = squares / rearrange(2 * variances, "... o h -> ... 1 o h")
        log_density = -reduce(distances, "... i o h -> ... i o", "sum") - rearrange(
            reduce(log_deviations + 0.5 * math.log(2 * math.pi), "... o h -> ... o", "sum"), "... o -> ... 1 o"
        )
        couplings = softmax(rearrange(jax.nn.log_sigmoid(logits), "... o -> ... 1 o") + log_density)
    return Routed(means, jax.nn.sigmoid(logits), couplings)
