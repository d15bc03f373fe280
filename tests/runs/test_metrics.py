"""Metrics of a run: lines that survive a crash, the best accuracy so far, and the same values in TensorBoard files."""

import json
import math
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from capsnet_jax import UsageError
from capsnet_jax.cli.main import main
from capsnet_jax.runs import metrics
from capsnet_jax.runs.metrics import EVENTS, METRICS, MetricsLog
from capsnet_jax.train.evaluation import Evaluation
from capsnet_jax.train.progress import Progress, SeedProgress

STEPS_PER_EPOCH = 5
OF_STEPS = {"loss", "margin", "reconstruction", "accuracy", "gradient_norm"}
ALWAYS = {"kind", "epoch", "step", "learning_rate", "images_per_second", "peak_memory_bytes"} | OF_STEPS


def means(step: int, kind: str) -> dict[str, float]:
    """Means over a chunk or epoch, with infinitely many decimals, to check that they are kept to the last bit."""
    first = step if kind == "chunk" else -step
    return {
        "total": 1 / (first + 0.1),
        "margin": math.sqrt(step),
        "reconstruction": 1e-7 / step,
        "accuracy": 1 / 3,
        "gradient_norm": 1e5 / 7,
    }


def evaluation(num_correct: int, num_images: int) -> Evaluation:
    """An evaluation with this number of right answers; no other field is written."""
    return Evaluation(num_correct, num_images, (), (), (), None, 1.0, None, None)


