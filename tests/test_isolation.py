"""capsnet_jax runs without torch, capsnet_torch without JAX."""

import subprocess
import sys

import pytest

MODULES = {
    "capsnet_jax": """
        architecture assessment benchmark.command benchmark.jax_epoch benchmark.jax_work benchmark.worker
        check_routing checkpoint cli compare conv_capsules convert convolution data.augmentation data.folder
        data.npz data.synthetic data.tfds decoder encoder evaluate evaluation export feeding figures files fit
        layers losses memory metrics model model_card ops optimizer precision predict presets programs progress
        progress_bar report routing runs seeds session sharding signals stablehlo state_files stem train trainer
        training weights""",
    "capsnet_torch": """
        augmentation benchmark conv_capsules layers losses model onnx ops routing routing.binding state_files
        training""",
    "capsnet_verify": "command",  # of which the others are imported when it runs
}
FORBIDDEN = {
    "capsnet_jax": ["torch", "capsnet_torch"],
    "capsnet_torch": ["jax", "flax", "optax", "capsnet_jax", "capsnet_verify"],
    "capsnet_verify": ["torch", "capsnet_torch"],
}


def imports_without(forbidden: list[str], statement: str) -> subprocess.CompletedProcess[str]:
    """Runs a statement in a process in which the forbidden packages cannot be imported."""
    program = f"import sys\nfor name in {forbidden}: sys.modules[name] = None\n{statement}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


@pytest.mark.parametrize("package", MODULES)
def test_a_package_imports_without_the_other_framework(package):
    if package == "capsnet_torch":
        pytest.importorskip("torch")
    statement = f"import {package}, " + ", ".join(f"{package}.{module}" for module in MODULES[package].split())
    result = imports_without(FORBIDDEN[package], statement)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("package", MODULES)
def test_the_test_above_would_notice(package):
    for name in FORBIDDEN[package]:
        result = imports_without(FORBIDDEN[package], f"import {name}")
        assert result.returncode != 0
        assert f"import of {name} halted" in result.stderr
