"""The scripts in benchmarks/ that need PyTorch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_twin_is_measured_on_a_layer_of_the_same_sizes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import scaling_work

    work = scaling_work.Work(row="torch-eager", fixed={"batch": 2, "inputs": 7})
    assert (work.platform, work.device) == ("cpu", "cpu")
    ((call, _),) = work.prepare("iterations=3")
    results = call()
    # As in tests/benchmark/test_benchmark_scripts.py of the JAX layer.
    assert [tuple(result.shape) for result in results] == [(2, 10, 16), (7, 8, 10, 16), (2, 7, 8)]
    assert all(result.abs().max() > 0.01 for result in results)
    assert work.memory()["xla_temp_bytes"] is None


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
    checked = json.loads((tmp_path / "cpu-small-parity.json").read_text())
    assert [(of["model"], of["status"]) for of in checked["verifications"]] == [("routing uniform", 0)]
