"""capsnet_jax runs without torch, capsnet_torch without JAX."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "capsnet_jax": ["torch", "capsnet_torch"],
    "capsnet_torch": ["jax", "flax", "optax", "capsnet_jax", "capsnet_verify"],
    "capsnet_benchmark": ["torch", "capsnet_torch"],
    "capsnet_verify.command": ["torch", "capsnet_torch"],  # by which the others are imported when it runs
}


def modules_of(package: str) -> list[str]:
    """The package and all modules in it, by name."""
    names = [package]
    folder = ROOT / package
    for path in sorted(folder.rglob("*.py")):
        parts = [part for part in path.relative_to(ROOT).with_suffix("").parts if part != "__init__"]
        if parts[-1] != "__main__":
            names.append(".".join(parts))
    return names


def imports_without(forbidden: list[str], statement: str) -> subprocess.CompletedProcess[str]:
    """Runs a statement in a process in which the forbidden packages cannot be imported."""
    program = f"import sys\nfor name in {forbidden}: sys.modules[name] = None\n{statement}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_package_imports_without_the_other_framework(package):
    if package == "capsnet_torch":
        pytest.importorskip("torch")
    result = imports_without(FORBIDDEN[package], f"import {', '.join(modules_of(package))}")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("package", FORBIDDEN)
def test_the_test_above_would_notice(package):
    for name in FORBIDDEN[package]:
        result = imports_without(FORBIDDEN[package], f"import {name}")
        assert result.returncode != 0
        assert f"import of {name} halted" in result.stderr
