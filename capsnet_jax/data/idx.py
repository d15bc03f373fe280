"""The idx format, in which MNIST, Fashion-MNIST and KMNIST are published."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from capsnet_jax.errors import UsageError

IDX_DATASETS = ("mnist", "fashion_mnist", "kmnist")
NUM_CLASSES = 10
MAX_BYTES = 10_000_000_000  # of one file; the largest that are published have half a gigabyte
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def holds_idx(folder: Path) -> bool:
    """Whether the folder has any of the four idx files; if some are missing, `read_idx_folder` names them."""
    return any(_path(folder, name).exists() for name in FILES)


def read_idx_folder(folder: Path) -> list[UInt8[np.ndarray, "..."]]:
    """Read training images `[images height width 1]` and labels, test images and labels.

    Raises:
        UsageError: a file is missing, truncated or of another kind; the message names it.
    """
    paths = [_path(folder, name) for name in FILES]
    if missing := [path for path in paths if not path.exists()]:
        expected = ", ".join(f"{name}.gz" for name in FILES)
        raise UsageError(f"{folder} lacks {missing[0].name}.gz; expected the four files {expected}.")
    arrays = []
    for images_path, labels_path in (paths[:2], paths[2:]):
        images, labels = read_idx(images_path, ndim=3), read_idx(labels_path, ndim=1)
        if len(labels) != len(images):
            raise UsageError(f"{labels_path} has {len(labels)} labels for {len(images)} images.")
        if labels.max(initial=0) >= NUM_CLASSES:
            raise UsageError(f"{labels_path} has the label {labels.max()}; expected 0 to {NUM_CLASSES - 1}.")
        arrays += [images[..., None], labels]
    return arrays


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


def _path(folder: Path, name: str) -> Path:
    compressed = folder / f"{name}.gz"
    return compressed if compressed.exists() else folder / name
