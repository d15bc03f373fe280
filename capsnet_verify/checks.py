"""The one comparison: scale-relative, and with no way to pass on nothing."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

VALUES = {"float64": 1e-12, "float32": 2e-5, "bfloat16": 5e-2}
"""Tolerated of values and gradients, as a fraction of the largest expected one."""
ON_GPU = {"float32": 1e-4}  # with TF32 off on both sides
GRADIENTS = {"bfloat16": 0.3}  # up to 0.21 where batch normalisation is over three images
STEPS = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 5e-2}
"""The same of the losses of training steps and, in float64, of the weights after them."""
FLOOR = 1e-7  # gradients of the reference model, as its weights are drawn, begin at 4.5e-7

AGREES, DIFFERS, NO_POWER = "agrees", "DIFFERS", "no power"


def tolerance_of(name: str, dtype: str, device: str = "cpu") -> float:
    """What is tolerated of a value or gradient of this name."""
    if name.startswith("gradient") and dtype in GRADIENTS:
        return GRADIENTS[dtype]
    return ON_GPU.get(dtype, VALUES[dtype]) if device == "gpu" else VALUES[dtype]


class Check(NamedTuple):
    """A comparison and what came of it.

    Attributes:
        name: what is compared.
        scale: the largest expected absolute value.
        error: the largest difference, as a fraction of that; infinite if arrays cannot be compared.
        tolerance: the largest such fraction at which they agree.
        verdict: "agrees", "DIFFERS", or "no power" if they are too small for anything to be seen, or
            rounding errors too large.
        reason: why they differ or nothing was seen; empty if they agree.
    """

    name: str
    scale: float
    error: float
    tolerance: float
    verdict: str
    reason: str = ""


def compare(
    name: str,
    actual: ArrayLike,
    expected: ArrayLike,
    *,
    tolerance: float,
    floor: float = FLOOR,
    euclidean: bool = False,
) -> Check:
    """Whether max|actual - expected| <= tolerance * max|expected|, of finite arrays of one shape and dtype.

    Args:
        name: what is compared.
        actual: what JAX computed.
        expected: what PyTorch or another implementation computed.
        tolerance: of the largest value, not of each; there is no absolute term.
        floor: the largest value of either must be above it, as an all but zero array would pass whatever made it.
        euclidean: take the Euclidean norm of each side of the inequality in place of the maximum.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    if actual.shape != expected.shape:
        return _incomparable(name, tolerance, f"shape {actual.shape}, expected {expected.shape}")
    if actual.dtype != expected.dtype:
        return _incomparable(name, tolerance, f"dtype {actual.dtype}, expected {expected.dtype}")
    if not np.isfinite(expected).all():
        return _incomparable(name, tolerance, "what is expected is not finite")
    if not np.isfinite(actual).all():
        return _incomparable(name, tolerance, "not finite")
    scale = float(np.abs(expected).max())
    size = np.linalg.norm if euclidean else np.max
    difference, whole = float(size(np.abs(actual - expected))), float(size(np.abs(expected)))
    error = difference / whole if whole > 0 else math.inf if difference > 0 else 0.0
    if max(scale, float(np.abs(actual).max())) <= floor:
        reason = f"cold, the largest value is {scale:.1e}; a check of it has no power"
        return Check(name, scale, error, tolerance, NO_POWER, reason)
    if error > tolerance:
        reason = f"scale-relative error {error:.1e}, tolerated {tolerance:.0e}"
        return Check(name, scale, error, tolerance, DIFFERS, reason)
    return Check(name, scale, error, tolerance, AGREES)


def _incomparable(name: str, tolerance: float, reason: str) -> Check:
    return Check(name, math.nan, math.inf, tolerance, DIFFERS, reason)