def progress_at(step: int, validation: int | None = None, speed: float = 100.0) -> tuple[Progress, SeedProgress]:
    """The progress after a step; at the end of an epoch with this number of right answers on 40 validation images."""
    ends = step % STEPS_PER_EPOCH == 0
    seed = SeedProgress(
        seed=3,
        chunk=means(step, "chunk"),
        epoch=means(step, "epoch"),
        validation=evaluation(validation, 40) if ends and validation is not None else None,
        test=evaluation(step, 60) if ends else None,
    )
    return Progress(-(-step // STEPS_PER_EPOCH), step, STEPS_PER_EPOCH, 0.01 / step, speed, (seed,)), seed


def write(folder: Path, steps: dict[int, int | None], **options) -> list[bool]:
    """Write these steps, given the right answers on validation; return what `write` returned for each."""
    log = MetricsLog(folder, **options)
    answers = [log.write(*progress_at(step, validation)) for step, validation in steps.items()]
    log.close()
    return answers


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


@pytest.fixture(autouse=True)
def _memory(monkeypatch):
    monkeypatch.setattr(metrics, "peak_memory", lambda: 4096)


def test_there_is_a_line_for_every_chunk_and_another_for_every_epoch(tmp_path):
    write(tmp_path, {2: None, 4: None, 5: 30, 7: None})
    written = lines(tmp_path)
    assert [(line["kind"], line["epoch"], line["step"]) for line in written] == [
        ("chunk", 1, 2),
        ("chunk", 1, 4),
        ("chunk", 1, 5),
        ("epoch", 1, 5),
        ("chunk", 2, 7),
    ]
    for line in written:
        evaluations = {"test_accuracy": 5 / 60, "validation_accuracy": 0.75} if line["kind"] == "epoch" else {}
        assert line.keys() == ALWAYS | evaluations.keys()
        expected = means(line["step"], line["kind"])
        expected = {"loss": expected.pop("total"), "learning_rate": 0.01 / line["step"]} | expected | evaluations
        assert {name: line[name] for name in expected} == expected
        assert line["peak_memory_bytes"] == 4096


def test_without_validation_images_there_is_no_such_accuracy_and_never_a_best(tmp_path):
    assert write(tmp_path, {5: None, 10: None}) == [False, False]
    assert [line.keys() for line in lines(tmp_path) if line["kind"] == "epoch"] == [ALWAYS | {"test_accuracy"}] * 2
    log = MetricsLog(tmp_path, step=10)
    log.close()
    assert log.best is None


def test_the_best_are_those_of_the_last_epoch_with_the_most_right_answers(tmp_path):
    answers = write(tmp_path, {3: None, 5: 0, 10: 20, 12: None, 15: 20, 20: 19, 25: 21})
    assert answers == [False, True, True, False, True, False, True]


def test_images_per_second_of_an_epoch_are_all_images_over_all_the_time(tmp_path):
    """Chunks of 2, 2 and 1 steps, of which the first is slow; then an epoch that another process began."""
    batch_size, speeds = 8, {2: 10.0, 4: 160.0, 5: 40.0, 9: 64.0, 10: 32.0}
    log = MetricsLog(tmp_path)
    for step, speed in speeds.items():
        log.write(*progress_at(step, speed=speed))
    log.close()
    seconds = np.array([2 * batch_size / 10, 2 * batch_size / 160, batch_size / 40])
    first, second = (line for line in lines(tmp_path) if line["kind"] == "epoch")
    assert first["images_per_second"] == pytest.approx(5 * batch_size / seconds.sum())
    assert second["images_per_second"] == pytest.approx(5 / (4 / 64 + 1 / 32))
    log = MetricsLog(tmp_path, step=7)
    for step in (9, 10):
        log.write(*progress_at(step, speed=speeds[step]))
    log.close()
    assert lines(tmp_path)[-1]["images_per_second"] == pytest.approx(3 / (2 / 64 + 1 / 32))


@pytest.mark.parametrize("step", [0, 4, 5, 9, 10])
@pytest.mark.parametrize("tail", ["", '{"kind": "chunk", "epoch": 2, "st'], ids=["whole", "half-written"])
def test_reopening_keeps_all_lines_until_that_step_to_the_last_byte(step, tail, tmp_path):
    write(tmp_path, {2: None, 4: None, 5: 30, 7: None, 9: None, 10: 31})
    path = tmp_path / METRICS
    before = path.read_bytes().splitlines(keepends=True)
    with path.open("a") as file:
        file.write(tail)
    log = MetricsLog(tmp_path, step=step)
    kept = [line for line in before if json.loads(line)["step"] <= step]
    assert len(kept) == {0: 0, 4: 2, 5: 4, 9: 6, 10: 8}[step]
    assert path.read_bytes() == b"".join(kept)
    log.write(*progress_at(12))
    log.sync()
    assert path.read_bytes().startswith(b"".join(kept))
    assert [line["step"] for line in lines(tmp_path)[len(kept) :]] == [12]
    log.close()
    assert [file.name for file in tmp_path.iterdir()] == [METRICS]


def test_reopening_restores_the_best_of_the_lines_that_are_kept(tmp_path):
    write(tmp_path, {5: 20, 10: 30, 15: 25})
    path = tmp_path / METRICS
    for step, best, more in ((15, 0.75, 29), (14, 0.75, 30), (9, 0.5, 21), (4, None, 0)):
        before = path.read_bytes()
        log = MetricsLog(tmp_path, step=step)
        assert log.best == best
        assert log.write(*progress_at(20, validation=more)) == (more != 29)
        assert log.best == (0.75 if more == 29 else more / 40)
        log.close()
        path.write_bytes(before)


def test_a_line_in_the_middle_that_is_no_json_is_named(tmp_path):
    write(tmp_path, {2: None, 4: None})
    path = tmp_path / METRICS
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{second[:40]}\n{second}\n")
    with pytest.raises(UsageError, match=r"metrics.jsonl, line 2, begins with "):
        MetricsLog(tmp_path, step=4)
    assert path.read_text() == f"{first}\n{second[:40]}\n{second}\n"


def events_of(path: Path) -> list:
    """Read the events of a TensorBoard file without TensorBoard.

    A record is the length of its content in 8 bytes, 4 bytes of checksum, the content, and 4 bytes of checksum.
    """
    from tensorboardX.proto.event_pb2 import Event

    content, start, events = path.read_bytes(), 0, []
    while start < len(content):
        (length,) = struct.unpack_from("<Q", content, start)
        events.append(Event.FromString(content[start + 12 : start + 12 + length]))
        start += 12 + length + 4
    assert start == len(content)
    return events


def scalars(events: list) -> dict[tuple[str, int], float]:
    return {
        (value.tag, event.step): value.simple_value
        for event in events
        if event.WhichOneof("what") == "summary"
        for value in event.summary.value
    }


def test_tensorboard_events_have_the_values_of_the_lines(tmp_path):
    write(tmp_path, {2: None, 4: None, 5: 30, 7: None}, tensorboard=True)
    (path,) = (tmp_path / EVENTS).iterdir()
    untold = {"kind", "epoch", "step", "images_per_second", "peak_memory_bytes"}
    expected = {
        (f"{line['kind']}/{name}", line["step"]): np.float32(line[name])
        for line in lines(tmp_path)
        for name in line.keys() - untold
    }
    assert len(expected) == 4 * 6 + 8
    assert scalars(events_of(path)) == expected


def visible(events: list) -> dict[tuple[str, int], float]:
    """What TensorBoard shows: at the start of a session, it forgets the scalars of its step and of later ones."""
    shown: dict[tuple[str, int], float] = {}
    for event in events:
        if event.WhichOneof("what") == "session_log" and event.session_log.status == event.session_log.START:
            shown = {key: value for key, value in shown.items() if key[1] < event.step}
        shown |= scalars([event])
    return shown


@pytest.mark.parametrize("step", [0, 4, 5])
def test_after_resuming_tensorboard_shows_the_values_of_the_lines(step, tmp_path):
    """Also if a run starts from the beginning, because there was no checkpoint yet."""
    write(tmp_path, {2: None, 4: None, 5: 30, 7: None}, tensorboard=True)
    (path,) = (tmp_path / EVENTS).iterdir()
    path = path.rename(path.with_name("before"))  # files of the same second have the same name
    write(tmp_path, {step + 1: 20}, step=step, tensorboard=True)
    (later,) = (other for other in (tmp_path / EVENTS).iterdir() if other != path)
    shown = visible(events_of(path) + events_of(later))
    losses = {(f"{line['kind']}/loss", line["step"]): np.float32(line["loss"]) for line in lines(tmp_path)}
    assert {key: value for key, value in shown.items() if key[0].endswith("/loss")} == losses


def test_without_tensorboardx_the_extra_is_named_before_a_run_folder_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert main(["train", "--tensorboard", "--run-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "--tensorboard needs tensorboardX: pip install 'capsnet-jax[tensorboard]'" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="needs tensorboardX"):
        MetricsLog(tmp_path, tensorboard=True)
