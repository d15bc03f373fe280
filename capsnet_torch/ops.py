"""Norms, squash, labels and standardization; see `capsnet_jax.ops`."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Images = Float[Tensor, "b channels height width"]
Labels = Int[Tensor, " b"] | Int[Tensor, "b k"]


def capsule_norm(poses: Float[Tensor, "*capsules h"]) -> Float[Tensor, "*capsules"]:
    """Euclidean norm of each pose; PyTorch defines its gradient at zero as zero."""
    return torch.linalg.vector_norm(poses, dim=-1)


def squash(poses: Float[Tensor, "*capsules h"]) -> Float[Tensor, "*capsules h"]:
    """Shrink each pose to a norm in [0, 1) and keep its direction: |s| / (1 + |s|^2) s.

    References:
        Sabour, Frosst, Hinton, "Dynamic Routing Between Capsules" (2017), eq. 1. https://arxiv.org/abs/1710.09829
    """
    norm = capsule_norm(poses)[..., None]
    return norm / (1 + norm**2) * poses


def direction(poses: Float[Tensor, "*capsules h"]) -> Float[Tensor, "*capsules h"]:
    """Divide each pose by its norm; a pose of zero stays zero, with gradient zero."""
    norm = capsule_norm(poses)[..., None]
    # Both branches of `where` are differentiated: the quotient by zero would give NaN times zero.
    return torch.where(norm > 0, poses / torch.where(norm > 0, norm, 1), 0)


def exponential_squash(poses: Float[Tensor, "*capsules h"]) -> Float[Tensor, "*capsules h"]:
    """Shrink each pose to a norm in [0, 1) and keep its direction: (1 - exp(-|s|)) s / |s|.

    References:
        Mazzia, Salvetti, Chiaberge, "Efficient-CapsNet" (2021), section 3. https://arxiv.org/abs/2101.12491
    """
    return -torch.expm1(-capsule_norm(poses)[..., None]) * direction(poses)


def standardize_images(images: Images) -> Images:
    """Shift and scale each image to mean 0 and standard deviation 1; see `capsnet_jax.ops.standardize_images`."""
    variance, mean = torch.var_mean(images, dim=(1, 2, 3), correction=0, keepdim=True)
    return (images - mean) * variance.clamp(min=1 / images[0].numel()).rsqrt()


def is_label(labels: Labels, num_classes: int) -> Bool[Tensor, "b o"]:
    """Return which classes are among the labels of each example."""
    classes = torch.arange(num_classes, device=labels.device)
    return (labels.view(labels.shape[0], -1, 1) == classes).any(dim=1)


def mask_by_label(poses: Float[Tensor, "b o h"], labels: Labels) -> Float[Tensor, "b o h"]:
    """Set all capsules to zero except those of the labels."""
    return torch.where(is_label(labels, poses.shape[1])[..., None], poses, torch.zeros_like(poses))


def answers_right(activations: Float[Tensor, "b o"], labels: Labels) -> Bool[Tensor, " b"]:
    """Return for each example whether its k most active capsules are exactly those of its k labels."""
    labels = labels.view(len(labels), -1)
    ranking = activations.argsort(dim=1, descending=True, stable=True)
    return (ranking[:, : labels.shape[1]].sort(dim=1).values == labels.sort(dim=1).values).all(dim=1)
