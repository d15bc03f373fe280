"""EM routing: a mixture of Gaussians, one per output capsule, fitted to the votes."""

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
    r"""EM routing: output capsules are Gaussians fitted to the votes, active where they describe them cheaply.

    M step in iteration $t = 1, 2, \dots$, with $r_{io} = 1 / O$ initially and
    $\lambda_t = \lambda (1 - \mathrm{annealing}^t)$:

    $$R_o = \sum_i a_i r_{io}, \quad
      \mu_{oh} = \frac{1}{R_o} \sum_i a_i r_{io} u_{ioh}, \quad
      \sigma^2_{oh} = \frac{1}{R_o} \sum_i a_i r_{io} (u_{ioh} - \mu_{oh})^2$$

    $$a_o = \mathrm{sigmoid}\Bigl(\lambda_t
      \bigl(\beta_a - \tfrac{O}{I} \sum_h (\beta_u + \ln \sigma_{oh}) R_o\bigr)\Bigr)$$

    The factor $O / I$ is not in the paper. It is the inverse of the number of votes per output capsule of a dense
    layer, and makes the same $\lambda$ and $\beta_a$ suit dense layers of any size.

    E step, between two M steps:

    $$r_{io} = \mathrm{softmax}_o \Bigl(\ln a_o - \sum_h \bigl(\tfrac12 \ln 2 \pi \sigma^2_{oh}
      + \frac{(u_{ioh} - \mu_{oh})^2}{2 \sigma^2_{oh}}\bigr)\Bigr)$$

    Args:
        votes: $u_{io}$ of one example; in a convolutional layer, with a leading axis of output positions.
        activations: $a_i$ of the input capsules, in [0, 1].
        num_iterations: number of M steps.
        beta_u: learned $\beta_u$, the constant part of the cost of a vote.
        beta_a: learned $\beta_a$, the cost at which a capsule has activation 0.5.
        inverse_temperature: final $\lambda$; see below for that of the authors' code.
        annealing: rate at which the inverse temperature approaches its final value; 0.95 in the authors' code.
        min_variance: added to $\sigma^2$. If it is small compared with the squared votes, a Gaussian collapses onto few
            votes; networks with several layers need about a tenth of the squared votes. The authors' code uses 0.0005.
        epsilon: added to $R_o$ in denominators.
        softmax: softmax over the parents of each input capsule. The default, over the last axis, is for dense layers;
            convolutional layers pass one that spans output positions.

    Returns:
        The means as poses, the activations, and the couplings $r$ of the last M step.

    Raises:
        UsageError: votes or activations have a wrong shape, or `num_iterations` is less than 1.

    References:
        Hinton, Sabour, Frosst, "Matrix Capsules with EM Routing" (2018), procedure 1.
        Constants: https://github.com/google-research/google-research/tree/master/capsule_em. Its constants are
        here $\lambda = 2 I / O$ times `final_beta`, $\beta_u = (1 + \ln 2 \pi) / 2$ times `sigma_biases`, and
        $\beta_a = -2500\, O / I$ times `activation_biases`; I counts the input capsules of one output capsule. Unlike
        here, that code moves the means by only 0.9 of the way, and divides `final_beta` of the last layer by 4. In its
        convolutional layers, positions compete for an input capsule, separately for each type of output capsule, and
        types do not compete. Here all parents do, as in https://github.com/IBM/matrix-capsules-with-em-routing.
    """
    check_arguments("em", votes, activations, num_iterations=num_iterations, positions=1)
    num_inputs, num_outputs, size = votes.shape[-3:]
    even_share = num_outputs / num_inputs
    couplings = softmax(jnp.zeros_like(votes[..., 0]))
    # In this order of axes, the sums over votes are products of contiguous matrices.
    votes = rearrange(votes, "... i o h -> ... o i h")
    for iteration in range(1, num_iterations + 1):
        # M step
        shares = rearrange(couplings * rearrange(activations, "... i -> ... i 1"), "... i o -> ... o i")
        mass = reduce(shares, "... o i -> ... o 1", "sum")
        normalized = shares / (mass + epsilon)
        means = jnp.einsum("...oi,...oih->...oh", normalized, votes)
        center = jax.lax.stop_gradient(means)
        squares = jnp.square(votes - rearrange(center, "... o h -> ... o 1 h"))
        variances = jnp.einsum("...oi,...oih->...oh", normalized, squares) + min_variance
        # This is zero. Its gradient is that of the variances with respect to the means, without a sum over all votes.
        variances -= (means - center) * (2 * means - (means + center) * mass / (mass + epsilon))
        log_deviations = 0.5 * jnp.log(variances)
        costs = size * beta_u + reduce(log_deviations, "... o h -> ... o", "sum")
        logits = inverse_temperature * (1 - annealing**iteration) * (beta_a - costs * mass[..., 0] * even_share)
        if iteration == num_iterations:
            break
        # E step
        squares = jnp.square(votes - rearrange(means, "... o h -> ... o 1 h"))
        distances = jnp.einsum("...oih,...oh->...oi", squares, 0.5 / variances)
        constants = reduce(log_deviations + 0.5 * math.log(2 * math.pi), "... o h -> ... o", "sum")
        log_density = -distances - rearrange(constants, "... o -> ... o 1")
        scores = rearrange(jax.nn.log_sigmoid(logits), "... o -> ... o 1") + log_density
        couplings = softmax(rearrange(scores, "... o i -> ... i o"))
    return Routed(means, jax.nn.sigmoid(logits), couplings)
