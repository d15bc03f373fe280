"""Variational Bayes routing: EM routing with priors on the parameters of the Gaussians."""

import math

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
    votes: Float[Array, "i o h"],
    activations: Float[Array, " i"],
    *,
    num_iterations: int = 3,
    gain: Float[Array, " o"] | float = 1.0,
    beta: Float[Array, " o"] | float = 0.0,
    alpha0: float = 1.0,
    kappa0: float = 1.0,
    psi0: float = 10.0,
    epsilon: float = 1e-7,
    norm_epsilon: float = 1e-5,
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

    Args:
        votes: $u_{io}$ of one example.
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

    Returns:
        The posterior means $m$ as poses, the activations, and the couplings $r$ of the last iteration.

    Raises:
        UsageError: votes or activations have a wrong shape, or `num_iterations` is less than 1.

    References:
        Ribeiro, Leontidis, Kollias, "Capsule Routing via Variational Bayes" (2020), algorithm 1, with diagonal
        precision matrices. https://arxiv.org/abs/1905.11455
        The authors' code, https://github.com/fabio-deep/Variational-Capsule-Routing, leaves $E_o$ out of the numerator
        of the softmax, and batch-normalizes means and activations, which couples the examples of a batch. LN replaces
        the normalization of activations; without it, all activations stay close to each other and training is slow.
    """
    check_arguments("variational", votes, activations, num_iterations=num_iterations)
    num_outputs, size = votes.shape[1:]
    couplings = jnp.full_like(votes[..., 0], 1 / num_outputs)
    for iteration in range(1, num_iterations + 1):
        # parameters
        shares = couplings * activations[:, None]
        mass = shares.sum(axis=0)[:, None]
        alpha, kappa, nu = alpha0 + mass, kappa0 + mass, size + 1 + mass
        mean_votes = jnp.einsum("io,ioh->oh", shares, votes) / (mass + epsilon)
        means = mass / kappa * mean_votes
        scatter = jnp.einsum("io,ioh->oh", shares, jnp.square(votes - mean_votes))
        inverse_psi = psi0 + scatter + kappa0 * mass / kappa * jnp.square(mean_votes)
        # their expectations under the posterior
        log_share = (digamma(alpha) - digamma(alpha.sum()))[:, 0]
        log_precision = (
            reduce(digamma((nu - jnp.arange(size)) / 2), "o h -> o", "sum")
            + size * math.log(2)
            - reduce(jnp.log(inverse_psi), "o h -> o", "sum")
        )
        if iteration == num_iterations:
            break
        # assignments
        distances = reduce(jnp.square(votes - means) / inverse_psi, "i o h -> i o", "sum")
        expected = size / rearrange(kappa, "o 1 -> o") + rearrange(nu, "o 1 -> o") * distances
        couplings = jax.nn.softmax(log_share + 0.5 * log_precision - 0.5 * expected, axis=1)
    entropy = 0.5 * size * math.log(2 * math.pi * math.e) - 0.5 * log_precision
    certainty = standardize(-jnp.exp(log_share) * entropy, epsilon=norm_epsilon)
    return Routed(means, jax.nn.sigmoid(gain * certainty + beta), couplings)
