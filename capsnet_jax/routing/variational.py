"""Variational Bayes routing: EM routing with priors on the parameters of the Gaussians."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from jax.scipy.special import digamma
from jaxtyping import Array, Float

from capsnet_jax.capsules import Routed
from capsnet_jax.ops import standardize
from capsnet_jax.routing.arguments import check_arguments, learns


@learns(gain="o", beta="o")
def variational(
    votes: Float[Array, "*positions i o h"],
    activations: Float[Array, "*positions i"],
    *,
    num_iterations: int = 3,
    gain: Float[Array, " o"] | float = 1.0,
    beta: Float[Array, " o"] | float = 0.0,
    alpha0: float = 1.0,
    kappa0: float = 1.0,
    psi0: float = 10.0,
    epsilon: float = 1e-7,
    norm_epsilon: float = 1e-5,
    softmax: Callable[[Float[Array, "*positions i o"]], Float[Array, "*positions i o"]] = jax.nn.softmax,
) -> Routed:
    r"""Variational Bayes routing: a mixture of Gaussians with priors, so that no variance collapses onto a single vote.

    Parameters, with $r_{io} = 1 / O$ initially, $\nu_0 = h + 1$ and a prior mean of zero:

    $$R_o = \sum_i a_i r_{io}, \quad \alpha_o = \alpha_0 + R_o, \quad \kappa_o = \kappa_0 + R_o, \quad
      \nu_o = \nu_0 + R_o, \quad \bar u_o = \frac{1}{R_o} \sum_i a_i r_{io} u_{io}, \quad
      m_o = \frac{R_o}{\kappa_o} \bar u_o$$

    $$\psi^{-1}_{oh} = \psi_0 + \sum_i a_i r_{io} (u_{ioh} - \bar u_{oh})^2
      + \frac{\kappa_0 R_o}{\kappa_o} \bar u_{oh}^2$$

    Assignments, with $\Psi$ the digamma function:

    $$E_o = \Psi(\alpha_o) - \Psi\Bigl(\sum_k \alpha_k\Bigr), \quad
      L_o = \sum_{d=0}^{h-1} \Psi\Bigl(\frac{\nu_o - d}{2}\Bigr) + h \ln 2 + \sum_h \ln \psi_{oh}$$

    $$r_{io} = \mathrm{softmax}_o \Bigl(E_o + \tfrac12 L_o - \tfrac12 \bigl(\frac{h}{\kappa_o}
      + \nu_o \sum_h \psi_{oh} (u_{ioh} - m_{oh})^2\bigr)\Bigr)$$

    After the last iteration, activations compare entropies: the lower the entropy of a Gaussian, the more active it is.

    $$a_o = \mathrm{sigmoid}\Bigl(\gamma_o \mathrm{LN}_o \bigl(-e^{E_o}
      (\tfrac{h}{2} \ln 2 \pi e - \tfrac12 L_o)\bigr) + \beta_o\Bigr)$$

    where LN subtracts the mean over the output capsules and divides by the standard deviation.

    In a convolutional layer, all of this holds at each position, except the softmax, which spans all parents of an
    input capsule. As in the authors' code, they do not compete before the second iteration.

    Args:
        votes: $u_{io}$ of one example; in a convolutional layer, with a leading axis of output positions.
        activations: $a_i$ of the input capsules, in [0, 1].
        num_iterations: number of times the parameters are computed.
        gain: learned $\gamma_o$.
        beta: learned $\beta_o$.
        alpha0: prior of the mixing proportions.
        kappa0: weight of the prior mean, as a number of votes.
        psi0: prior of the inverse scale. The larger it is compared with the squared votes, the softer the assignments.
            The authors use 1, and batch normalization.
        epsilon: added to $R_o$ in denominators.
        norm_epsilon: added to the variance in LN.
        softmax: softmax over the parents of each input capsule. The default, over the last axis, is for dense layers;
            convolutional layers pass one that spans output positions.

    Returns:
        The posterior means $m$ as poses, the activations, and the couplings $r$ of the last iteration.

    Raises:
        UsageError: votes or activations have a wrong shape, or `num_iterations` is less than 1.

    References:
        Ribeiro, Leontidis, Kollias, "Capsule Routing via Variational Bayes" (2020), algorithm 1, with diagonal
        precision matrices. https://arxiv.org/abs/1905.11455
        The authors' code, https://github.com/fabio-deep/Variational-Capsule-Routing, at commit 78fb69d: it clamps the
        denominator of the softmax to at least 1e-11, and batch-normalizes means and activations, which couples the
        examples of a batch. LN replaces the normalization of activations; without it, all activations stay close to
        each other and training is slow. The code has $E_o$ in the numerator of the softmax, and positions that compete,
        at commit 9908079 and later ones; commits 826f731 and 1482128 have neither.
    """
    check_arguments("variational", votes, activations, num_iterations=num_iterations, positions=1)
    num_outputs, size = votes.shape[-2:]
    couplings = jnp.full_like(votes[..., 0], 1 / num_outputs)
    for iteration in range(1, num_iterations + 1):
        # parameters
        shares = couplings * rearrange(activations, "... i -> ... i 1")
        mass = rearrange(reduce(shares, "... i o -> ... o", "sum"), "... o -> ... o 1")
        alpha, kappa, nu = alpha0 + mass, kappa0 + mass, size + 1 + mass
        mean_votes = jnp.einsum("...io,...ioh->...oh", shares, votes) / (mass + epsilon)
        means = mass / kappa * mean_votes
        deviations = votes - rearrange(mean_votes, "... o h -> ... 1 o h")
        scatter = jnp.einsum("...io,...ioh->...oh", shares, jnp.square(deviations))
        inverse_psi = psi0 + scatter + kappa0 * mass / kappa * jnp.square(mean_votes)
        # their expectations under the posterior
        log_share = (digamma(alpha) - digamma(alpha.sum(axis=-2, keepdims=True)))[..., 0]
        log_precision = (
            reduce(digamma((nu - jnp.arange(size)) / 2), "... o h -> ... o", "sum")
            + size * math.log(2)
            - reduce(jnp.log(inverse_psi), "... o h -> ... o", "sum")
        )
        if iteration == num_iterations:
            break
        # assignments
        squares = jnp.square(votes - rearrange(means, "... o h -> ... 1 o h"))
        distances = reduce(squares / rearrange(inverse_psi, "... o h -> ... 1 o h"), "... i o h -> ... i o", "sum")
        expected = size / rearrange(kappa, "... o 1 -> ... 1 o") + rearrange(nu, "... o 1 -> ... 1 o") * distances
        prior = rearrange(log_share + 0.5 * log_precision, "... o -> ... 1 o")
        couplings = softmax(prior - 0.5 * expected)
    entropy = 0.5 * size * math.log(2 * math.pi * math.e) - 0.5 * log_precision
    certainty = standardize(-jnp.exp(log_share) * entropy, epsilon=norm_epsilon)
    return Routed(means, jax.nn.sigmoid(gain * certainty + beta), couplings)
