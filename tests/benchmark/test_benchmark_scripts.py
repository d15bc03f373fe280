"""The scripts in benchmarks/: what they leave out, count, write and go on with. All without torch."""

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

from capsnet_benchmark.processes import WorkerError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    """The scripts' modules are found, as when one of them is run."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import scaling_curves
    import scaling_work
    import whole_epoch

    return SimpleNamespace(curves=scaling_curves, work=scaling_work, epoch=whole_epoch)


class FakeWorker:
    """Writes down what it is asked; takes as many seconds, and ten times as many bytes, as the value of the point."""

    log: list[tuple[str, str]] = []  # noqa: RUF012
    fails_at: tuple[str, str] | None = None
    free = 1000

    def __init__(self, row, module, arguments):
        assert module == "scaling_work"
        assert arguments["row"] == row
        self.row, self.name = row, ""

    def introduction(self):
        return {"platform": "cpu", "device": "cpu"}

    def stop(self):
        self.log.append((self.row, "stop"))

    def prepare(self, name):
        self.name = name
        self._note("prepare", name)

    def sample(self, name):
        self._note("sample", name)
        return float(name.split("=")[1])

    def tell(self, name):
        if name == "free_memory":
            return self.free
        assert name == "memory"
        return {"extra_bytes": 10 * int(self.name.split("=")[1]), "xla_temp_bytes": None}

    def _note(self, verb, name):
        self.log.append((self.row, f"{verb} {name}"))
        if self.fails_at == (self.row, f"{verb} {name}"):
            raise WorkerError(f"{self.row} failed.")


@pytest.fixture
def fake_workers(scripts, monkeypatch):
    monkeypatch.setattr(scripts.curves, "Worker", FakeWorker)
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
    samples = [row for row, asked in fake_workers.log if asked == "sample batch=6"]
    assert samples == [*scripts.curves.ROWS] * 3
    assert sorted(row for row, asked in fake_workers.log if asked == "stop") == sorted(scripts.curves.ROWS)


def test_a_point_that_may_need_more_memory_than_is_free_is_left_out_and_those_after_it(
    scripts, fake_workers, monkeypatch
):
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


@pytest.mark.parametrize("where", ["prepare", "sample"])
def test_a_row_that_fails_is_left_out_and_the_others_are_not(where, scripts, fake_workers, monkeypatch):
    monkeypatch.setattr(fake_workers, "fails_at", ("jax-votes", f"{where} batch=6"))
    points = {(point.row, point.value): point for point in measured(scripts, [2, 6, 9])}
    assert [len(points["jax-votes", value].seconds) for value in (2, 6, 9)] == [3, 0, 0]
    assert [len(points["torch-eager", value].seconds) for value in (2, 6, 9)] == [3, 3, 3]
    assert points["jax-votes", 9].left_out == "jax-votes failed."
    assert ("jax-votes", "prepare batch=9") not in fake_workers.log


def test_sheet_results_and_figure(scripts, fake_workers, monkeypatch, tmp_path):
    monkeypatch.setattr(fake_workers, "fails_at", ("jax-votes", "prepare inputs=21"))
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


@pytest.mark.skipif(sys.platform != "linux", reason="Memory of a process is read as Linux tells it.")
def test_memory_of_a_process_is_what_a_call_takes_beyond_its_results(scripts):
    work = scripts.work.Work(row="jax-votes", fixed={})
    megabytes = 2**20

    def call() -> np.ndarray:
        return np.ones(30 * megabytes, np.uint8)[: 10 * megabytes].copy()

    work._layer = SimpleNamespace(
        gradient=lambda batch: call, block=lambda result: None, size=lambda result: result.nbytes, temp_bytes=None
    )
    work.block = work._layer.block
    np.ones(300 * megabytes, np.uint8)  # what was there and is gone does not count
    ((prepared, times),) = work.prepare("batch=3")
    assert (prepared, times) == (call, 1)
    assert work.memory()["extra_bytes"] == pytest.approx(30 * megabytes, rel=0.05)


def test_memory_of_a_gpu_is_the_peak_of_a_second_call_beyond_its_results(scripts):
    work = scripts.work.Work(row="jax-votes", fixed={})
    in_use, peak = 1000, 7000  # of compilation

    def call() -> int:
        nonlocal peak
        peak = max(peak, in_use + 400 + (5000 if calls == [] else 0))
        calls.append("call")
        return 150

    def forget_peak() -> None:
        nonlocal peak
        peak = in_use

    calls: list[str] = []
    work.platform = "gpu"
    work.block = lambda result: calls.append("block")
    work._layer = SimpleNamespace(
        gradient=lambda batch: call,
        size=lambda result: result,
        device_memory=lambda: (in_use, peak),
        forget_peak=forget_peak,
        temp_bytes=None,
    )
    work.prepare("batch=3")
    assert work.memory()["extra_bytes"] == 400 - 150
    assert calls == ["call", "block"] * 2


def test_both_implementations_of_jax_are_measured_on_the_same_function(scripts):
    results = {}
    for row in ("jax-fused", "jax-votes"):
        work = scripts.work.Work(row=row, fixed={"batch": 2, "iterations": 3})
        ((call, _),) = work.prepare("inputs=7")
        results[row] = jax.tree.leaves(call())
        assert work.memory()["xla_temp_bytes"] > 0
        assert work.free_memory() > 2**20
    shapes = [leaf.shape for leaf in results["jax-fused"]]
    assert shapes == [(2, 10, 16), (7, 8, 10, 16), (2, 7, 8)]
    for ours, theirs in zip(results["jax-fused"], results["jax-votes"], strict=True):
        assert np.abs(theirs).max() > 0.01
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max(), rtol=0)


@pytest.mark.parametrize(
    ("calls", "loss_in_parts", "fails"), [(1, 2.001, False), (2, 2.0, True), (1, 2.01, True)], ids=str
)
def test_a_whole_epoch_is_one_call_with_the_same_loss(calls, loss_in_parts, fails, scripts, monkeypatch, tmp_path):
    trained = []

    def new_trainer(config, train_images, test_images, size):
        whole = not trained
        trained.append(config.training.steps_per_chunk)
        number, loss = (calls, 2.0) if whole else (2, loss_in_parts)
        epoch = [SimpleNamespace(ends_epoch=part == number - 1, losses={"total": loss}) for part in range(number)]
        return SimpleNamespace(run=lambda: iter(epoch * config.training.epochs))

    monkeypatch.setattr(scripts.epoch, "new_trainer", new_trainer)
    arguments = ["--small", "--batch-size", "4", "--epochs", "3", "--json", str(tmp_path / "epoch.json")]
    if fails:
        with pytest.raises(SystemExit, match="Expected one call, and a loss that is off by at most"):
            scripts.epoch.main(arguments)
    else:
        scripts.epoch.main(arguments)
    results = json.loads((tmp_path / "epoch.json").read_text())
    assert (results["calls_per_epoch"], results["mean_loss_in_parts"]) == (calls, loss_in_parts)
    assert len(results["samples_seconds"]) == 3
    assert trained == [6, 3]
