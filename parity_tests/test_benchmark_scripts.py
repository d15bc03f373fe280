"""The scripts in benchmarks/ that need PyTorch, and the table of errors that one of them makes on a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from parity_tests import table
from parity_tests.compare import TOLERANCE
from parity_tests.test_routing import Case

ROOT = Path(__file__).parents[1]


def test_the_twin_is_measured_on_a_layer_of_the_same_sizes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import scaling_work

    work = scaling_work.Work(row="torch-eager", fixed={"batch": 2, "inputs": 7})
    assert (work.platform, work.device) == ("cpu", "cpu")
    ((call, _),) = work.prepare("iterations=3")
    results = call()
    # As in tests/test_benchmark_scripts.py of the JAX layer.
    assert [tuple(result.shape) for result in results] == [(2, 10, 16), (7, 8, 10, 16), (2, 7, 8)]
    assert all(result.abs().max() > 0.01 for result in results)
    assert work.memory()["xla_temp_bytes"] is None


@pytest.fixture
def few_checks(monkeypatch):
    """Two checks whose errors are 2e-6 and 3e-6 of the largest value, and no routing."""
    expected = np.array([-2.0, 1.0])
    checks = [("stem", expected + 4e-6, expected), ("poses", expected - 6e-6, expected)]
    monkeypatch.setattr(table, "make_pair", lambda dtype: None)
    monkeypatch.setattr(table, "divergences", lambda pair: iter(checks))
    monkeypatch.setattr(table, "every_case", list)


def test_the_table_is_printed_though_an_error_is_too_large(few_checks, capsys):
    with pytest.raises(SystemExit) as exit_:
        table.main([])
    assert str(exit_.value.code).splitlines() == [
        "",
        "Larger than tolerated:",
        "stem, float64: 2.0e-06, tolerated 1e-12",
        "poses, float64: 3.0e-06, tolerated 1e-12",
    ]
    printed = capsys.readouterr().out.splitlines()
    assert "| poses | 3.0e-06 | 3.0e-06 |" in printed
    assert "| **largest** | 3.0e-06 | 3.0e-06 |" in printed
    assert "| routing | forward float64 | gradients float64 | forward float32 | gradients float32 |" in printed


def test_the_table_is_fine_with_what_is_tolerated(few_checks, monkeypatch, capsys):
    monkeypatch.setitem(table.TOLERANCES, "cpu", TOLERANCE | {"float64": 1e-5})
    table.main(["--device", "cpu"])
    assert "| tolerated | 1e-05 | 2e-05 |" in capsys.readouterr().out


def test_routings_are_those_of_the_numbers_of_iterations_that_are_asked_for(few_checks, monkeypatch, capsys):
    cases = [Case("dynamic", 1), Case("dynamic", 3), Case("uniform", 1)]
    monkeypatch.setattr(table, "every_case", lambda: cases)
    computed, names = [], ("poses", "gradient of votes")
    monkeypatch.setattr(
        table, "in_jax", lambda case, dtype: computed.append(str(case)) or dict.fromkeys(names, np.ones(2))
    )
    monkeypatch.setattr(table, "in_torch", lambda case, dtype: dict.fromkeys(names, np.array([1.0, 0.999999])))
    errors = table.print_routings({"float64": 1e-7}, [3])
    assert computed == ["dynamic, 3", "uniform, 1"]
    assert errors == [
        f"{name}, {kind} float64: 1.0e-06, tolerated 1e-07"
        for name in ("dynamic", "uniform")
        for kind in ("forward", "gradients")
    ]


def test_a_gpu_that_is_not_there_is_an_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        table.main(["--device", "gpu"])
    assert "--device gpu needs a GPU that both JAX and PyTorch can use." in capsys.readouterr().err


@pytest.mark.slow
def test_everything_that_is_for_a_gpu_on_cpu_in_tiny_sizes(tmp_path):
    result = subprocess.run(
        ["bash", ROOT / "benchmarks" / "gpu.sh", tmp_path],
        env=os.environ | {"SMALL": "1", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    folder = [line.split(maxsplit=3) for line in result.stdout.split(f"=== {tmp_path}\n")[1].splitlines()]
    names = ["epoch", "float32", "bfloat16", "parts", "votes", "parity", "scaling"]
    assert [(name, told) for name, _, _, told in folder] == [(name, "ok") for name in names]
    results = {
        name: json.loads((tmp_path / f"cpu-small-{name}.json").read_text()) for name in names if name != "parity"
    }
    assert results["epoch"]["calls_per_epoch"] == 1
    for name in ("float32", "bfloat16"):
        assert {"step_vs_eager", "memory_vs_eager", "gemm_vs_eager"} == results[name]["ratios"].keys()
    assert {"inference_vs_eager", "dispatch_vs_eager", "epoch_vs_eager"} == results["parts"]["ratios"].keys()
    assert results["bfloat16"]["precision"] == "bfloat16"
    assert results["votes"]["routing_implementation"] == "votes"
    assert {point["row"] for point in results["scaling"]["points"]} == {"jax-fused", "jax-votes", "torch-eager"}
    assert all(len(point["seconds"]) == 2 for point in results["scaling"]["points"])
    assert (tmp_path / "cpu-small-scaling.csv").exists()
    assert "| poses 0 |" in result.stdout
