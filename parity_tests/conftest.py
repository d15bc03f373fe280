"""Fixtures: both frameworks in the same precision, float64 or (with `-m exhaustive`) float32, never TF32."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # arrays are small, and several processes share the cores


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(params=["float64", pytest.param("float32", marks=pytest.mark.exhaustive)])
def dtype(request: pytest.FixtureRequest) -> Iterator[str]:
    """A precision that is set for JAX; pass its name to PyTorch."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@pytest.fixture
def float64() -> Iterator[str]:
    """Only double precision, for tests to which single precision would add nothing."""
    with jax.enable_x64(True):
        yield "float64"


@pytest.fixture(scope="session")
def jax_values() -> Callable[..., Any]:
    """`in_jax`, computed once for the same model and batch, as most of the time goes to tracing."""
    from capsnet_jax.interchange.weights import to_torch
    from capsnet_verify.values import in_jax

    found: dict[Any, Any] = {}

    def cached(pair: Any) -> Any:
        arrays = [*to_torch(pair.jax_model).values(), np.asarray(pair.images), np.asarray(pair.labels)]
        key = (pair.jax_model.config, pair.dtype, str(pair.loss), *(array.tobytes() for array in arrays))
        if key not in found:
            found[key] = in_jax(pair)
        return dict(found[key])

    return cached


@pytest.fixture
def verify_command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `capsnet verify` in this process; returns the exit status and what it prints to stdout and stderr."""
    from capsnet_jax.cli.main import main

    def verify(*arguments: object) -> tuple[int, str, str]:
        status = main(["verify", *map(str, arguments)])
        return status, *capsys.readouterr()

    return verify


@pytest.fixture
def verify_foreign(
    tmp_path: Path, jax_values: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Return a function that compares a PyTorch module with the JAX model, by the text of a map."""
    from capsnet_verify.foreign import verify_module
    from capsnet_verify.subjects import Settings
    from capsnet_verify.weight_map import read_map
    from parity_tests.foreign_models import SUBJECT

    def verify(
        build: Callable[[], Any], text: str, subject: Any = SUBJECT, dtype: str = "float64", *, replay: bool = False
    ) -> Any:
        if not replay:  # which takes a second
            monkeypatch.setattr("capsnet_verify.foreign.in_jax", lambda pair, given=None: jax_values(pair))
        path = tmp_path / "map.toml"
        path.write_text(text)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = build()
        return verify_module(module, read_map(path), subject, Settings(dtype))

    return verify
