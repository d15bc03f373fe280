"""One training step; see `capsnet_jax.train.step`."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from capsnet_torch.losses import margin_loss, reconstruction_loss, spread_loss, spread_margin
from capsnet_torch.model import CapsNet
from capsnet_torch.ops import Images, Labels


class Losses(NamedTuple):
    """The loss that training minimizes, and its parts; each a mean over the batch."""

    total: Float[Tensor, ""]
    margin: Float[Tensor, ""]
    reconstruction: Float[Tensor, ""]


def compute_losses(
    model: CapsNet,
    images: Images,
    labels: Labels,
    *,
    reconstruction_weight: float,
    reconstruction_error: str = "mean",
    loss: str = "margin",
    step: int = 0,
) -> Losses:
    """Compute the losses of a batch of images in [0, 1]."""
    capsules = model.encode(images)
    if loss == "spread":
        margin = spread_loss(capsules.activations, labels, margin=spread_margin(step)).mean()
    else:
        margin = margin_loss(capsules.activations, labels).mean()
    if reconstruction_weight == 0:
        return Losses(margin, margin, torch.zeros_like(margin))
    reconstructions = model.decode(capsules.poses, labels)
    reconstruction = reconstruction_loss(reconstructions, images, error=reconstruction_error).mean()
    return Losses(margin + reconstruction_weight * reconstruction, margin, reconstruction)


def train_step(
    model: CapsNet, optimizer: torch.optim.Optimizer, images: Images, labels: Labels, **options: Any
) -> Losses:
    """Update the weights by one optimizer step; return the losses before it. Takes the options of `compute_losses`."""
    losses = compute_losses(model, images, labels, **options)
    optimizer.zero_grad(set_to_none=True)
    losses.total.backward()
    optimizer.step()
    return losses
