"""Fixtures: a small model, a small data set, its idx files, and a finished run."""

import gzip
import struct
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
from flax import nnx

from capsnet_jax import CapsNet
from capsnet_jax.data import Dataset, make_dataset
from tests.tiny_run import TinyRun, options_of, printed

SMALL = {"stem_channels": 6, "stem_kernel": 3, "primary_groups": 2, "primary_dim": 4, "primary_kernel": 3}
SMALL |= {"primary_scale": 1.0, "class_dim": 5, "decoder_hidden": (12, 14)}
IMAGE_SHAPE = (9, 11, 1)


@pytest.fixture
def small_model() -> CapsNet:
    return CapsNet(IMAGE_SHAPE, 10, **SMALL, rngs=nnx.Rngs(0))


@pytest.fixture
def small_dataset() -> Dataset:
    return make_small_dataset()


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """The four files of MNIST, with few and small images."""
    return write_idx_folder(tmp_path / "idx", make_small_dataset())


@pytest.fixture
def without_type_checks() -> Iterator[None]:
    """Let wrong arguments reach the code that checks them for users, past the type checks of tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A finished run, trained once; see `TinyRun`."""
    here = tmp_path_factory.mktemp("tiny")
    data_dir = write_idx_folder(here / "idx", make_small_dataset())
    folder = here / "[/run] $x_{$"  # printed and drawn as it is, although it looks like markup and a formula
    return TinyRun(folder, data_dir, printed(*options_of(data_dir, folder)))


def make_small_dataset() -> Dataset:
    """The position of a bright row or column is the class, so a model can learn it."""
    rng = np.random.default_rng(0)
    splits = []
    for count in (50, 23):
        labels = rng.integers(0, 10, count)
        images = rng.integers(0, 60, (count, *IMAGE_SHAPE), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[label if label < 5 else slice(None), slice(None) if label < 5 else label] = 255
        splits += [images, labels]
    return make_dataset(*splits, num_classes=10)


def write_idx_folder(folder: Path, dataset: Dataset) -> Path:
    folder.mkdir()
    for prefix, images, labels in (
        ("train", dataset.train_images, dataset.train_labels),
        ("t10k", dataset.test_images, dataset.test_labels),
    ):
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images[..., 0])
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels.astype(np.uint8))
    return folder


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))
