"""The rooms of the house: imports run downwards only, and the product does without proof, measurements and torch."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT, HOUSES = "capsnet_jax", ("capsnet_verify", "capsnet_benchmark")
# Rooms of the product, folders and files at its top, from the lowest floor to the highest. A room may import those on
# lower floors, and no other. The public face, `__init__`, is for users and imported by no room but the command line.
FLOORS = (
    ("capsules", "errors", "files", "tables"),
    ("ops",),
    ("routing",),
    ("config",),
    ("presets",),
    ("nn",),
    ("data", "figures", "interchange"),
    ("train",),
    ("runs",),
    ("__init__",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ONLY = {
    "config": ("capsules", "errors"),
    "presets": ("config", "errors"),
}  # though they are on a higher floor than routing
OUTSIDE = ("torch", "capsnet_torch", *HOUSES)
# Files of PyTorch are read by the twin's module when there is one to read; all else of `interchange` needs no torch.
EXCEPTIONS = {("capsnet_jax/interchange/state_files.py", "capsnet_torch.state_files")}
MOST_AT_THE_TOP = 10  # files


class Import(NamedTuple):
    """An import of a module: the file and line that it stands in, and what is imported."""

    file: str
    line: int
    module: str


def imports_of(root: Path, package: str) -> Iterator[Import]:
    """All imports in a package, those inside functions and those by `import_module("...")` included.

    Of `from package import name` the module is the submodule of that name, if there is one.
    """
    for path in sorted((root / package).rglob("*.py")):
        file = path.relative_to(root).as_posix()
        for node in ast.walk(ast.parse(path.read_text(), file)):
            if isinstance(node, ast.Import):
                for name in (alias.name for alias in node.names):
                    yield Import(file, node.lineno, name)
            elif isinstance(node, ast.ImportFrom):
                module = node.module or ""
                if node.level:
                    parts = file.removesuffix(".py").split("/")[: -node.level]
                    module = ".".join([*parts, *filter(None, [module])])
                names = [_submodule(root, f"{module}.{name.name}") or module for name in node.names]
                for name in dict.fromkeys(names):
                    yield Import(file, node.lineno, name)
            elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
                for name in (part.value for part in node.args[:1] if isinstance(part, ast.Constant)):
                    yield Import(file, node.lineno, str(name))


def _submodule(root: Path, module: str) -> str | None:
    path = root / Path(*module.split("."))
    return module if path.with_suffix(".py").exists() or (path / "__init__.py").exists() else None


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def room_of(module: str) -> str:
    """The room that a module of the product lies in; that of the package itself is `__init__`."""
    return [*module.split("."), "__init__"][1]


def room_of_file(file: str) -> str:
    return file.removesuffix(".py").split("/")[1]


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def upward_arrows(root: Path) -> list[str]:
    """Imports in the product of a room that is not on a lower floor, each as file, line and what is wrong."""
    found = []
    for file, line, module in imports_of(root, PRODUCT):
        if not is_in(module, PRODUCT):
            continue
        here, there = room_of_file(file), room_of(module)
        if here == there:
            continue
        if FLOOR[there] >= FLOOR[here] or there not in ONLY.get(here, FLOOR):
            found.append(f"{file}:{line}: {here} imports {module}; expected only rooms below it")
    return found


def imports_from_outside(root: Path) -> list[str]:
    """Imports of torch, the twin, proof or measurements in the product, but for its files in `cli`."""
    return [
        f"{file}:{line}: {module} is imported; only files in {PRODUCT}/cli may do so"
        for file, line, module in imports_of(root, PRODUCT)
        if any(is_in(module, package) for package in OUTSIDE)
        and room_of_file(file) != "cli"
        and (file, module) not in EXCEPTIONS
    ]


def imports_of_commands(root: Path) -> list[str]:
    """Imports of the command line in the houses beside the product."""
    return [
        f"{file}:{line}: {module} is imported; expected nothing of the command line"
        for house in HOUSES
        for file, line, module in imports_of(root, house)
        if is_in(module, f"{PRODUCT}.cli")
    ]


def arrows(root: Path) -> set[tuple[str, str]]:
    """Pairs of rooms of the product, or houses beside it, of which the first imports the second."""
    packages = [PRODUCT, *(house for house in HOUSES if (root / house).exists())]

    def room(package: str, room: str) -> str:
        return room if package == PRODUCT else package

    return {
        (room(package, room_of_file(file)), room(target, room_of(module)))
        for package in packages
        for file, _, module in imports_of(root, package)
        for target in packages
        if is_in(module, target) and room(package, room_of_file(file)) != room(target, room_of(module))
    }


def test_imports_run_downwards_only():
    assert upward_arrows(ROOT) == []


def test_the_product_imports_neither_torch_nor_proof_nor_measurements():
    assert imports_from_outside(ROOT) == []


def test_proof_and_measurements_do_without_the_command_line():
    assert imports_of_commands(ROOT) == []


def test_every_room_has_a_floor_and_few_files_lie_at_the_top():
    files = {path.stem for path in (ROOT / PRODUCT).glob("*.py")}
    rooms = files | {path.parent.name for path in (ROOT / PRODUCT).glob("*/__init__.py")}
    assert rooms == set(FLOOR)
    assert len(files) <= MOST_AT_THE_TOP


def test_rooms_and_arrows_are_counted(capsys):
    found = arrows(ROOT)
    with capsys.disabled():
        print(f"\n{len(found)} arrows between {len({room for arrow in found for room in arrow})} rooms and houses")
    assert ("nn", "routing") in found
    assert ("capsnet_verify", "nn") in found


@pytest.fixture
def house(tmp_path):
    """A small house that keeps all rules."""
    files = {
        "errors.py": "",
        "config.py": "from capsnet_jax.errors import UsageError\n",
        "routing/dynamic.py": "import jax\nfrom capsnet_jax import errors\n",
        "nn/model.py": "from capsnet_jax.routing import dynamic\nfrom ..config import Config\n",
        "cli/verify.py": "def run():\n    import torch\n    from capsnet_verify import pair\n",
        "interchange/state_files.py": "import importlib\nimportlib.import_module('capsnet_torch.state_files')\n",
    }
    for name, text in files.items():
        write(tmp_path / PRODUCT / name, text)
    write(tmp_path / "capsnet_verify" / "pair.py", "import torch\nimport capsnet_jax.nn.model\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "__init__.py").touch()
    path.write_text(text)


def test_a_house_that_keeps_the_rules_passes(house):
    assert upward_arrows(house) == imports_from_outside(house) == imports_of_commands(house) == []
    expected = {("config", "errors"), ("routing", "errors"), ("nn", "routing"), ("nn", "config")}
    assert arrows(house) == expected | {("cli", "capsnet_verify"), ("capsnet_verify", "nn")}


@pytest.mark.parametrize(
    ("file", "text", "line"),
    [
        ("nn/model.py", "import jax\nimport capsnet_jax.cli.verify\n", 2),
        ("errors.py", "\n\nfrom capsnet_jax.nn.model import CapsNet\n", 3),
        ("errors.py", "from capsnet_jax import config\n", 1),
        ("routing/dynamic.py", "from capsnet_jax import CapsNet\n", 1),
        ("routing/dynamic.py", "from capsnet_jax.config import Config\n", 1),
        ("config.py", "from capsnet_jax.errors import UsageError\nfrom capsnet_jax.routing import dynamic\n", 2),
        ("routing/dynamic.py", "def f():\n    if True:\n        from capsnet_jax.nn import model\n", 3),
        ("routing/dynamic.py", "from ..nn.model import CapsNet\n", 1),
        ("routing/dynamic.py", "import importlib\n\nimportlib.import_module('capsnet_jax.nn.model')\n", 3),
        ("routing/dynamic.py", "from importlib import import_module\nimport_module('capsnet_jax.nn')\n", 2),
    ],
)
def test_an_upward_arrow_is_caught_with_its_file_and_line(file, text, line, house):
    write(house / PRODUCT / file, text)
    (message,) = upward_arrows(house)
    assert message.startswith(f"capsnet_jax/{file}:{line}: ")
    assert message.endswith("; expected only rooms below it")


@pytest.mark.parametrize(
    "text",
    [
        "import torch\n",
        "import torch.nn\n",
        "from torch import nn\n",
        "from capsnet_torch.model import CapsNet\n",
        "import importlib\ntorch = importlib.import_module('capsnet_torch.onnx')\n",
        "def f():\n    from capsnet_benchmark.worker import peak_memory_of_process\n",
        "def f():\n    import capsnet_verify\n",
    ],
)
def test_what_is_from_outside_is_caught_with_its_file_and_line(text, house):
    write(house / PRODUCT / "interchange" / "state_files.py", text)
    (message,) = imports_from_outside(house)
    assert message.startswith(f"capsnet_jax/interchange/state_files.py:{len(text.splitlines())}: ")


def test_what_only_sounds_alike_is_not_caught(house):
    write(house / PRODUCT / "nn" / "model.py", "import torchvision\nimport capsnet_torchlike\n")
    assert imports_from_outside(house) == []


def test_proof_that_imports_a_command_is_caught(house):
    write(house / "capsnet_verify" / "pair.py", "from capsnet_jax.cli.verify import Verify\n")
    (message,) = imports_of_commands(house)
    assert message.startswith("capsnet_verify/pair.py:1: capsnet_jax.cli.verify is imported")
