"""A small model in the explorer, and its server."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from flax import nnx

from capsnet_jax import CapsNet
from capsnet_jax.explore.explorer import Explorer
from capsnet_jax.explore.server import Server
from tests.conftest import IMAGE_SHAPE, SMALL

NAMES = tuple("abcdefghij")


def hot_model(**fields) -> CapsNet:
    """A small model whose routing has an effect: its poses are neither very short nor all alike."""
    model = CapsNet(**({"image_shape": IMAGE_SHAPE, "num_classes": len(NAMES)} | SMALL | fields), rngs=nnx.Rngs(0))
    weight = model.capsule_layers[-1].weight
    weight[...] = 3 * weight[...]
    return model


@pytest.fixture(scope="session")
def model() -> CapsNet:
    return hot_model()


@pytest.fixture(scope="session")
def explorer(model) -> Explorer:
    def examples() -> tuple[np.ndarray, np.ndarray]:
        images = np.random.default_rng(1).integers(0, 256, (7, *IMAGE_SHAPE), dtype=np.uint8)
        return images, np.array([3, 3, 0, 9, 0, 3, 3], np.int32)

    return Explorer({"small": model}, NAMES, examples=examples)


@contextmanager
def serving(explorer: Explorer) -> Iterator[Server]:
    """Answer requests in a thread."""
    with Server("127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve, args=(explorer,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="session")
def server(explorer) -> Iterator[Server]:
    with serving(explorer) as server:
        yield server
