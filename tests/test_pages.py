"""README and docs: their Python code runs, their commands parse, links lead somewhere, and sentences are short."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from capsnet_jax.cli.main import main, parse

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
NOTEBOOK = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text())["cells"]
PAGES["docs/tutorial.ipynb"] = "".join(
    line for cell in NOTEBOOK if cell["cell_type"] == "markdown" for line in cell["source"]
)
FIRST_PAGES = ("README.md", "docs/start.md", "docs/code.md")  # which a newcomer reads
WITH_COMMANDS = (
    *FIRST_PAGES,
    "docs/training.md",
    "docs/explorer.md",
    "docs/figures.md",
    "docs/parity.md",
    "docs/results.md",
)
LONGEST_SENTENCE = 25  # words
FENCED = re.compile(r"^(`{3,}).*?^\1`*$", flags=re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page], flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """The arguments of each `capsnet` command, in code blocks and at the end of table rows."""
    lines = [line for page in WITH_COMMANDS for block in blocks(page, "sh") for line in block.splitlines()]
    lines += [
        line for page in WITH_COMMANDS for line in re.findall(r"\| `([^`]*)` \|$", PAGES[page], flags=re.MULTILINE)
    ]
    words = [shlex.split(line.partition(" < ")[0], comments=True) for line in lines]
    found = {tuple(line[1:]) for line in words if line[:1] in (["capsnet"], [".venv/bin/capsnet"])}
    return sorted(map(list, found))


def anchors(text: str) -> list[str]:
    """The anchors of the headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text), flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_the_python_of_the_first_steps_runs_as_one_program():
    values: dict[str, object] = {}
    for block in blocks("docs/start.md", "python"):
        exec(compile(block, "docs/start.md", "exec"), values)
    assert values["couplings"].shape == (4, 1152, 10)
    assert values["capsules"].poses.shape == (4, 10, 16)


def test_the_routing_of_the_readme_passes_all_checks(tmp_path, monkeypatch, capsys):
    (routing,) = blocks("README.md", "python")
    (tmp_path / "my_routing.py").write_text(routing)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_routing", raising=False)
    assert main(["check-routing", "my_routing:agreement"]) == 0
    assert "passed all 13 checks" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_a_command_parses(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert callable(parse(arguments).run)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    wrong = []
    for path, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)#?([^)\s]*)\)", FENCED.sub("", PAGES[page])):
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            wrong.append(f"{path}#{anchor}")
    assert wrong == []


def test_the_readme_is_one_screen():
    assert len(PAGES["README.md"].splitlines()) <= 80


def test_quoted_code_is_in_the_package():
    def dense(code: str) -> str:
        return re.sub(r"\s", "", code)  # the formatter may break lines elsewhere

    source = dense("".join(path.read_text() for path in (ROOT / "capsnet_jax").rglob("*.py")))
    quotes = [dense(line) for block in blocks("docs/code.md", "py") for line in block.splitlines()]
    assert len(quotes) > 8
    assert [quote for quote in quotes if quote not in source] == []


@pytest.mark.parametrize("page", FIRST_PAGES)
def test_no_sentence_is_long(page):
    prose = re.sub(r"^\|.*?$|^#.*?$", "\n\n", FENCED.sub("\n\n", PAGES[page]), flags=re.MULTILINE)
    prose = re.sub(r"\]\([^)]*\)", "]", prose)
    sentences = re.split(r"(?<=[.:?])\s|\n\n|\n- ", prose)
    assert {len(sentence.split()): sentence for sentence in sentences if len(sentence.split()) > LONGEST_SENTENCE} == {}
