"""Imports run downwards only, and each package works without the frameworks that it must not need."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.processes import run_without

ROOT = Path(__file__).parents[1]
PRODUCT, PROOF = "capsnet_jax", ("capsnet_verify", "capsnet_benchmark")
# Folders and files at the top of the product, from the lowest layer to the highest. Each may import lower layers only.
# `__init__` holds the public names; inside the package, only the command line imports it.
LAYERS = (
    ("errors", "files", "tables"),
    ("capsules", "compilation"),
    ("ops",),
    ("routing",),
    ("config",),
    ("presets",),
    ("nn",),
    ("data", "figures", "interchange"),
    ("train",),
    ("runs",),
    ("explore",),
    ("__init__",),
    ("cli",),
    ("__main__",),
)
LAYER = {part: number for number, parts in enumerate(LAYERS) for part in parts}
# These must not import routing, although they are above it.
NARROW = {"config": ("capsules", "errors"), "presets": ("config", "errors")}
OUTSIDE = ("torch", "capsnet_torch", *PROOF)
# A module of capsnet_torch reads PyTorch files; it is imported only for such a file.
EXCEPTIONS = {("capsnet_jax/interchange/state_files.py", "capsnet_torch.state_files")}
MOST_AT_THE_TOP = 10  # files

# What each package must work without, and what the help must not import because it is slow.
FORBIDDEN = {
    "capsnet_jax": ["torch", "capsnet_torch", "capsnet_verify"],
    "capsnet_jax without cli": ["torch", "capsnet_torch", "capsnet_verify", "capsnet_benchmark"],
    "capsnet_torch": ["jax", "flax", "optax", "capsnet_jax", "capsnet_verify"],
    "capsnet_benchmark": ["torch", "capsnet_torch", "capsnet_verify"],
}
SLOW = ["torch", "matplotlib", "orbax", "sklearn", "tensorstore", "capsnet_benchmark", "capsnet_verify"]


class Import(NamedTuple):
    """An import statement: its file and line, and the module that is imported."""

    file: str
    line: int
    module: str

    @property
    def part(self) -> str:
        """The folder, or file at the top of the package, that the statement is in."""
        return self.file.removesuffix(".py").split("/")[1]


def imports_of(root: Path, package: str) -> Iterator[Import]:
    """All imports in a package, also those inside functions and by `import_module("...")`."""
    for path in sorted((root / package).rglob("*.py")):
        file = path.relative_to(root).as_posix()
        for node in ast.walk(ast.parse(path.read_text(), file)):
            for module in imported_modules(node, file, root):
                yield Import(file, node.lineno, module)


def imported_modules(node: ast.AST, file: str, root: Path) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        parents = file.removesuffix(".py").split("/")[: -node.level] if node.level else []
        module = ".".join([*parents, *filter(None, [node.module])])
        names = [f"{module}.{alias.name}" for alias in node.names]
        return list(dict.fromkeys(name if is_module(root, name) else module for name in names))
    if isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("import_module", "__import__"):
            return [str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant)]
    return []


def is_module(root: Path, name: str) -> bool:
    path = root / Path(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def part_of(module: str) -> str:
    """The folder, or file at the top, that a module of the product belongs to."""
    return [*module.split("."), "__init__"][1]


def upward_imports(root: Path) -> list[str]:
    return [
        f"{one.file}:{one.line}: {one.part} imports {one.module}; expected only layers below it"
        for one in imports_of(root, PRODUCT)
        if is_in(one.module, PRODUCT)
        and (there := part_of(one.module)) != one.part
        and (LAYER[there] >= LAYER[one.part] or there not in NARROW.get(one.part, LAYER))
    ]


def imports_from_outside(root: Path) -> list[str]:
    """Imports of torch, `capsnet_torch`, `capsnet_verify` or `capsnet_benchmark` in the product outside commands."""
    return [
        f"{one.file}:{one.line}: {one.module} is imported; only files in {PRODUCT}/cli may do so"
        for one in imports_of(root, PRODUCT)
        if any(is_in(one.module, package) for package in OUTSIDE)
        and one.part != "cli"
        and (one.file, one.module) not in EXCEPTIONS
    ]


def imports_of_commands(root: Path) -> list[str]:
    """Imports of the command line in the other packages."""
    return [
        f"{one.file}:{one.line}: {one.module} is imported; expected nothing of the command line"
        for package in PROOF
        for one in imports_of(root, package)
        if is_in(one.module, f"{PRODUCT}.cli")
    ]


def test_imports_run_downwards_only():
    assert upward_imports(ROOT) == []


def test_the_product_imports_neither_torch_nor_proof_nor_measurements():
    assert imports_from_outside(ROOT) == []


def test_proof_and_measurements_do_not_import_commands():
    assert imports_of_commands(ROOT) == []


def test_every_part_has_a_layer_and_few_files_are_at_the_top():
    files = {path.stem for path in (ROOT / PRODUCT).glob("*.py")}
    parts = files | {path.parent.name for path in (ROOT / PRODUCT).glob("*/__init__.py")}
    assert parts == set(LAYER)
    assert len(files) <= MOST_AT_THE_TOP


@pytest.fixture
def project(tmp_path):
    """A small project that keeps all rules."""
    files = {
        "errors.py": "",
        "config.py": "from capsnet_jax.errors import UsageError\n",
        "routing/dynamic.py": "import jax\nfrom capsnet_jax import errors\n",
        "nn/model.py": "from capsnet_jax.routing import dynamic\nfrom ..config import Config\n",
        "cli/verify.py": "def run():\n    import torch\n    from capsnet_verify import values\n",
        "interchange/state_files.py": "import importlib\nimportlib.import_module('capsnet_torch.state_files')\n",
    }
    for name, text in files.items():
        write(tmp_path / PRODUCT / name, text)
    write(tmp_path / "capsnet_verify" / "values.py", "import torch\nimport capsnet_jax.nn.model\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "__init__.py").touch()
    path.write_text(text)


def test_a_project_that_keeps_the_rules_passes(project):
    assert upward_imports(project) == imports_from_outside(project) == imports_of_commands(project) == []
    assert len(list(imports_of(project, PRODUCT))) == 9


@pytest.mark.parametrize(
    ("file", "text", "line"),
    [
        ("nn/model.py", "import jax\nimport capsnet_jax.cli.verify\n", 2),
        ("errors.py", "\n\nfrom capsnet_jax.nn.model import CapsNet\n", 3),
        ("errors.py", "from capsnet_jax import config\n", 1),
        ("routing/dynamic.py", "from capsnet_jax import CapsNet\n", 1),
        ("config.py", "from capsnet_jax.errors import UsageError\nfrom capsnet_jax.routing import dynamic\n", 2),
        ("routing/dynamic.py", "def f():\n    if True:\n        from capsnet_jax.nn import model\n", 3),
        ("routing/dynamic.py", "from ..nn.model import CapsNet\n", 1),
        ("routing/dynamic.py", "import importlib\n\nimportlib.import_module('capsnet_jax.nn.model')\n", 3),
    ],
)
def test_an_upward_import_is_found(file, text, line, project):
    write(project / PRODUCT / file, text)
    (message,) = upward_imports(project)
    assert message.startswith(f"capsnet_jax/{file}:{line}: ")


@pytest.mark.parametrize(
    "text",
    [
        "import torch.nn\n",
        "from torch import nn\n",
        "from capsnet_torch.model import CapsNet\n",
        "import importlib\ntorch = importlib.import_module('capsnet_torch.onnx')\n",
        "def f():\n    import capsnet_verify\n",
    ],
)
def test_an_import_from_outside_is_found(text, project):
    write(project / PRODUCT / "interchange" / "state_files.py", text)
    (message,) = imports_from_outside(project)
    assert message.startswith(f"capsnet_jax/interchange/state_files.py:{len(text.splitlines())}: ")


def test_a_similar_name_is_not_an_import_from_outside(project):
    write(project / PRODUCT / "nn" / "model.py", "import torchvision\nimport capsnet_torchlike\n")
    assert imports_from_outside(project) == []


def test_an_import_of_a_command_is_found(project):
    write(project / "capsnet_verify" / "values.py", "from capsnet_jax.cli.verify import Verify\n")
    (message,) = imports_of_commands(project)
    assert message.startswith("capsnet_verify/values.py:1: capsnet_jax.cli.verify is imported")


def modules_of(package: str) -> list[str]:
    """The names of a package and of all modules in it."""
    package, _, without = package.partition(" without ")
    paths = [path.relative_to(ROOT).with_suffix("") for path in sorted((ROOT / package).rglob("*.py"))]
    parts = [[part for part in path.parts if part != "__init__"] for path in paths if path.name != "__main__"]
    return [".".join(names) for names in parts if not (without and names[1:2] == [without])]


def test_the_modules_of_a_package_are_found():
    names = set(modules_of("capsnet_jax"))
    assert {"capsnet_jax", "capsnet_jax.nn.model", "capsnet_jax.cli.main", "capsnet_jax.cli.verify"} < names
    commands = names - set(modules_of("capsnet_jax without cli"))
    assert {"capsnet_jax.cli", "capsnet_jax.cli.main"} < commands
    assert all(name.startswith("capsnet_jax.cli") for name in commands)


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_package_imports_without_the_other_framework(package):
    if package == "capsnet_torch":
        pytest.importorskip("torch")
    result = run_without(FORBIDDEN[package], f"import {', '.join(modules_of(package))}")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", sorted({name for names in FORBIDDEN.values() for name in names}))
def test_the_test_above_would_notice_an_import(name):
    result = run_without([name], f"import {name}")
    assert result.returncode != 0
    assert f"import of {name} halted" in result.stderr


def test_the_help_imports_nothing_slow():
    watch = (
        "class Finder:\n"
        "    def find_spec(name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {SLOW}: print('tried', name, file=sys.stderr)\n"
        "sys.meta_path.insert(0, Finder)\n"
    )
    show = (
        "from capsnet_jax.cli.main import main\n"
        "assert [main(arguments) for arguments in (['--help'], [], ['--version'])] == [0, 0, 0]\n"
    )
    result = run_without([], watch + show)
    assert (result.returncode, result.stderr) == (0, "")
    # The same program notices an import; that of torch itself would take seconds.
    assert "tried torch" in run_without([], watch + "import importlib.util\nimportlib.util.find_spec('torch')").stderr


def test_a_command_imports_no_other_command():
    program = (
        "import sys, capsnet_jax.cli.main as console\n"
        "try: console.main(['convert', '--help'])\n"
        "except SystemExit: pass\n"
        "print(*(name for name in sys.modules if name.startswith('capsnet_jax.cli.')), file=sys.stderr)"
    )
    result = run_without([], program)
    assert "usage: capsnet convert" in result.stdout
    assert result.stderr.split() == ["capsnet_jax.cli.main", "capsnet_jax.cli.convert"]
