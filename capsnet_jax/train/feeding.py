"""Sending images to the devices: the whole set once, or those of each chunk while the one before is trained on."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Shaped

from capsnet_jax.train.sharding import along, on_all, place

STREAMED_BYTES = 64 * 2**20  # of images in a chunk, of which two are on the device at a time


class Batches(NamedTuple):
    """The images of a chunk of steps.

    Attributes:
        images: all training images; if they are streamed, those of each seed and step `[seeds steps b ...]`.
        labels: of these images.
        indices: of the images of each seed and step; None if they are streamed.
    """

    images: Shaped[Array, "..."]
    labels: Int[Array, "..."]
    indices: Int[Array, "seeds steps b"] | None


def should_stream(images: Shaped[np.ndarray, "..."]) -> bool:
    """Whether the images would take more than half of the memory of a device; never on CPU, where it is the host's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return 2 * images.nbytes > stats.get("bytes_limit", float("inf"))


class Feed:
    """Sends training images to the devices, one chunk of steps ahead.

    Args:
        images: training images, in the host's memory.
        labels: their labels.
        mesh: the devices, each of which gets its share of every batch.
        stream: whether only what the next chunk needs is sent to the devices.
    """

    def __init__(
        self,
        images: Shaped[np.ndarray, "images height width channels"],
        labels: Int[np.ndarray, "images *classes"],
        mesh: Mesh,
        *,
        stream: bool,
    ):
        self._data, self._mesh, self.stream = (images, labels), mesh, stream
        self._on_devices = () if stream else tuple(place(array, on_all(mesh)) for array in self._data)

    def batches(self, chunks: Iterable[Int[np.ndarray, "..."]]) -> Iterator[Batches]:
        """Yield the images of each chunk, given their indices `[seeds steps b]`; the next are sent meanwhile."""
        send = self._send_images if self.stream else self._send_indices
        with ThreadPoolExecutor(1) as worker:
            ahead = None
            for indices in chunks:
                ahead, ready = worker.submit(send, indices), ahead
                if ready is not None:
                    yield ready.result()
            if ahead is not None:
                yield ahead.result()

    def _send_indices(self, indices: Int[np.ndarray, "seeds steps b"]) -> Batches:
        images, labels = self._on_devices
        return Batches(images, labels, place(indices, along(self._mesh, 2)))

    def _send_images(self, indices: Int[np.ndarray, "seeds steps b"]) -> Batches:
        sharding = along(self._mesh, 2)

        def send(array: np.ndarray) -> Array:
            # Each process reads only the images of its own devices.
            def part(index: Any) -> np.ndarray:
                return array[indices[index[: indices.ndim]]]

            return jax.make_array_from_callback(indices.shape + array.shape[1:], sharding, part)

        images, labels = map(send, self._data)
        return Batches(images, labels, None)
