"""The few functions every capsule network is made of."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def capsule_norm(poses: Float[Tensor, "*capsules h"]) -> Float[Tensor, "*capsules"]:
    """Euclidean norm of each pose; PyTorch defines its gradient at zero as zero."""
    return torch.linalg.vector_norm(poses, dim=-1)


def squash(poses: Float[Tensor, "*capsules h"]) -> Float[Tensor, "*capsules h"]:
    """Shrinks each pose to a norm in [0, 1) and keeps its direction: |s| / (1 + |s|^2) s.

    References:
        Sabour, Frosst, Hinton, "Dynamic Routing Between Capsules" (2017), eq. 1. https://arxiv.org/abs/1710.09829
    """
    norm = capsule_norm(poses)[..., None]
    return norm / (1 + norm**2) * poses


def direction(poses: Float[Tensor, "*capsules h"]) -> Float[Tensor, "*capsules h"]:
    """Each pose divided by its length; a pose of zero stays zero, with gradient zero."""
    norm = capsule_norm(poses)[..., None]
    # Both branches of `where` are differentiated: the quotient by zero would give NaN times zero.
    return torch.where(norm > 0, poses / torch.where(norm > 0, norm, 1), 0)


def exponential_squash(poses: Float[Tensor, "*capsules h"]) -> Float[Tensor, "*capsules h"]:
    """Shrinks each pose to a norm in [0, 1) and keeps its direction: (1 - exp(-|s|)) s / |s|.

    References:
        Mazzia, Salvetti, Chiaberge, "Efficient-CapsNet" (2021), section 3. https://arxiv.org/abs/2101.12491
    """
    return -torch.expm1(-capsule_norm(poses)[..., None]) * direction(poses)


def mask_by_label(poses: Float[Tensor, "b o h"], labels: Int[Tensor, " b"]) -> Float[Tensor, "b o h"]:
    """Sets all capsules to zero but the one of the label."""
    classes = torch.arange(poses.shape[1], device=poses.device)
    return torch.where((labels[:, None] == classes)[..., None], poses, torch.zeros_like(poses))
