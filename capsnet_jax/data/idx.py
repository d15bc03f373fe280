"""The idx files that MNIST and its successors are published in."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from capsnet_jax.errors import UsageError

IDX_DATASETS = ("mnist", "fashion_mnist", "kmnist")
NUM_CLASSES = 10
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def holds_idx(folder: Path) -> bool:
    """Whether the folder has any of the four files, so that what is missing can be told."""
    return any(_path(folder, name).exists() for name in FILES)


def read_idx_folder(folder: Path) -> list[UInt8[np.ndarray, "..."]]:
    """Training images `[images height width 1]` and labels, test images and labels.

    Raises:
        UsageError: a file is missing, truncated or not what its name says; the message names it.
    """
    arrays = {}
    for name in FILES:
        path = _path(folder, name)
        if not path.exists():
            raise UsageError(
                f"{folder} lacks {name}.gz; expected the four files {', '.join(f'{f}.gz' for f in FILES)}."
            )
        arrays[name] = read_idx(path, ndim=3 if "idx3" in name else 1)
    for images, labels in (FILES[:2], FILES[2:]):
        path = _path(folder, labels)
        if len(arrays[images]) != len(arrays[labels]):
            raise UsageError(f"{path} has {len(arrays[labels])} labels for {len(arrays[images])} images.")
        if arrays[labels].max(initial=0) >= NUM_CLASSES:
            raise UsageError(f"{path} has the label {arrays[labels].max()}; expected 0 to {NUM_CLASSES - 1}.")
    return [array[..., None] if array.ndim == 3 else array for array in arrays.values()]


def read_idx(path: Path, *, ndim: int) -> UInt8[np.ndarray, "..."]:
    """One file of unsigned bytes, compressed if its name ends in .gz.

    Layout: 0, 0, 8 (unsigned byte), number of axes; each size as 4 bytes, big-endian; the values.

    Args:
        path: the file.
        ndim: expected number of axes: 3 for images, 1 for labels.

    Raises:
        UsageError: the file is corrupt, truncated, longer than its header says, or of another kind.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UsageError(f"{path} is truncated or not a gzip file: {error}.") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
    magic = bytes((0, 0, 8, ndim))
    if content[:4] != magic:
        raise UsageError(
            f"{path} begins with {content[:4].hex()}; expected {magic.hex()}, unsigned bytes in {ndim} axes."
        )
    header = 4 + 4 * ndim
    shape = tuple(int.from_bytes(content[start : start + 4], "big") for start in range(4, header, 4))
    if len(content) != header + math.prod(shape):
        raise UsageError(f"{path} has {len(content)} bytes; its header says {header + math.prod(shape)}, for {shape}.")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _path(folder: Path, name: str) -> Path:
    compressed = folder / f"{name}.gz"
    return compressed if compressed.exists() else folder / name
