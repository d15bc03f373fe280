"""Compare two arrays, relative to the largest value. Arrays that are too small to prove anything do not pass."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped
from numpy.typing import ArrayLike

Array = Shaped[np.ndarray, "..."]

VALUES = {"float64": 1e-12, "float32": 2e-5, "bfloat16": 5e-2}
"""Tolerances of values and gradients, as fractions of the largest expected value."""
ON_GPU = {"float32": 1e-4}  # with TF32 off in both frameworks
GRADIENTS = {"bfloat16": 0.3}  # up to 0.21 where batch normalization is over three images
STEPS = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 5e-2}
"""Tolerances of the losses of training steps and, in float64, of the weights after them."""
FLOOR = 1e-7  # the smallest gradients of the reference model with its initial weights are 4.5e-7
BINS = 50  # of a histogram
NARROWEST = 1e-3  # smallest range of a histogram, as a fraction of the largest value; rounding errors do not show

AGREES, DIFFERS, INHERITS, NO_POWER = "agrees", "DIFFERS", "inherits", "no power"


class Histogram(NamedTuple):
    """Numbers of finite values of both sides in equal steps from the lowest to the highest value."""

    low: float
    high: float
    actual: Sequence[int]
    expected: Sequence[int]


class Check(NamedTuple):
    """The result of comparing two arrays.

    Attributes:
        name: what was compared.
        scale: the largest expected absolute value.
        error: the largest difference, as a fraction of the scale; infinite if the arrays cannot be compared.
        tolerance: the largest error at which they agree.
        verdict: "agrees"; "DIFFERS"; "inherits" if they differ, but agree if the JAX model is fed PyTorch's values of
            the layers below; or "no power" if both are so small, or rounding errors so large, that the check proves
            nothing.
        reason: why they differ or the check has no power; empty if they agree.
        histogram: values of both sides, if the report shows them.
    """

    name: str
    scale: float
    error: float
    tolerance: float
    verdict: str
    reason: str = ""
    histogram: Histogram | None = None

    def with_histogram(self, actual: ArrayLike, expected: ArrayLike) -> "Check":
        """Return the check with a histogram of both sides, if they have finite values."""
        sides = [array[np.isfinite(array)] for array in map(np.ravel, (actual, expected))]
        values = np.concatenate(sides)
        if not values.size:
            return self
        low, high = float(values.min()), float(values.max())
        high = max(high, low + NARROWEST * (max(abs(low), abs(high)) or 1.0))
        edges = np.linspace(low, high, BINS + 1)
        return self._replace(histogram=Histogram(low, high, *(np.histogram(side, edges)[0].tolist() for side in sides)))


def compare(
    name: str,
    actual: ArrayLike,
    expected: ArrayLike,
    *,
    tolerance: float,
    floor: float = FLOOR,
    euclidean: bool = False,
) -> Check:
    """Check that max|actual - expected| <= tolerance * max|expected|, of finite arrays of one shape and dtype.

    Args:
        name: what is compared.
        actual: computed by JAX.
        expected: computed by PyTorch or another implementation.
        tolerance: largest error, as a fraction of the largest value; there is no absolute term.
        floor: if no value of either array is larger, the check has no power, as arrays of zeros would always agree.
        euclidean: take the Euclidean norm of both sides of the inequality in place of the maximum.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    incomparable = ""
    if actual.shape != expected.shape:
        incomparable = f"shape {actual.shape}, expected {expected.shape}"
    elif actual.dtype != expected.dtype:
        incomparable = f"dtype {actual.dtype}, expected {expected.dtype}"
    elif not np.isfinite(expected).all():
        incomparable = "what is expected is not finite"
    elif not np.isfinite(actual).all():
        incomparable = "not finite"
    if incomparable:
        return Check(name, math.nan, math.inf, tolerance, DIFFERS, incomparable)
    scale = float(np.abs(expected).max())
    size = np.linalg.norm if euclidean else np.max
    difference, whole = float(size(np.abs(actual - expected))), float(size(np.abs(expected)))
    error = difference / whole if whole > 0 else math.inf if difference > 0 else 0.0
    if max(scale, float(np.abs(actual).max())) <= floor:
        reason = f"too small, the largest value is {scale:.1e}; a check of it has no power"
        return Check(name, scale, error, tolerance, NO_POWER, reason)
    if error > tolerance:
        reason = f"scale-relative error {error:.1e}, tolerated {tolerance:g}"
        return Check(name, scale, error, tolerance, DIFFERS, reason)
    return Check(name, scale, error, tolerance, AGREES)
