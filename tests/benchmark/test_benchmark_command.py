"""The command `capsnet benchmark`: output, file, refused options, and no process left behind; without PyTorch."""

import json
import signal
import subprocess

import pytest

from capsnet_benchmark.flops import training_flops
from capsnet_benchmark.measurements import measure
from capsnet_benchmark.results import origin
from capsnet_jax.cli import benchmark
from capsnet_jax.cli.benchmark import Benchmark
from capsnet_jax.cli.main import main
from capsnet_jax.config import ModelConfig
from capsnet_jax.errors import UsageError


@pytest.fixture
def fake_rows(monkeypatch):
    """All rows are measured by `fake_work`."""
    monkeypatch.setattr(benchmark, "WORK", dict.fromkeys(benchmark.WORK, "tests.benchmark.fake_work"))
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: name)
    told = iter([origin(["jax"], "cpu")])  # only once, because the output file would make the checkout dirty
    monkeypatch.setattr(benchmark, "origin", lambda rows, device: next(told))


def test_the_command_prints_and_writes_results(fake_rows, tmp_path, monkeypatch, capsys):
    path = tmp_path / "result.json"
    monkeypatch.setattr(benchmark.os, "getloadavg", lambda: (1.25, 0.0, 0.0))
    assert main(["benchmark", "--rounds", "2", "--measure", "gemm", "step", "--json", str(path)]) == 0
    printed = capsys.readouterr()
    results = json.loads(path.read_text())
    assert list(results["median_seconds"]["jax"]) == ["step", "gemm"]  # memory is read after the steps alone
    measured = ("step", "gemm", "memory")
    assert results["ratios"].keys() == {f"{name}_vs_{row}" for name in measured for row in ("eager", "compile")}
    medians = results["median_seconds"]
    assert results["ratios"]["step_vs_eager"] == medians["jax"]["step"] / medians["torch-eager"]["step"]
    memory = results["peak_memory_bytes"]
    assert results["ratios"]["memory_vs_compile"] == memory["jax"] / memory["torch-compile"]
    expected = {"preset": "readable", "image_shape": [28, 28, 1], "num_classes": 10, "batch_size": 64, "rounds": 2}
    expected |= {"precision": "float32", "rows": ["jax", "torch-eager", "torch-compile"], "compile_mode": "best"}
    assert expected.items() <= results.items()
    assert {"device", "cores", "versions", "python", "commit"} <= results.keys()
    assert results["training_flops_per_image"] == sum(training_flops(ModelConfig()).values())
    ratio = results["ratios"]["memory_vs_eager"]
    assert f"Training by JAX takes {ratio:.2f} of the memory of torch-eager.\n" in printed.out
    assert results["load_before"] == 1.25
    assert [line.split()[0] for line in printed.err.splitlines()] == ["step", "gemm"]


def test_samples_before_an_interruption_are_in_the_file(fake_rows, tmp_path, monkeypatch):
    def interrupted(*args, **options):
        yield next(measure(*args, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "measure", interrupted)
    path = tmp_path / "result.json"
    assert main(["benchmark", "--rounds", "2", "--measure", "step", "gemm", "--json", str(path)]) == 130
    samples = json.loads(path.read_text())["samples_seconds"]
    assert {row: list(of) for row, of in samples.items()} == {row: ["step"] for row in benchmark.WORK}
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
        (("--preset", "nothing"), "Unknown preset 'nothing'; expected readable, digits"),
        (("--rows", "jax", "tf"), "rows is tf; expected jax, torch-eager, torch-compile"),
        (("--rows",), "rows is empty; expected jax"),
        (("--measure", "loss"), "measure is loss; expected step, inference"),
        (("--rounds", "1"), "rounds is 1, and must be at least 2"),
        (("--batch-size", "0"), "batch_size is 0, and must be at least 1"),
        (("--batch-size", "60001"), "batch_size is 60001, and must be at most 60000"),
        (("--num-classes", "0"), "num_classes is 0, and must be at least 1"),
        (("--image-shape", "28", "0", "1"), "image_shape is (28, 0, 1), and must be of sizes of at least 1"),
        (("--image-shape", "16", "28", "1"), "Images of 16 x 28 are too small"),
        (("--preset", "em", "--measure", "decoder"), "measure is decoder, and the model of em has none"),
        (("--json", "nowhere/result.json"), "json is nowhere/result.json; expected a file in a folder that exists"),
        (("--json", "."), "json is .; expected a file in a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_option_is_refused_in_one_line_before_any_process(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", None)
    assert main(["benchmark", "--rows", "jax", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_pytorch_is_required_only_for_its_rows(monkeypatch, capsys):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    assert main(["benchmark"]) == 2
    assert 'PyTorch is not installed: pip install ".[torch]", or --rows jax.' in capsys.readouterr().err
    assert Benchmark(rows=("jax",), batch_size=7).validated_config().training.batch_size == 7
