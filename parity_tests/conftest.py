"""Both sides in the same precision: float64 and float32, never TF32."""

from collections.abc import Iterator

import jax
import pytest

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(params=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> Iterator[str]:
    """A precision, in force for JAX; pass it on to PyTorch by name."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@pytest.fixture
def float64() -> Iterator[str]:
    """Double precision, where single would prove nothing more."""
    with jax.enable_x64(True):
        yield "float64"
