"""The scripts in benchmarks/ with PyTorch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from capsnet_benchmark.measurements import SIZES
from capsnet_torch.benchmark import Work

ROOT = Path(__file__).parents[1]


def test_the_layer_of_scaling_curves_has_the_same_sizes_as_in_jax(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import scaling_curves

    work = Work(config=scaling_curves.layer_config(2, 7, 3), **SIZES, compile_mode="eager")
    ((call, _),) = work.prepare("routing")
    results = call()
    # As in tests/benchmark/test_benchmark_scripts.py, but activations of dynamic routing have no gradient.
    shapes = [None if result is None else tuple(result.shape) for result in results]
    assert shapes == [(2, 10, 16), (2, 10), (2, 7, 8), None, (7, 8, 10, 16)]
    assert all(result.abs().max() > 1e-3 for result in results if result is not None)
    assert work.size(results) == 4 * (2 * 10 * 17 + 2 * 7 * 8 + 7 * 8 * 10 * 16)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_all_of_gpu_sh_on_cpu_in_tiny_sizes(tmp_path):
    result = subprocess.run(
        ["bash", ROOT / "benchmarks" / "gpu.sh", tmp_path],
        env=os.environ | {"SMALL": "1", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    folder = [line.split(maxsplit=3) for line in result.stdout.split(f"=== {tmp_path}\n")[1].splitlines()]
    names = ["epoch", "float32", "bfloat16", "parts", "fused", "parity", "scaling"]
    assert [(name, told) for name, _, _, told in folder] == [(name, "ok") for name in names]
    results = {
        name: json.loads((tmp_path / f"cpu-small-{name}.json").read_text()) for name in names if name != "parity"
    }
    assert results["epoch"]["calls_per_epoch"] == 1
    for name in ("float32", "bfloat16"):
        assert {"step_vs_eager", "memory_vs_eager", "gemm_vs_eager"} == results[name]["ratios"].keys()
    assert {"inference_vs_eager", "dispatch_vs_eager", "epoch_vs_eager"} == results["parts"]["ratios"].keys()
    assert results["bfloat16"]["precision"] == "bfloat16"
    assert results["fused"]["routing_implementation"] == "fused"
    assert {point["row"] for point in results["scaling"]["points"]} == {"jax-fused", "jax-votes", "torch-eager"}
    assert all(len(point["seconds"]) == 2 for point in results["scaling"]["points"])
    assert (tmp_path / "cpu-small-scaling.csv").exists()
    checked = json.loads((tmp_path / "cpu-small-parity.json").read_text())
    assert [(of["model"], of["status"]) for of in checked["verifications"]] == [("routing uniform", 0)]
