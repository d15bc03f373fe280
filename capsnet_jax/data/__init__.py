"""Data sets, as arrays."""

from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Shaped

from capsnet_jax.data.idx import IDX_DATASETS, NUM_CLASSES, holds_idx, read_idx_folder
from capsnet_jax.errors import UsageError


class Dataset(NamedTuple):
    """A labelled set of images, all of one shape, in uint8 or as floats in [0, 1]."""

    train_images: Shaped[np.ndarray, "train height width channels"]
    train_labels: Int32[np.ndarray, " train"]
    test_images: Shaped[np.ndarray, "test height width channels"]
    test_labels: Int32[np.ndarray, " test"]
    num_classes: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and number of channels."""
        height, width, channels = self.train_images.shape[1:]
        return height, width, channels

    def limited(self, train_limit: int | None) -> "Dataset":
        """The same with only the first so many training images; None for all.

        Raises:
            UsageError: there are fewer.
        """
        if train_limit is not None and train_limit > len(self.train_images):
            raise UsageError(f"train_limit is {train_limit}, with only {len(self.train_images)} training images.")
        return self._replace(train_images=self.train_images[:train_limit], train_labels=self.train_labels[:train_limit])


def load_dataset(name: str, data_dir: Path | None = None) -> Dataset:
    """A data set by its name.

    Args:
        name: "digits", or what tensorflow-datasets calls the set.
        data_dir: folder of idx files, or of prepared tensorflow-datasets.

    Raises:
        UsageError: the name is unknown, its package is not installed, or a file is missing or wrong.
    """
    if data_dir is not None and not data_dir.is_dir():
        raise UsageError(f"The data folder {data_dir} does not exist.")
    if name == "digits":
        return load_digits()
    if data_dir is not None and holds_idx(data_dir):
        if name not in IDX_DATASETS:
            raise UsageError(
                f"Unknown data set {name!r} for idx files ({data_dir}); expected {', '.join(IDX_DATASETS)}."
            )
        return make_dataset(*read_idx_folder(data_dir), num_classes=NUM_CLASSES)
    from capsnet_jax.data.tfds import load_tfds  # slow to import, and an extra

    arrays, num_classes = load_tfds(name, data_dir)
    return make_dataset(*arrays, num_classes=num_classes)


def load_digits() -> Dataset:
    """1,797 real handwritten digits of 8 x 8, part of scikit-learn; every fifth of each class is for testing."""
    from sklearn.datasets import load_digits  # a second to import, and needed for this set only

    digits = load_digits()
    images = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)
    is_test = np.zeros(len(images), bool)
    for digit in range(10):
        is_test[np.flatnonzero(digits.target == digit)[4::5]] = True
    return make_dataset(
        images[~is_test], digits.target[~is_test], images[is_test], digits.target[is_test], num_classes=10
    )


def make_dataset(
    train_images: np.ndarray,
    train_labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    *,
    num_classes: int,
) -> Dataset:
    """A checked data set of your own arrays.

    Args:
        train_images: images `[images height width channels]` in uint8, or as floats in [0, 1].
        train_labels: class indices.
        test_images: of the same shape and dtype.
        test_labels: class indices.
        num_classes: labels are in [0, num_classes).

    Raises:
        UsageError: shapes, dtypes or counts do not fit, labels are out of range, or images are not in [0, 1].
    """
    for split, images, labels in (("training", train_images, train_labels), ("test", test_images, test_labels)):
        if images.ndim != 4 or images.shape[1:] != train_images.shape[1:]:
            raise UsageError(
                f"The {split} images are {images.shape}; expected [images height width channels], all alike."
            )
        if len(images) == 0 or labels.shape != (len(images),):
            raise UsageError(
                f"There are {labels.shape} {split} labels for {len(images)} images; expected one for each."
            )
        if not np.issubdtype(labels.dtype, np.integer):
            raise UsageError(f"The {split} labels are {labels.dtype}; expected integers.")
        if labels.min() < 0 or labels.max() >= num_classes:
            raise UsageError(
                f"The {split} labels are {labels.min()} to {labels.max()}; expected 0 to {num_classes - 1}."
            )
        is_float = np.issubdtype(images.dtype, np.floating)
        if images.dtype != train_images.dtype or not (is_float or images.dtype == np.uint8):
            raise UsageError(f"The {split} images are {images.dtype}; expected uint8, or floats in [0, 1].")
        if is_float and not (images.min() >= 0 and images.max() <= 1):  # false for NaN, too
            raise UsageError(
                f"The {split} images are from {images.min()} to {images.max()}; expected floats in [0, 1]."
            )
    return Dataset(train_images, train_labels.astype(np.int32), test_images, test_labels.astype(np.int32), num_classes)


def to_unit_range(images: Shaped[Array, "b height width channels"]) -> Float[Array, "b height width channels"]:
    """Images of a data set as floats in [0, 1]."""
    return images / jnp.float32(255) if images.dtype == jnp.uint8 else images
