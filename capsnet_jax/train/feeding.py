"""Sending training images to the devices: the whole data set once, or chunk by chunk during training."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, pairwise
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Shaped

from capsnet_jax.train.sharding import along, on_all, place_tree

STREAMED_BYTES = 64 * 2**20  # of images in a chunk; two chunks are on the device at a time


def should_stream(images: Shaped[np.ndarray, "..."]) -> bool:
    """Whether the images need more than half of a device's memory; never on CPU, where they are in memory anyway."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return 2 * images.nbytes > stats.get("bytes_limit", float("inf"))


class Feed:
    """Sends the images of each chunk of steps to the devices while the chunk before is trained on.

    Args:
        data: training images and their labels, in host memory.
        mesh: the devices, each of which gets its share of every batch.
        stream: whether to send only the images of each chunk; otherwise all are sent once, and then only indices.
    """

    def __init__(self, data: tuple[np.ndarray, np.ndarray], mesh: Mesh, *, stream: bool):
        self._data, self._sharding = data, along(mesh, 2)
        self._on_devices = None if stream else place_tree(data, on_all(mesh))

    def batches(self, chunks: Iterable[Int[np.ndarray, "..."]]) -> Iterator[tuple[Array, Array, Array | None]]:
        """Yield images, labels and indices of each chunk, as arguments of the function of `make_train_chunk`.

        Args:
            chunks: indices of the images of each chunk, `[seeds steps b]`.
        """
        with ThreadPoolExecutor(1) as worker:
            pending = (worker.submit(self._send, indices) for indices in chunks)
            # The next chunk is sent before this one is used; the last one is followed by a future that is never read.
            for ready, _ in pairwise(chain(pending, [Future()])):
                yield ready.result()

    def _send(self, indices: Int[np.ndarray, "seeds steps b"]) -> tuple[Array, Array, Array | None]:
        if self._on_devices is not None:
            return *self._on_devices, place_tree(indices, self._sharding)

        def send(array: np.ndarray) -> Array:
            def part(index: Any) -> np.ndarray:  # each process reads only the images of its own devices
                return array[indices[index[: indices.ndim]]]

            return jax.make_array_from_callback(indices.shape + array.shape[1:], self._sharding, part)

        images, labels = map(send, self._data)
        return images, labels, None
