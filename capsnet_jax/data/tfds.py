"""Image data sets of tensorflow-datasets, by name; TensorFlow itself is needed only to prepare a data set."""

import difflib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from capsnet_jax.data.dataset import Dataset, make_dataset
from capsnet_jax.data.idx import IDX_DATASETS
from capsnet_jax.errors import UsageError

EXTRA = "pip install 'capsnet-jax[tfds]'"
READ_AT_ONCE = 1000  # examples; several times as fast as one by one


def load_tfds(name: str, data_dir: Path | None, *, test_only: bool = False) -> Dataset:
    """Load the training and test images of a data set, and download and prepare it if necessary.

    Args:
        name: name of the data set in tensorflow-datasets.
        data_dir: folder of prepared data sets; None for the default of tensorflow-datasets.
        test_only: whether to load the test images only; there are no training images then.

    Raises:
        UsageError: the data set is unknown, its images have different sizes or no class, or a package is missing.
    """
    idx = "idx files in --data-dir" + ("" if data_dir is None else f" ({data_dir} has none)")
    others = f"digits, multi_mnist, affine_mnist, the path of a folder or .npz file, a data set of {idx}"
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        if name in IDX_DATASETS:
            needs = f"Data set {name!r} needs its four {idx}, or"
        else:
            needs = f"Unknown data set {name!r}; expected {others}; all others need"
        raise UsageError(f"{needs} tensorflow-datasets: {EXTRA} ({error}).") from error
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except (ValueError, AssertionError) as error:  # not found, not the syntax of a name, or no such config or version
        similar = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False), n=5)
        raise UsageError(
            f"Unknown data set {name!r}; expected {others}, or an image set of tensorflow-datasets"
            f"{', such as ' + ', '.join(similar) if similar else ''}."
        ) from error
    image, label = _supervised_keys(builder.info, name)
    if not builder.is_prepared():
        if importlib.util.find_spec("tensorflow") is None:
            raise UsageError(
                f"Data set {name!r} is not prepared in {builder.data_dir}, and preparing it needs TensorFlow: {EXTRA}; "
                "or give mnist, fashion_mnist or kmnist a --data-dir with its four idx files."
            )
        builder.download_and_prepare(file_format="array_record")
    splits = ("test",) if test_only else ("train", "test")
    for split in splits:
        if split not in builder.info.splits:
            raise UsageError(f"Data set {name!r} has no split {split!r}; it has {', '.join(builder.info.splits)}.")
    features = builder.info.features
    arrays: list[np.ndarray] = []
    for split in splits:
        source = builder.as_data_source(split)
        images = np.empty((len(source), *features[image].shape), features[image].np_dtype)
        labels = np.empty(len(source), np.int64)
        for start in range(0, len(source), READ_AT_ONCE):
            numbers = list(range(start, min(start + READ_AT_ONCE, len(source))))
            for number, example in zip(numbers, source.__getitems__(numbers), strict=True):
                images[number], labels[number] = example[image], example[label]
        arrays += [images, labels]
    if test_only:
        arrays = [array[:0] for array in arrays] + arrays
    return make_dataset(*arrays, num_classes=len(features[label].names), class_names=features[label].names)


def _supervised_keys(info: Any, name: str) -> tuple[str, str]:
    """Find the names of the features that are image and label."""
    keys, features = info.supervised_keys, info.features
    if keys is None or len(keys) != 2 or not hasattr(features[keys[1]], "num_classes"):
        raise UsageError(f"Data set {name!r} is not one of images with a class each.")
    shape = features[keys[0]].shape
    if len(shape) != 3 or None in shape:
        raise UsageError(f"Data set {name!r} has images of shape {shape}; expected one height, width and channels.")
    return keys
