"""EM routing: a mixture of Gaussians fitted to the votes; see `capsnet_jax.routing.em`."""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Normal
from torch.nn import functional

from capsnet_torch.capsules import Routed
from capsnet_torch.routing.arguments import check_arguments, learns

over_outputs = partial(torch.softmax, dim=-1)


@learns(beta_u="o", beta_a="o")
def em(
    votes: Float[Tensor, "b *positions i o h"],
    activations: Float[Tensor, "b *positions i"],
    *,
    num_iterations: int = 3,
    beta_u: Float[Tensor, " o"] | float = 0.0,
    beta_a: Float[Tensor, " o"] | float = 0.0,
    inverse_temperature: float = 10.0,
    annealing: float = 0.95,
    min_variance: float = 0.01,
    epsilon: float = 1e-7,
    softmax: Callable[[Float[Tensor, "b *positions i o"]], Float[Tensor, "b *positions i o"]] = over_outputs,
) -> Routed:
    """Fit Gaussians to the votes, in the order of the paper: M step, E step, M step ...

    Args:
        votes: votes; in a convolutional layer, with an axis of positions.
        activations: activations of the input capsules, in [0, 1].
        num_iterations: number of M steps.
        beta_u: cost of describing a vote.
        beta_a: cost saved by an active capsule.
        inverse_temperature: final lambda.
        annealing: rate at which lambda approaches its final value; the smaller, the faster.
        min_variance: added to the variances.
        epsilon: added to the total share of a Gaussian in denominators.
        softmax: softmax over all output capsules that an input capsule is connected to.

    References:
        Hinton, Sabour, Frosst, "Matrix Capsules with EM Routing" (2018), procedure 1.
    """
    check_arguments("em", num_iterations=num_iterations)
    beta_u, beta_a = (torch.as_tensor(beta, dtype=votes.dtype, device=votes.device) for beta in (beta_u, beta_a))
    num_inputs, num_outputs = votes.shape[-3:-1]
    couplings = softmax(torch.zeros_like(votes[..., 0]))
    for iteration in range(num_iterations):
        # M step
        shares = couplings * activations[..., None]
        mass = shares.sum(dim=-2)[..., None]
        means = torch.einsum("...io,...ioh->...oh", shares, votes) / (mass + epsilon)
        deviations = votes - means[..., None, :, :]
        variances = torch.einsum("...io,...ioh->...oh", shares, deviations**2) / (mass + epsilon) + min_variance
        # Validation would read values, which do not exist during export.
        gaussians = Normal(means[..., None, :, :], variances.sqrt()[..., None, :, :], validate_args=False)
        costs = (beta_u[..., None] + variances.sqrt().log()) * mass * num_outputs / num_inputs
        temperature = inverse_temperature * (1 - annealing ** (iteration + 1))
        gains = temperature * (beta_a - costs.sum(dim=-1))
        # E step
        if iteration < num_iterations - 1:
            couplings = softmax(functional.logsigmoid(gains)[..., None, :] + gaussians.log_prob(votes).sum(dim=-1))
    return Routed(means, torch.sigmoid(gains), couplings)
