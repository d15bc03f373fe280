"""Losses of capsule networks; see `capsnet_jax.nn.losses`."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from capsnet_torch.ops import Images, Labels, is_label


def margin_loss(
    activations: Float[Tensor, "b o"],
    labels: Labels,
    *,
    present: float = 0.9,
    absent: float = 0.1,
    absent_weight: float = 0.5,
) -> Float[Tensor, " b"]:
    """Margin loss: penalize capsules of labels below one margin, and all others above another.

    References:
        Sabour, Frosst, Hinton, "Dynamic Routing Between Capsules" (2017), eq. 4. https://arxiv.org/abs/1710.09829
    """
    too_short = torch.clamp(present - activations, min=0) ** 2
    too_long = torch.clamp(activations - absent, min=0) ** 2
    return torch.where(is_label(labels, activations.shape[1]), too_short, absent_weight * too_long).sum(dim=1)


def spread_loss(activations: Float[Tensor, "b o"], labels: Labels, *, margin: float = 0.9) -> Float[Tensor, " b"]:
    """Spread loss: penalize every capsule whose activation is less than a margin below the label's activation.

    References:
        Hinton, Sabour, Frosst, "Matrix Capsules with EM Routing" (2018), eq. 3.
    """
    if labels.dim() > 1:
        raise ValueError(f"The spread loss is defined for one label for each image, not for {labels.shape[1]}.")
    too_close = torch.clamp(margin - (activations.gather(1, labels[:, None]) - activations), min=0) ** 2
    return too_close.scatter(1, labels[:, None], 0).sum(dim=1)


def spread_margin(step: int) -> float:
    """Margin of the spread loss in a training step, from 0.2 up to 0.99."""
    return 0.2 + 0.79 / (1 + math.exp(-min(10, step / 50000 - 4)))


def reconstruction_loss(reconstructions: Images, images: Images, *, error: str = "mean") -> Float[Tensor, " b"]:
    """Squared error of each example: the "mean" over pixels and channels, or the "sum"."""
    squares = ((reconstructions - images) ** 2).flatten(1)
    return squares.sum(dim=1) if error == "sum" else squares.mean(dim=1)
