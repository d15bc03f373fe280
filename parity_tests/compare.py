"""The comparison of `capsnet_verify`, as an assertion."""

from numpy.typing import ArrayLike

from capsnet_verify.checks import AGREES, compare


def assert_close(name: str, actual: ArrayLike, expected: ArrayLike, *, tolerance: float, floor: float = 1e-4) -> float:
    """Assert that a check agrees, and return its scale-relative error; see `capsnet_verify.checks.compare`."""
    check = compare(name, actual, expected, tolerance=tolerance, floor=floor)
    assert check.verdict == AGREES, f"{name}: {check.reason}"
    return check.error
