"""Call `capsnet convert` in this process, on a small run."""

from pathlib import Path

import pytest

from capsnet_jax.cli.main import main
from capsnet_jax.config import Config, ModelConfig
from capsnet_jax.runs.folder import Run
from tests.conftest import IMAGE_SHAPE, SMALL

SMALL_RUN = Run(Path("run"), Config(ModelConfig(IMAGE_SHAPE, 10, **SMALL, primary_stride=2)), tuple("0123456789"))


def convert(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a refused command prints, without its prefix."""
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("capsnet: error: ")
    assert error.endswith(".\n")
    assert error.count("\n") == 1
    return error.removeprefix("capsnet: error: ").rstrip("\n")
