"""The README: its Python code runs, its commands parse, its links lead to files, and its sentences are short."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from capsnet_jax.cli.main import main, parse

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LONGEST_SENTENCE = 25  # words


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """The arguments of each `capsnet` command, in code blocks and in the table of measurements."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    lines += re.findall(r"\| `([^`]*)` \|$", README, flags=re.MULTILINE)
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] for line in words if line[:1] in (["capsnet"], [".venv/bin/capsnet"])]


def test_the_python_runs_as_one_program(tmp_path, monkeypatch, capsys):
    *uses, routing = blocks("python")
    values: dict[str, object] = {}
    for block in uses:
        exec(compile(block, "README.md", "exec"), values)
    assert values["couplings"].shape == (4, 1152, 10)
    assert values["capsules"].poses.shape == (4, 10, 16)
    (tmp_path / "my_routing.py").write_text(routing)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_routing", raising=False)
    assert main(["check-routing", "my_routing:agreement"]) == 0
    assert "passed all 13 checks" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_a_command_parses(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert callable(parse(arguments).run)


def test_links_lead_to_files():
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if not link.startswith("https://")]
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_quoted_code_is_in_the_package():
    def dense(code: str) -> str:
        return re.sub(r"\s", "", code)  # the formatter may break lines elsewhere

    source = dense("".join(path.read_text() for path in (ROOT / "capsnet_jax").rglob("*.py")))
    quotes = [dense(line) for block in blocks("py") for line in block.splitlines()]
    assert len(quotes) > 8
    assert [quote for quote in quotes if quote not in source] == []


def test_no_sentence_is_long():
    prose = re.sub(r"^```.*?^```$|^\|.*?$|^#.*?$", "\n\n", README, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"\]\([^)]*\)", "]", prose)
    sentences = re.split(r"(?<=[.:?])\s|\n\n|\n- ", prose)
    assert {len(sentence.split()): sentence for sentence in sentences if len(sentence.split()) > LONGEST_SENTENCE} == {}
