"""Where both sides compute, and how exactly."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import torch

from capsnet_jax.errors import UsageError


@contextmanager
def both_on(device: str, dtype: str) -> Iterator[None]:
    """Both frameworks compute on this device, never in TF32, and JAX may use float64 if that is the dtype.

    Raises:
        UsageError: there is no GPU that both can use.
    """
    if device == "gpu" and not (jax.default_backend() == "gpu" and torch.cuda.is_available()):
        raise UsageError("There is no GPU that both JAX and PyTorch can use; expected --device cpu.")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with (
        torch.device("cuda" if device == "gpu" else "cpu"),
        jax.default_device(jax.devices(device)[0]),
        jax.default_matmul_precision("highest"),
        jax.enable_x64(dtype == "float64"),
    ):
        yield
