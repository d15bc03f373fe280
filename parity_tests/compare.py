"""The one comparison of the parity tests: scale-relative, and with no way to pass on nothing."""

import numpy as np

TOLERANCE = {"float64": 1e-12, "float32": 2e-5}  # forward, losses and gradients on CPU


def assert_close(name: str, actual, expected, *, tolerance: float, floor: float = 1e-4) -> float:
    """Asserts max|actual - expected| <= tolerance * max|expected|, on finite arrays of one shape and dtype.

    Args:
        name: what is compared, for the message.
        actual: what JAX computed.
        expected: what PyTorch or the oracle computed.
        tolerance: of the largest value, not of each; there is no absolute term.
        floor: the largest expected value must be above it, as an all but zero array would pass whatever made it.

    Returns:
        The error, as a fraction of the largest expected value.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    assert actual.dtype == expected.dtype, f"{name}: dtype {actual.dtype}, expected {expected.dtype}"
    assert np.isfinite(actual).all(), f"{name}: not finite"
    assert np.isfinite(expected).all(), f"{name}: what is expected is not finite"
    scale = np.abs(expected).max()
    assert scale > floor, f"{name}: cold, the largest value is {scale:.1e}; a check of it has no power"
    error = np.abs(actual - expected).max() / scale
    assert error <= tolerance, f"{name}: scale-relative error {error:.1e}, tolerated {tolerance:.0e}"
    return float(error)
