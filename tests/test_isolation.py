"""capsnet_jax runs without torch and proof, capsnet_torch without JAX, and the help of `capsnet` with neither."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "capsnet_jax": ["torch", "capsnet_torch", "capsnet_verify"],
    "capsnet_jax without its commands": ["torch", "capsnet_torch", "capsnet_verify", "capsnet_benchmark"],
    "capsnet_torch": ["jax", "flax", "optax", "capsnet_jax", "capsnet_verify"],
    "capsnet_benchmark": ["torch", "capsnet_torch", "capsnet_verify"],
}
# What takes long to import, and only some commands need.
HEAVY = ["torch", "matplotlib", "orbax", "sklearn", "tensorstore", "capsnet_benchmark", "capsnet_verify"]


def modules_of(package: str) -> list[str]:
    """The package and all modules in it, by name."""
    package, _, without = package.partition(" without ")
    names = [package]
    folder = ROOT / package
    for path in sorted(folder.rglob("*.py")):
        parts = [part for part in path.relative_to(ROOT).with_suffix("").parts if part != "__init__"]
        if parts[-1] != "__main__" and not (without and parts[1:2] == ["cli"]):
            names.append(".".join(parts))
    return names


def imports_without(forbidden: list[str], statement: str) -> subprocess.CompletedProcess[str]:
    """Runs a statement in a process in which the forbidden packages cannot be imported."""
    program = f"import sys\nfor name in {forbidden}: sys.modules[name] = None\n{statement}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_the_modules_are_all_of_a_package():
    assert {"capsnet_jax", "capsnet_jax.nn.model", "capsnet_jax.cli.verify"} < set(modules_of("capsnet_jax"))
    commands = set(modules_of("capsnet_jax")) - set(modules_of("capsnet_jax without its commands"))
    assert {"capsnet_jax.cli", "capsnet_jax.cli.main", "capsnet_jax.cli.verify"} < commands
    assert all(name.startswith("capsnet_jax.cli") for name in commands)


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


@pytest.mark.parametrize("arguments", [["--help"], [], ["--version"]])
def test_the_help_imports_nothing_that_only_commands_need(arguments):
    program = f"from capsnet_jax.cli.main import main; assert main({arguments}) == 0"
    result = imports_without(HEAVY, program)
    assert result.returncode == 0, result.stderr
    # None of them was tried, either, as an import inside `try` would be.
    listed = f"import sys; {program}; print(*sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", listed], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == ""


def test_a_command_imports_itself_and_no_other():
    program = (
        "import sys, capsnet_jax.cli.main as console\n"
        "try: console.main(['convert', '--help'])\n"
        "except SystemExit: pass\n"
        "print(*(name for name in sys.modules if name.startswith('capsnet_jax.cli.')), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "usage: capsnet convert" in result.stdout
    assert result.stderr.split() == ["capsnet_jax.cli.main", "capsnet_jax.cli.convert"]
