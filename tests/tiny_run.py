"""A training run that takes a second, and functions that read its files."""

import contextlib
import io
import json
from pathlib import Path
from typing import NamedTuple

from capsnet_jax.cli.main import main

SMALL = """
    --stem-channels 6 --stem-kernel 3 --primary-groups 2 --primary-dim 4 --primary-kernel 3 --primary-scale 1
    --class-dim 5 --decoder-hidden 12 14 --batch-size 8 --epochs 2 --learning-rate 0.01
""".split()  # noqa: SIM905
OF_THE_MACHINE = ("images_per_second", "peak_memory_bytes")  # metrics that differ from run to run


class TinyRun(NamedTuple):
    """A run of two epochs of six steps on the small data set.

    Attributes:
        folder: the run folder; tests that change it must copy it.
        data_dir: folder of the idx files.
        lines: what `capsnet train` printed.
    """

    folder: Path
    data_dir: Path
    lines: list[str]


def options_of(data_dir: Path, run_dir: Path, *more: str) -> list[str]:
    return ["train", "--dataset", "mnist", "--data-dir", str(data_dir), *SMALL, "--run-dir", str(run_dir), *more]


def train(data_dir: Path, run_dir: Path, *more: str) -> int:
    return main(options_of(data_dir, run_dir, *more))


def printed(*arguments: str) -> list[str]:
    """The lines that a command prints, which must succeed."""
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        assert main(arguments) == 0
    return stdout.getvalue().splitlines()


def contents(folder: Path) -> dict[Path, bytes]:
    """All files of a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def metrics(run_dir: Path) -> list[dict]:
    """The metrics of a run that do not depend on the machine."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in OF_THE_MACHINE} for line in lines]
