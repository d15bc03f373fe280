"""What a GPU would run in a training step must not grow. Needs `pip install ".[gpu-plan]"` to compile for an H100."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The preset `readable` in bfloat16 at batch size 256. The numbers depend a little on the version of XLA.
LIMITS = {
    "kernels of a step": 125,  # to be 110
    "operations of convolutions, over the direct algorithm": 1.25,
    "convolutions of operands with zeros between their elements": 0,
    "exchanges with the host in a chunk of steps": 0,
    "bytes of the state that are not written in place": 0,
    "bytes of memory at its peak": 450e6,
}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="XLA for NVIDIA GPUs is not installed."
)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    script = [sys.executable, ROOT / "benchmarks" / "gpu_plan.py", "--json", path]
    without_flags = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # of conftest.py
    subprocess.run(script, check=True, env=without_flags)
    return json.loads(path.read_text())


@pytest.mark.parametrize("what", LIMITS)
def test_a_training_step_stays_within(what, plan):
    found = {
        "kernels of a step": plan["total"]["kernels"],
        "operations of convolutions, over the direct algorithm": plan["convolution_flops"],
        "convolutions of operands with zeros between their elements": len(plan["dilated"]),
        "exchanges with the host in a chunk of steps": len(plan["host"]),
        "bytes of the state that are not written in place": plan["memory"]["state"] - plan["memory"]["aliased"],
        "bytes of memory at its peak": plan["memory"]["peak"],
    }
    assert found[what] <= LIMITS[what]


def test_all_products_of_the_model_are_in_the_plan(plan):
    assert (plan["preset"], plan["batch_size"], plan["precision"]) == ("readable", 256, "bfloat16")
    for part in ("stem", "primary_capsules", "decoder"):
        assert plan["parts"][part]["flops"] >= plan["parts"][part]["needed_flops"] > 0
    assert sum(part["flops"] for part in plan["parts"].values()) >= plan["total"]["needed_flops"]
