"""The scripts in benchmarks/, with fake workers and trainers, all without PyTorch."""

import csv
import io
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from capsnet_benchmark.jax_work import Work
from capsnet_benchmark.measurements import SIZES
from capsnet_benchmark.processes import WorkerError
from capsnet_benchmark.worker import Timer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    """The scripts as modules."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import collectives
    import scaling_curves
    import whole_epoch

    return SimpleNamespace(curves=scaling_curves, epoch=whole_epoch, collectives=collectives)


class FakeWorker:
    """Logs requests; a point takes as many seconds as its batch size or inputs, and ten times as many bytes."""

    log: list[tuple[str, str, int]] = []  # noqa: RUF012
    fails_at: tuple[str, str, int] | None = None
    free = 1000
    varies = "batch"
    platform, device = "cpu", "cpu"

    def __init__(self, row, module, arguments):
        assert module == ("capsnet_torch.benchmark" if row == "torch-eager" else "capsnet_benchmark.jax_work")
        self.row, self.value = row, 0

    def wait_until_ready(self):
        pass

    def stop(self):
        self.log.append((self.row, "stop", self.value))

    def ask(self, method, *arguments):
        if method == "load":
            (config,) = arguments
            sizes = {"batch": config["training"]["batch_size"], "inputs": config["model"]["image_shape"][1]}
            self.value = sizes[self.varies]
            implementation = config["model"]["routing_implementation"]
            assert implementation == ("fused" if self.row == "jax-fused" else "votes")
        elif method == "prepare":
            assert arguments == ("routing",)
        self.log.append((self.row, method, self.value))
        if self.fails_at == (self.row, method, self.value):
            raise WorkerError(f"{self.row} failed.")
        results = {"sample": float(self.value), "extra_memory": 10 * self.value, "free_memory": self.free}
        return results.get(method)


@pytest.fixture
def fake_workers(monkeypatch):
    monkeypatch.setattr("capsnet_benchmark.processes.Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "log", [])
    return FakeWorker


def measured(scripts, values, **options):
    options = {"rounds": 3, "deadline": time.monotonic() + 1e6} | options
    fixed = {"inputs": 5, "iterations": 2}
    points, _ = scripts.curves.measure("batch", values, fixed, **options)
    return points


def test_rows_take_turns_at_each_point(scripts, fake_workers):
    points = measured(scripts, [2, 6])
    assert [(point.row, point.value) for point in points] == [
        (row, value) for value in (2, 6) for row in scripts.curves.ROWS
    ]
    assert [(point.batch, point.inputs, point.iterations) for point in points[::3]] == [(2, 5, 2), (6, 5, 2)]
    assert [point.seconds for point in points[::3]] == [[2.0] * 3, [6.0] * 3]
    assert [point.extra_bytes for point in points[::3]] == [20, 60]
    assert [point.votes_bytes for point in points[::3]] == [4 * 2 * 5 * 160, 4 * 6 * 5 * 160]
    samples = [row for row, method, value in fake_workers.log if (method, value) == ("sample", 6)]
    assert samples == [*scripts.curves.ROWS] * 3
    assert [row for row, method, _ in fake_workers.log if method == "temp_bytes"] == ["jax-fused", "jax-votes"] * 2
    assert sorted(row for row, method, _ in fake_workers.log if method == "stop") == sorted(scripts.curves.ROWS)


def test_a_point_that_may_need_more_memory_than_is_free_is_left_out(scripts, fake_workers, monkeypatch):
    monkeypatch.setattr(fake_workers, "free", 59)
    points = measured(scripts, [2, 6, 7])
    assert [len(point.seconds) for point in points[::3]] == [3, 0, 0]
    assert points[3].left_out == points[6].left_out == "it may need 0.0 GB, and 0.0 GB are free"
    assert points[3].extra_bytes is None
    monkeypatch.setattr(fake_workers, "free", 60)
    assert len(measured(scripts, [2, 6])[3].seconds) == 3


def test_a_point_that_may_end_too_late_is_left_out(scripts, fake_workers):
    # At 2 each of the three rows takes 2 s a call; at 6 each of 3 + 6 calls would take 4 s more.
    needed = 3 * (3 + 6) * 4
    points = measured(scripts, [2, 6], deadline=time.monotonic() + needed - 1)
    assert [len(point.seconds) for point in points[::3]] == [3, 0]
    assert points[3].left_out.startswith("it may take 108 s, and 107 s are left")
    assert len(measured(scripts, [2, 6], deadline=time.monotonic() + needed + 5)[3].seconds) == 3
    assert measured(scripts, [2], deadline=time.monotonic() - 1)[0].seconds == []


@pytest.mark.parametrize("where", ["load", "prepare", "extra_memory", "sample"])
def test_a_row_that_fails_is_left_out_and_the_others_are_not(where, scripts, fake_workers, monkeypatch):
    monkeypatch.setattr(fake_workers, "fails_at", ("jax-votes", where, 6))
    points = {(point.row, point.value): point for point in measured(scripts, [2, 6, 9])}
    assert [len(points["jax-votes", value].seconds) for value in (2, 6, 9)] == [3, 0, 0]
    assert [len(points["torch-eager", value].seconds) for value in (2, 6, 9)] == [3, 3, 3]
    assert points["jax-votes", 9].left_out == "jax-votes failed."
    assert ("jax-votes", "load", 9) not in fake_workers.log


def test_csv_json_and_figure_are_written(scripts, fake_workers, monkeypatch, tmp_path):
    monkeypatch.setattr(fake_workers, "varies", "inputs")
    monkeypatch.setattr(fake_workers, "fails_at", ("jax-votes", "prepare", 21))
    monkeypatch.setattr(scripts.curves, "origin", lambda rows, device: {"device": device})
    scripts.curves.main(["--output", str(tmp_path / "out"), "--rounds", "2", "--small"])
    lines = list(csv.DictReader(io.StringIO((tmp_path / "out.csv").read_text())))
    assert [(line["row"], line["value"]) for line in lines] == [
        (row, value) for value in ("7", "21") for row in ("jax-fused", "jax-votes", "torch-eager")
    ]
    assert lines[3] == {
        **{"row": "jax-fused", "axis": "inputs", "value": "21", "batch": "2", "inputs": "21", "iterations": "2"},
        **{"seconds_median": "21.0", "seconds_quartile_1": "21.0", "seconds_quartile_3": "21.0"},
        **{"extra_bytes": "210", "xla_temp_bytes": "", "votes_bytes": str(4 * 2 * 21 * 160)},
    }
    assert lines[4]["seconds_median"] == lines[4]["extra_bytes"] == ""
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["device"] == "cpu"
    assert results["points"][4]["left_out"] == "jax-votes failed."
    assert results["points"][3]["seconds"] == [21.0, 21.0]
    assert (tmp_path / "out.png").stat().st_size > 10_000


def test_curves_show_what_was_measured(scripts):
    point = scripts.curves.Point
    points = [
        point("jax-fused", "batch", 1, 1, 1152, 3, [0.002, 0.003, 0.007], 4_000_000),
        point("jax-fused", "batch", 4, 4, 1152, 3, [0.005, 0.006, 0.007], 5_000_000),
        point("jax-votes", "batch", 1, 1, 1152, 3, left_out="It failed."),
    ]
    figure = scripts.curves.curves(points, "title")
    time_panel, memory_panel = figure.axes
    (line,) = time_panel.lines
    np.testing.assert_allclose(line.get_xydata(), [[1, 3], [4, 6]])
    measured, votes = memory_panel.lines
    np.testing.assert_allclose(measured.get_xydata(), [[1, 4], [4, 5]])
    np.testing.assert_allclose(votes.get_xydata(), [[1, 0.73728], [4, 4 * 0.73728]])
    assert time_panel.get_title() == "1,152 input capsules, 3 routing iterations"


def timer(call, **work) -> Timer:
    """A timer that has prepared a call of a fake `Work`."""
    work = {"block": lambda result: None, "warmed_up": lambda: None, "peak_device_memory": lambda: None} | work
    timer = Timer(SimpleNamespace(prepare=lambda name: [(call, 1)], **work))
    timer.prepare("routing")
    return timer


@pytest.mark.skipif(sys.platform != "linux", reason="Only Linux tells the memory of a process.")
def test_extra_memory_of_a_process_is_beyond_what_it_had_and_the_results():
    megabytes = 2**20

    def call() -> np.ndarray:
        return np.ones(30 * megabytes, np.uint8)[: 10 * megabytes].copy()

    on_cpu = timer(call, platform="cpu", size=lambda result: result.nbytes)
    np.ones(300 * megabytes, np.uint8)  # freed memory does not count
    assert on_cpu.extra_memory() == pytest.approx(30 * megabytes, rel=0.05)


def test_extra_memory_of_a_gpu_is_the_peak_beyond_what_was_in_use_and_the_results():
    in_use, peak = 1000, 7000  # of compilation

    def call() -> int:
        nonlocal peak
        peak = max(peak, in_use + 400)
        return 150

    def reset_peak() -> None:
        nonlocal peak
        peak = in_use

    memory = {"memory_in_use": lambda: in_use, "peak_device_memory": lambda: peak}
    on_gpu = timer(call, platform="gpu", size=lambda result: result, warmed_up=reset_peak, **memory)
    assert on_gpu.extra_memory() == 400 - 150


def test_both_implementations_in_jax_are_measured_on_the_same_function(scripts):
    results = {}
    for row in ("jax-fused", "jax-votes"):
        work = Work(config=scripts.curves.layer_config(2, 7, 2, row), **SIZES)
        ((call, _),) = work.prepare("routing")
        results[row] = call()
        assert work.size(results[row]) == 4 * (2 * 10 * 17 + 7 * 8 * 10 * 16 + 2 * 7 * 9)
        assert work.temp_bytes() > 0
        assert work.free_memory() > 2**20
    shapes = [leaf.shape for leaf in jax.tree.leaves(results["jax-fused"])]
    assert shapes == [(2, 10, 16), (2, 10), (7, 8, 10, 16), (2, 7, 8), (2, 7)]
    for fused, votes in zip(*map(jax.tree.leaves, results.values()), strict=True):
        np.testing.assert_allclose(fused, votes, atol=1e-5 * np.abs(votes).max(), rtol=0)
    assert np.abs(jax.tree.leaves(results["jax-votes"])[3]).max() > 0.01


@pytest.mark.parametrize(
    ("calls", "loss_in_parts", "fails"), [(1, 2.001, False), (2, 2.0, True), (1, 2.01, True)], ids=str
)
def test_whole_epoch_requires_one_call_and_the_same_loss(calls, loss_in_parts, fails, scripts, monkeypatch, tmp_path):
    trained = []

    def random_trainer(config, train_images, test_images, *, augment):
        assert (train_images, augment) == (6 * 4, ("shift=0.1",))
        whole = not trained
        trained.append(config.training.steps_per_chunk)
        number, loss = (calls, 2.0) if whole else (2, loss_in_parts)
        epoch = [SimpleNamespace(ends_epoch=part == number - 1, losses={"total": loss}) for part in range(number)]
        return SimpleNamespace(run=lambda: iter(epoch * config.training.epochs))

    monkeypatch.setattr(scripts.epoch, "random_trainer", random_trainer)
    arguments = ["--small", "--batch-size", "4", "--epochs", "3", "--json", str(tmp_path / "epoch.json")]
    if fails:
        with pytest.raises(SystemExit, match="Expected one call per epoch, and losses that differ by at most"):
            scripts.epoch.main(arguments)
    else:
        scripts.epoch.main(arguments)
    results = json.loads((tmp_path / "epoch.json").read_text())
    assert (results["calls_per_epoch"], results["mean_loss_in_parts"]) == (calls, loss_in_parts)
    assert len(results["samples_seconds"]) == 3
    assert trained == [6, 3]


def test_collectives_are_counted_in_the_text_of_a_program(scripts):
    program = """
      %all-reduce.1 = (f32[10,3]{1,0}, f32[]) all-reduce(%a, %b), replica_groups={}
      %gather = s32[8]{0} all-gather-start(%c)
      %other = bf16[4,5]{1,0} all-reduce(%all-reduce.1)
    """
    assert scripts.collectives.count(program) == {"all-reduce": (2, 4 * 31 + 2 * 20), "all-gather": (1, 32)}
