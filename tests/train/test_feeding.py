"""Sending images to the devices: streamed or all at once, training gives the same bits."""

import dataclasses
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from capsnet_jax import CapsNet
from capsnet_jax.config import TrainingConfig
from capsnet_jax.train.feeding import Feed, should_stream
from capsnet_jax.train.loop import Trainer
from capsnet_jax.train.sharding import data_mesh
from tests.conftest import IMAGE_SHAPE, SMALL, make_small_dataset

CONFIG = TrainingConfig(epochs=2, batch_size=8, learning_rate=0.01, reconstruction_weight=0.0)
# A model that is quick to compile.
MODEL = SMALL | {"decoder_hidden": None, "routing": "uniform"}
RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(0, 256, (31, 5, 7, 3), dtype=np.uint8), RNG.integers(0, 10, 31).astype(np.int32)
CHUNKS = [RNG.integers(0, 31, (2, steps, 4)) for steps in (3, 3, 3, 3, 2)]


def train(seeds: tuple[int, ...], steps_per_chunk: int, *, stream: bool) -> tuple[list, list[np.ndarray]]:
    """All metrics and the final state."""
    trainer = Trainer(
        lambda seed: CapsNet(IMAGE_SHAPE, 10, **MODEL, rngs=nnx.Rngs(seed)),
        make_small_dataset(),
        dataclasses.replace(CONFIG, steps_per_chunk=steps_per_chunk),
        augment=("shift=0.2",),
        stream=stream,
        seeds=seeds,
    )
    metrics = [(progress.step, progress.seeds) for progress in trainer.run()]
    return metrics, [np.asarray(leaf) for leaf in jax.tree.leaves(trainer.snapshot.state)]


@pytest.mark.parametrize(
    ("seeds", "steps_per_chunk"),
    [((3, 4), 3), *(pytest.param(*each, marks=pytest.mark.exhaustive) for each in (((3,), 1), ((3, 4, 5), 4)))],
)
def test_streaming_does_not_change_training(seeds, steps_per_chunk):
    """An epoch has six steps; a chunk of four is followed by one of two."""
    metrics, state = train(seeds, steps_per_chunk, stream=True)
    expected_metrics, expected_state = train(seeds, steps_per_chunk, stream=False)
    expected_steps = {1: list(range(1, 13)), 3: [3, 6, 9, 12], 4: [4, 6, 10, 12]}
    assert [step for step, _ in metrics] == expected_steps[steps_per_chunk]
    assert metrics == expected_metrics
    for leaf, expected in zip(state, expected_state, strict=True):
        np.testing.assert_array_equal(leaf, expected)


@pytest.fixture(scope="module")
def feed() -> Feed:
    return Feed((IMAGES, LABELS), data_mesh(4), stream=True)


def test_a_streamed_chunk_has_the_images_of_its_indices(feed):
    given = list(feed.batches(CHUNKS))
    assert len(given) == 5
    for (images, labels, sent), indices in zip(given, CHUNKS, strict=True):
        assert sent is None
        np.testing.assert_array_equal(images, IMAGES[indices])
        np.testing.assert_array_equal(labels, LABELS[indices])


def test_without_streaming_all_images_are_sent_once_and_indices_for_each_chunk():
    feed = Feed((IMAGES, LABELS), data_mesh(4), stream=False)
    given = list(feed.batches(CHUNKS))
    for (images, labels, sent), indices in zip(given, CHUNKS, strict=True):
        np.testing.assert_array_equal(sent, indices)
        np.testing.assert_array_equal(images, IMAGES)
        assert images is given[0][0]
        np.testing.assert_array_equal(labels, LABELS)


@pytest.mark.parametrize(("images_bytes", "expected"), [(500, False), (501, True)])
def test_images_of_more_than_half_of_the_device_memory_are_streamed(images_bytes, expected, monkeypatch):
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 1000, "bytes_in_use": 999})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert should_stream(np.zeros((images_bytes, 1, 1, 1), np.uint8)) is expected


@pytest.mark.parametrize("stats", [None, {}, {"bytes_in_use": 3}])
def test_a_device_of_unknown_memory_gets_all_images_at_once(stats, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(memory_stats=lambda: stats)])
    huge = np.broadcast_to(np.uint8(0), (2**40, 1, 1, 1))
    assert should_stream(huge) is False


@pytest.mark.parametrize("stream", [None, False, True])
def test_the_option_stream_overrides_the_choice_by_memory(stream, small_model, monkeypatch):
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 1000})
    with monkeypatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda: [device])
        trainer = Trainer(lambda seed: small_model, make_small_dataset(), TrainingConfig(batch_size=8), stream=stream)
    assert trainer.stream == (stream is not False)


class Fetches:
    """Records which chunks a feed sends, and in which thread."""

    def __init__(self, feed: Feed, monkeypatch: pytest.MonkeyPatch):
        self.chunks: list[int] = []
        self.threads: set[threading.Thread] = set()
        send = feed._send

        def noting(indices: np.ndarray):
            self.threads.add(threading.current_thread())
            self.chunks.append(next(number for number, chunk in enumerate(CHUNKS) if chunk is indices))
            return send(indices)

        monkeypatch.setattr(feed, "_send", noting)

    def until(self, number: int) -> list[int]:
        """Wait until `number` chunks were sent, and a little longer; return the chunks sent by then."""
        deadline = time.monotonic() + 30
        while len(self.chunks) < number:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(0.05)
        return list(self.chunks)


def test_while_a_chunk_is_in_use_only_the_next_is_sent(feed, monkeypatch):
    fetches, asked = Fetches(feed, monkeypatch), []

    def chunks():
        for number, chunk in enumerate(CHUNKS):
            asked.append(number)
            yield chunk

    for in_use, (_, labels, _) in enumerate(feed.batches(chunks())):
        ahead = min(in_use + 2, 5)
        assert fetches.until(ahead) == list(range(ahead))
        assert asked == list(range(ahead))
        np.testing.assert_array_equal(labels, LABELS[CHUNKS[in_use]])
    (thread,) = fetches.threads
    assert thread is not threading.current_thread()
    assert not thread.is_alive()


def test_an_error_in_sending_is_raised_when_its_chunk_is_used(feed):
    """There is no image 31; the chunks before it are returned."""
    wrong = np.full((2, 3, 4), 31)
    batches = feed.batches([*CHUNKS[:2], wrong, *CHUNKS[2:]])
    for indices in CHUNKS[:2]:
        np.testing.assert_array_equal(next(batches)[1], LABELS[indices])
    with pytest.raises(IndexError, match="31 is out of bounds"):
        next(batches)


@pytest.mark.parametrize("used", [0, 1, 3])
def test_closing_the_iterator_ends_its_thread(used, feed, monkeypatch):
    before = set(threading.enumerate())
    fetches = Fetches(feed, monkeypatch)
    batches = feed.batches(CHUNKS)
    for _ in range(used):
        next(batches)
    batches.close()
    assert set(threading.enumerate()) <= before
    assert fetches.chunks == list(range(used + 1 if used else 0))
