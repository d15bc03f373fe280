"""The notebook docs/tutorial.ipynb runs, and prints and draws what it was committed with."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from capsnet_jax import load_dataset

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tutorial.ipynb"
CODE = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
SIZE, SMALLER = "EPOCHS, SEEDS = 5, 3", "EPOCHS, SEEDS = 1, 2"


def without_some_numbers(cell: dict[str, Any], text: str) -> str:
    """A text in which numbers are left out, if the cell is marked as one whose numbers vary with the machine."""
    return re.sub(r"\d[\d.e+-]*", "#", text) if "varies" in cell["metadata"].get("tags", ()) else text


def printed_by(cell: dict[str, Any]) -> str:
    text = "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")
    return without_some_numbers(cell, text)


def figures_of(cell: dict[str, Any]) -> int:
    return sum("image/png" in output.get("data", ()) for output in cell["outputs"])


def test_the_outputs_are_of_one_run_without_errors():
    assert NOTEBOOK.stat().st_size < 1_000_000
    assert [cell["execution_count"] for cell in CODE] == [*range(1, len(CODE) + 1)]
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert {output.get("name", output["output_type"]) for output in outputs} == {"stdout", "execute_result"}
    assert sum(map(figures_of, CODE)) == 5


def test_the_code_prints_and_draws_what_was_committed(tmp_path, monkeypatch, capsys):
    """In this process, after the cell that installs the package, and with a smaller comparison."""
    digits = load_dataset("digits")
    few = digits._replace(train_images=digits.train_images[:96], train_labels=digits.train_labels[:96])
    monkeypatch.setattr("capsnet_jax.load_dataset", lambda name: few)
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = {}
    sources = ["".join(cell["source"]).removeprefix("%matplotlib inline\n") for cell in CODE]
    assert sum(SIZE in source for source in sources) == 1
    for cell, source in list(zip(CODE, sources, strict=True))[1:]:
        tree = ast.parse(source.replace(SIZE, SMALLER))
        last = tree.body.pop().value if isinstance(tree.body[-1], ast.Expr) else ast.Constant(None)
        exec(compile(tree, NOTEBOOK.name, "exec"), values)
        shown = eval(compile(ast.fix_missing_locations(ast.Expression(last)), NOTEBOOK.name, "eval"), values)
        assert isinstance(shown, Figure) == figures_of(cell)
        assert without_some_numbers(cell, capsys.readouterr().out) == printed_by(cell)


@pytest.mark.exhaustive
def test_the_notebook_runs_in_a_kernel_from_an_empty_folder(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.delenv("XLA_FLAGS")  # as users run it
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    executed = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert list(map(printed_by, executed)) == list(map(printed_by, CODE))
    assert list(map(figures_of, executed)) == list(map(figures_of, CODE))
