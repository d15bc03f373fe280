"""One plain training step."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from capsnet_torch.losses import margin_loss, reconstruction_loss
from capsnet_torch.model import CapsNet


class Losses(NamedTuple):
    """The loss that training minimises, and its parts; each a mean over the batch."""

    total: Float[Tensor, ""]
    margin: Float[Tensor, ""]
    reconstruction: Float[Tensor, ""]


def compute_losses(
    model: CapsNet,
    images: Float[Tensor, "b channels height width"],
    labels: Int[Tensor, " b"],
    *,
    reconstruction_weight: float,
) -> Losses:
    """The losses of a batch of images in [0, 1]."""
    capsules = model.encode(images)
    margin = margin_loss(capsules.activations, labels).mean()
    reconstruction = reconstruction_loss(model.decode(capsules.poses, labels), images).mean()
    return Losses(margin + reconstruction_weight * reconstruction, margin, reconstruction)


def train_step(
    model: CapsNet,
    optimizer: torch.optim.Optimizer,
    images: Float[Tensor, "b channels height width"],
    labels: Int[Tensor, " b"],
    *,
    reconstruction_weight: float,
) -> Losses:
    """Changes the weights by one step of the optimizer; returns the losses before it."""
    losses = compute_losses(model, images, labels, reconstruction_weight=reconstruction_weight)
    optimizer.zero_grad(set_to_none=True)
    losses.total.backward()
    optimizer.step()
    return losses
