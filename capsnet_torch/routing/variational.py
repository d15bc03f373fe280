"""Variational Bayes routing; see `capsnet_jax.routing.variational`."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from capsnet_torch.capsules import Routed
from capsnet_torch.routing.arguments import check_arguments, learns
from capsnet_torch.routing.em import over_outputs


@learns(gain="o", beta="o")
def variational(
    votes: Float[Tensor, "b *positions i o h"],
    activations: Float[Tensor, "b *positions i"],
    *,
    num_iterations: int = 3,
    gain: Float[Tensor, " o"] | float = 1.0,
    beta: Float[Tensor, " o"] | float = 0.0,
    alpha0: float = 1.0,
    kappa0: float = 1.0,
    psi0: float = 10.0,
    epsilon: float = 1e-7,
    norm_epsilon: float = 1e-5,
    softmax: Callable[[Float[Tensor, "b *positions i o"]], Float[Tensor, "b *positions i o"]] = over_outputs,
) -> Routed:
    """Fit Gaussians with priors to the votes, with the paper's Wishart scale matrices Psi `[b *positions o h h]`.

    Their inverses are diagonal. `capsnet_jax` makes use of this; here, the full matrices are computed. Only `softmax`
    spans positions.

    References:
        Ribeiro, Leontidis, Kollias, "Capsule Routing via Variational Bayes" (2020), algorithm 1, with diagonal
        precision matrices. https://arxiv.org/abs/1905.11455
    """
    # axes: b = batch, i = input capsules, o = output capsules, h and k = components of a pose
    check_arguments("variational", num_iterations=num_iterations)
    num_outputs, size = votes.shape[-2:]
    couplings = torch.full_like(votes[..., 0], 1 / num_outputs)
    for iteration in range(num_iterations):
        # parameters
        shares = activations[..., None] * couplings
        mass = shares.sum(dim=-2)
        alpha, kappa, nu = alpha0 + mass, kappa0 + mass, size + 1 + mass
        centers = torch.einsum("...io,...ioh->...oh", shares, votes) / (mass + epsilon)[..., None]
        means = (mass / kappa)[..., None] * centers
        deviations = votes - centers[..., None, :, :]
        spread = torch.einsum("...io,...ioh->...oh", shares, deviations**2)
        shrunk = torch.einsum("...o,...oh->...oh", kappa0 * mass / kappa, centers**2)
        scales = torch.diag_embed(1 / (psi0 + spread + shrunk))
        # assignments
        log_share = _digamma(alpha) - _digamma(alpha.sum(dim=-1, keepdim=True))
        log_precision = torch.logdet(scales) + size * math.log(2)
        for d in range(size):
            log_precision = log_precision + _digamma((nu - d) / 2)
        if iteration < num_iterations - 1:
            errors = votes - means[..., None, :, :]
            distances = torch.einsum("...ioh,...ohk,...iok->...io", errors, scales, errors)
            expected = size / kappa[..., None, :] + nu[..., None, :] * distances
            couplings = softmax((log_share + log_precision / 2)[..., None, :] - expected / 2)
    entropy = size / 2 * math.log(2 * math.pi * math.e) - log_precision / 2
    certainty = functional.layer_norm(-torch.exp(log_share) * entropy, (num_outputs,), eps=norm_epsilon)
    return Routed(means, torch.sigmoid(gain * certainty + beta), couplings)


def _digamma(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    # By the recurrence psi(x) = psi(x + 1) - 1 / x: PyTorch's derivative of digamma is an asymptotic series, with a
    # relative error of 5e-10 near 1, and 2e-14 beyond 16.
    return torch.digamma(x + 16) - sum(1 / (x + k) for k in range(16))
