"""Data sets: built-in ones, idx files, tensorflow-datasets, and your own folders or arrays."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from capsnet_jax.config import DataConfig
from capsnet_jax.data.dataset import Dataset, central_crop, make_dataset
from capsnet_jax.data.idx import IDX_DATASETS, find_idx, load_idx
from capsnet_jax.data.synthetic import SYNTHETIC_DATASETS
from capsnet_jax.errors import UsageError

__all__ = ["BUILT_IN_DATASETS", "Dataset", "central_crop", "configured_dataset", "load_dataset", "make_dataset"]

BUILT_IN_DATASETS = ("digits", *IDX_DATASETS, *SYNTHETIC_DATASETS)


def configured_dataset(data: DataConfig, *, test_only: bool = False) -> Dataset:
    """Load the data set of a config, apply its limit and validation split, but do not crop it.

    Args:
        data: the options.
        test_only: whether to load the test images only, and to apply neither limit nor validation split.

    Raises:
        UsageError: the data set cannot be read, or is too small for limit or validation split.
    """
    dataset = load_dataset(data.dataset, data.data_dir, image_size=data.image_size, test_only=test_only)
    if data.transpose:
        dataset = dataset.transposed()
    return dataset if test_only else dataset.limited(data.train_limit).with_validation(data.validation)


def load_dataset(
    name: str | Path,
    data_dir: str | Path | None = None,
    *,
    image_size: tuple[int, int] | None = None,
    test_only: bool = False,
) -> Dataset:
    """Load a data set by name or path.

    Args:
        name: one of

            - `digits`: 1,797 handwritten digits of 8 x 8 from scikit-learn; every fifth of each class is for testing;
            - `mnist`, `fashion_mnist`, `kmnist`: from idx files in `data_dir`;
            - the prefix of other idx files in `data_dir`, such as `emnist-letters`;
            - `multi_mnist`, `affine_mnist`: overlapping or affine-transformed digits, made from MNIST;
            - the path of a folder with a folder of images for each class, or of an .npz file;
            - the name of any image data set in tensorflow-datasets.

            An existing path takes precedence over a name of tensorflow-datasets, but not over the other names.
        data_dir: folder of idx files, or of prepared tensorflow-datasets.
        image_size: height and width to resize the images of a folder to; None keeps their size.
        test_only: whether to load no training images, which then may be missing. `digits` and the data sets made from
            MNIST always have them.

    Returns:
        Training and test images with their labels and class names.

    Raises:
        UsageError: the name is unknown, its package is not installed, a file is missing or wrong, or `image_size` is
            given for anything but a folder of images.

    Examples:
        >>> from capsnet_jax import load_dataset
        >>> digits = load_dataset("digits")
        >>> digits.train_images.shape, digits.test_images.shape
        ((1442, 8, 8, 1), (355, 8, 8, 1))
        >>> digits.class_names
        ('0', '1', '2', '3', '4', '5', '6', '7', '8', '9')
    """
    name, data_dir = str(name), None if data_dir is None else Path(data_dir)
    if data_dir is not None and not data_dir.is_dir():
        what = "is a file" if data_dir.exists() else "does not exist"
        raise UsageError(f"The data folder {data_dir} {what}; expected the folder of the data set's files.")
    path = existing_path(name)
    if data_dir is not None and (path is not None or name == "digits"):
        raise UsageError(f"data_dir is {data_dir}, but {name} is not read from it; expected no data_dir.")
    if path is not None and path.is_dir():
        from capsnet_jax.data.folder import load_image_folder  # Pillow is needed for this only

        return load_image_folder(path, image_size, test_only=test_only)
    if image_size is not None:
        raise UsageError(f"image_size is {image_size}, but only folders of images are resized; {name} is not one.")
    if path is not None:
        from capsnet_jax.data.npz import load_npz

        return load_npz(path, test_only=test_only)
    if name == "digits":
        return load_digits()
    if name in SYNTHETIC_DATASETS:
        return SYNTHETIC_DATASETS[name](load_dataset("mnist", data_dir))
    if data_dir is not None and (sets := find_idx(data_dir)):
        return load_idx(data_dir, sets, name, test_only=test_only)
    from capsnet_jax.data.tfds import load_tfds  # slow to import, and an extra

    return load_tfds(name, data_dir, test_only=test_only)


def with_absolute_paths(data: DataConfig) -> DataConfig:
    """Make the paths of a configuration absolute, so that it can be read from another working directory.

    Raises:
        UsageError: the data set is a path that does not exist.
    """
    path = existing_path(data.dataset)
    name = data.dataset if path is None else str(path.absolute())
    return replace(data, dataset=name, data_dir=None if data.data_dir is None else data.data_dir.absolute())


def existing_path(name: str) -> Path | None:
    """Find the path that a name stands for; None if it is the name of a data set.

    Raises:
        UsageError: the name looks like a path, which does not exist.
    """
    expanded = os.path.expanduser(name)  # unlike Path.expanduser, no error for an unknown user
    if name in BUILT_IN_DATASETS:
        return None
    if os.path.exists(expanded):  # false for an empty name
        return Path(expanded)
    if name.endswith((".npz", "/")) or name.startswith((".", "/", "~")):
        raise UsageError(f"The data set {name} does not exist; expected a folder of images or an .npz file.")
    return None


def load_digits() -> Dataset:
    """Load 1,797 handwritten digits of 8 x 8 pixels from scikit-learn; every fifth of each class is for testing."""
    from sklearn.datasets import load_digits  # takes a second to import

    digits = load_digits()
    images = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)
    is_test = np.zeros(len(images), bool)
    for digit in range(10):
        is_test[np.flatnonzero(digits.target == digit)[4::5]] = True
    labels = digits.target
    return make_dataset(images[~is_test], labels[~is_test], images[is_test], labels[is_test], num_classes=10)
