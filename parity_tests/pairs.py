"""Pairs of the small model, with weights as they are drawn, which are not made hot."""

from dataclasses import replace
from typing import Any

from capsnet_jax.config import TrainingConfig
from capsnet_verify.pair import Pair, new_pair
from capsnet_verify.subjects import SMALL, SMALL_CLASSES, SMALL_IMAGES


def make_pair(
    dtype: str,
    *,
    image_shape: tuple[int, int, int] = SMALL_IMAGES,
    num_classes: int = SMALL_CLASSES,
    batch_size: int = 3,
    labels_per_image: int = 1,
    **options: Any,
) -> Pair:
    """The small model with these options, in both frameworks."""
    return new_pair(
        dtype,
        replace(SMALL, **options | {"image_shape": image_shape, "num_classes": num_classes}),
        TrainingConfig(),
        labels_per_image=labels_per_image,
        batch_size=batch_size,
    )
