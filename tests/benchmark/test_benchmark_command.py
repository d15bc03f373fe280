"""The command: what it prints and writes, what it refuses, and that nothing of it stays behind. All without torch."""

import json
import signal
import subprocess

import pytest

from capsnet_benchmark.flops import training_flops
from capsnet_benchmark.measurements import measure
from capsnet_benchmark.processes import same_device
from capsnet_benchmark.results import origin
from capsnet_jax.cli import benchmark
from capsnet_jax.cli.benchmark import Benchmark
from capsnet_jax.cli.main import main
from capsnet_jax.config import ModelConfig
from capsnet_jax.errors import UsageError

pytestmark = pytest.mark.slow  # many start processes, and none depends on the version of Python


@pytest.fixture
def fake_rows(tmp_path, monkeypatch):
    """All rows are those of `fake_work`, called in tiny sizes."""
    monkeypatch.setattr(benchmark, "WORK", dict.fromkeys(benchmark.ROWS, "tests.benchmark.fake_work"))
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: name)
    told = iter([origin(["jax"], "cpu")])  # once: a file in the checkout makes it another commit
    monkeypatch.setattr(benchmark, "origin", lambda rows, device: next(told))


def test_the_command_prints_tables_and_sentences_and_writes_them(fake_rows, tmp_path, monkeypatch, capsys):
    path = tmp_path / "result.json"
    monkeypatch.setattr(benchmark.os, "getloadavg", lambda: (1.25, 0.0, 0.0))
    assert main(["benchmark", "--rounds", "2", "--measure", "gemm", "step", "--json", str(path)]) == 0
    printed = capsys.readouterr()
    results = json.loads(path.read_text())
    assert list(results["median_seconds"]["jax"]) == ["step", "gemm"]  # memory is read after steps alone
    assert results["ratios"]["step_vs_eager"] == pytest.approx(1, abs=0.3)
    measured = ("step", "gemm", "memory")
    assert results["ratios"].keys() == {f"{name}_vs_{row}" for name in measured for row in ("eager", "compile")}
    memory = results["peak_memory_bytes"]
    assert results["ratios"]["memory_vs_eager"] == memory["jax"] / memory["torch-eager"]
    expected = {"preset": "readable", "image_shape": [28, 28, 1], "num_classes": 10, "batch_size": 64, "rounds": 2}
    expected |= {"precision": "float32", "rows": ["jax", "torch-eager", "torch-compile"], "compile_mode": "best"}
    assert expected.items() <= results.items()
    assert {"device", "cores", "versions", "python", "commit"} <= results.keys()
    assert results["training_flops_per_image"] == training_flops(ModelConfig())
    median = 1e3 * results["median_seconds"]["jax"]["step"]
    row = next(line for line in printed.out.splitlines() if line.startswith("| jax "))
    assert row.split("|")[3].strip() == f"{median:.1f}"
    ratio = results["ratios"]["step_vs_compile"]
    assert f"A training step of JAX takes {ratio:.2f} of the time of torch-compile.\n" in printed.out
    assert "The machine was busy before it began, with a load of 1.2; times and ratios mean little.\n" in printed.out
    assert results["load_before"] == 1.25
    assert [line.split()[0] for line in printed.err.splitlines()] == ["step", "gemm"]


def test_what_was_measured_before_an_interruption_is_in_the_file(fake_rows, tmp_path, monkeypatch):
    def interrupted(*args, **options):
        yield next(measure(*args, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "measure", interrupted)
    path = tmp_path / "result.json"
    assert main(["benchmark", "--rounds", "2", "--measure", "step", "gemm", "--json", str(path)]) == 130
    samples = json.loads(path.read_text())["samples_seconds"]
    assert {row: list(of) for row, of in samples.items()} == {row: ["step"] for row in benchmark.ROWS}
    assert all(len(of["step"]) == 2 for of in samples.values())


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, UsageError("no")])
def test_no_process_is_left_behind(interruption, fake_rows, monkeypatch):
    started = []

    def interrupted(workers, *args, **options):
        started.extend(workers)
        raise interruption

    monkeypatch.setattr(benchmark, "measure", interrupted)
    assert main(["benchmark"]) in (2, 130)
    assert len(started) == 3
    assert all(process._process.returncode == -signal.SIGKILL for process in started)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--preset", "nothing"), "preset is 'nothing'; expected readable, digits"),
        (("--rows", "jax", "tf"), "rows is 'tf'; expected jax, torch-eager, torch-compile"),
        (("--rows",), "rows is empty; expected jax"),
        (("--measure", "loss"), "measure is 'loss'; expected step, inference"),
        (("--rounds", "1"), "rounds is 1, and must be at least 2"),
        (("--batch-size", "0"), "batch_size is 0, and must be at least 1"),
        (("--batch-size", "60001"), "batch_size is 60001, and must be at most 60000"),
        (("--num-classes", "1"), "num_classes is 1, and must be at least 2"),
        (("--image-shape", "28", "0", "1"), "image_shape is (28, 0, 1), and every size in it must be at least 1"),
        (("--image-shape", "16", "28", "1"), "Images of 16 x 28 are too small"),
        (("--preset", "em", "--measure", "decoder"), "measure is decoder, and the model of em has none"),
        (("--json", "nowhere/result.json"), "nowhere does not exist"),
        (("--json", "."), "json is ., which cannot be written: it is a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_option_is_one_sentence_before_any_process(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", None)
    assert main(["benchmark", "--rows", "jax", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_torch_is_asked_for_only_if_it_is_needed(monkeypatch, capsys):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    assert main(["benchmark"]) == 2
    assert 'PyTorch is not installed: pip install ".[torch]", or --rows jax.' in capsys.readouterr().err
    assert Benchmark(rows=("jax",), batch_size=7).validated_config().training.batch_size == 7


def test_rows_on_different_devices_are_refused():
    on_cpu, on_gpu = {"platform": "cpu", "device": "cpu"}, {"platform": "gpu", "device": "A GPU"}
    assert same_device({"jax": on_gpu, "torch-eager": on_gpu}) == ("gpu", "A GPU")
    with pytest.raises(UsageError, match="jax on cpu, torch-eager on A GPU; expected"):
        same_device({"jax": on_cpu, "torch-eager": on_gpu})
