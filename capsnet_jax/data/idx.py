"""The idx format, in which MNIST, Fashion-MNIST, KMNIST and EMNIST are published."""

import gzip
import math
import re
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from capsnet_jax.data.dataset import Dataset, make_dataset
from capsnet_jax.errors import UsageError

IDX_DATASETS = ("mnist", "fashion_mnist", "kmnist")  # whose files have no prefix
FILE_NAME = re.compile(r"(?:(.+)-)?(train|t10k|test)-(images|labels)[-.]idx[13]-ubyte(?:\.gz)?")
NUM_CLASSES = 10  # of these
MAX_BYTES = 10_000_000_000  # of one file; the largest that are published have half a gigabyte

Files = dict[tuple[str, str], Path]  # files by "train" or "test", and "images" or "labels"


def find_idx(folder: Path) -> dict[str, Files]:
    """Find the idx files in a folder, such as `emnist-letters-train-images-idx3-ubyte.gz`.

    Returns:
        The files of each data set, by the prefix of their names, which is "" for those of MNIST.
    """
    sets: dict[str, Files] = {}
    for path in sorted(folder.iterdir()):  # if a file is there with and without .gz, the one with .gz is read
        match = FILE_NAME.fullmatch(path.name)
        if match is not None and path.is_file():
            split = "train" if match[2] == "train" else "test"
            sets.setdefault(match[1] or "", {})[split, match[3]] = path
    return sets


def names_of(sets: dict[str, Files]) -> list[str]:
    """Return the names by which the data sets of `find_idx` can be loaded."""
    return [name for prefix in sorted(sets) for name in ([prefix] if prefix else IDX_DATASETS)]


def load_idx(folder: Path, sets: dict[str, Files], name: str, *, test_only: bool = False) -> Dataset:
    """Load a data set of idx files. Its classes are the labels that occur, in ascending order; those of MNIST, 0 to 9.

    Args:
        folder: the folder of the files.
        sets: what `find_idx` found there.
        name: one of `names_of(sets)`.
        test_only: whether to read the test images only; there are no training images then.

    Raises:
        UsageError: the name is another one, or a file is missing, truncated or of another kind; the message names it.
    """
    prefix = "" if name in IDX_DATASETS and name not in sets else name
    if prefix not in sets:
        raise UsageError(
            f"Unknown data set {name!r} for the idx files in {folder}; expected {', '.join(names_of(sets))}."
        )
    files = sets[prefix]
    arrays: list[np.ndarray] = []
    for split in ("test",) if test_only else ("train", "test"):
        for content, axes in (("images", 3), ("labels", 1)):
            if (split, content) not in files:
                begin = f"{prefix}-{split}" if prefix else {"train": "train", "test": "t10k"}[split]
                splits = "test images and their labels" if test_only else "training and test images and their labels"
                raise UsageError(f"{folder} lacks {begin}-{content}-idx{axes}-ubyte.gz; expected files of {splits}.")
            arrays.append(read_idx(files[split, content], ndim=axes))
        if len(arrays[-1]) != len(arrays[-2]):
            counts = f"{len(arrays[-1])} labels for {len(arrays[-2])} images"
            raise UsageError(f"{files[split, 'labels']} has {counts}; expected one for each.")
    if test_only:
        arrays = [array[:0] for array in arrays] + arrays
    classes = np.unique(np.concatenate(arrays[1::2]))
    if not prefix and classes.max(initial=0) < NUM_CLASSES:  # a part of MNIST, in which not every digit may occur
        classes = np.arange(NUM_CLASSES)
    if len(classes) < 2:
        raise UsageError(
            f"The labels of {name!r} in {folder} are all {classes.tolist()}; expected two classes or more."
        )
    train_labels, test_labels = (np.searchsorted(classes, labels) for labels in arrays[1::2])
    train_images, test_images = (images[..., None] for images in arrays[::2])
    return make_dataset(
        *(train_images, train_labels, test_images, test_labels),
        num_classes=len(classes),
        class_names=[str(label) for label in classes],
    )


def read_idx(path: Path, *, ndim: int) -> UInt8[np.ndarray, "..."]:
    """Read an idx file of unsigned bytes, which is compressed if its name ends in .gz.

    Layout: the bytes 0, 0, 8 (unsigned byte), number of axes; each size as 4 bytes, big-endian; the values.

    Args:
        path: the file.
        ndim: expected number of axes: 3 for images, 1 for labels.

    Raises:
        UsageError: the file is damaged, truncated, longer than its header says, or of another kind.
    """
    magic = bytes((0, 0, 8, ndim))
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * ndim)
            if header[:4] != magic:
                begin = f"begins with {header[:4].hex()}" if header else "is empty"
                raise UsageError(f"{path} {begin}; expected {magic.hex()}, unsigned bytes in {ndim} axes.")
            if len(header) < 4 + 4 * ndim:
                raise UsageError(f"{path} ends in its header, after {len(header)} bytes; expected {4 + 4 * ndim}.")
            shape = tuple(int.from_bytes(header[start : start + 4], "big") for start in range(4, len(header), 4))
            size = math.prod(shape)
            # No more than the header says, because a small compressed file can hold gigabytes.
            values = file.read(size + 1) if size <= MAX_BYTES else b""
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UsageError(f"{path} is truncated or not a gzip file: {error}.") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
    if size > MAX_BYTES:
        raise UsageError(f"{path} has {size:,} values by its header, for {shape}; expected at most {MAX_BYTES:,}.")
    if len(values) != size:
        count = f"more than {size}" if len(values) > size else len(values)
        raise UsageError(f"{path} has {count} values; its header says {size}, for {shape}.")
    return np.frombuffer(values, np.uint8).reshape(shape)
