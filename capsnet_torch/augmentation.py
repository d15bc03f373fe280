"""Augmentation of training images on their device; see `capsnet_jax.data.augmentation`."""

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn.functional import pad

from capsnet_torch.ops import Images


def to_unit_range(images: UInt8[Tensor, "b channels height width"]) -> Images:
    """Convert images of bytes to floats in [0, 1]."""
    return images / 255


def random_shift(images: Images, *, fraction: float) -> Images:
    """Shift each image by whole pixels, up to a fraction of its height and width, and fill with zeros."""
    count, _, height, width = images.shape
    vertical, horizontal = round(fraction * height), round(fraction * width)
    random = 2 * fraction * torch.rand(2, count, 1, device=images.device) - fraction
    rows = torch.arange(height, device=images.device) + vertical - torch.round(random[0] * height).long()
    columns = torch.arange(width, device=images.device) + horizontal - torch.round(random[1] * width).long()
    padded = pad(images, (horizontal, horizontal, vertical, vertical))
    numbers = torch.arange(count, device=images.device)
    shifted = padded[numbers[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return shifted.permute(0, 3, 1, 2)
