"""What capsule networks minimise."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

Images = Float[Tensor, "b channels height width"]


def margin_loss(
    activations: Float[Tensor, "b o"],
    labels: Int[Tensor, " b"],
    *,
    present: float = 0.9,
    absent: float = 0.1,
    absent_weight: float = 0.5,
) -> Float[Tensor, " b"]:
    """Wants the capsule of the label longer than one margin, and all others shorter than another.

    References:
        Sabour, Frosst, Hinton, "Dynamic Routing Between Capsules" (2017), eq. 4. https://arxiv.org/abs/1710.09829
    """
    is_label = labels[:, None] == torch.arange(activations.shape[1], device=activations.device)
    too_short = torch.clamp(present - activations, min=0) ** 2
    too_long = torch.clamp(activations - absent, min=0) ** 2
    return torch.where(is_label, too_short, absent_weight * too_long).sum(dim=1)


def reconstruction_loss(reconstructions: Images, images: Images) -> Float[Tensor, " b"]:
    """Squared error of each example, as a mean over its pixels and channels."""
    return ((reconstructions - images) ** 2).flatten(1).mean(dim=1)
