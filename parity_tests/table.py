"""Prints what agrees with PyTorch to what error: `python -m parity_tests.table`, for docs/parity.md."""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax
import torch

from parity_tests.compare import TOLERANCE, assert_close
from parity_tests.pair import divergences, make_pair
from parity_tests.test_routing import ITERATIONS, compare, every_case, in_jax, in_torch

TOLERANCES = {"cpu": TOLERANCE, "gpu": TOLERANCE | {"float32": 1e-4}}

Errors = dict[str, dict[str, float]]
"""The largest of each row and column."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints both tables; the exit status tells whether an error is larger than tolerated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=TOLERANCES, default="cpu", help="of both sides (default: cpu)")
    parser.add_argument(
        "--num-iterations", type=int, nargs="+", default=ITERATIONS, help="only routings of so many, or of none"
    )
    options = parser.parse_args(arguments)
    if options.device == "gpu" and not (jax.default_backend() == "gpu" and torch.cuda.is_available()):
        parser.error("--device gpu needs a GPU that both JAX and PyTorch can use.")
    tolerance = TOLERANCES[options.device]
    with _both_on(options.device):
        too_large = print_models(tolerance)
        print()
        too_large += print_routings(tolerance, options.num_iterations)
    if too_large:
        sys.exit("\n".join(["", "Larger than tolerated:", *too_large]))


def print_models(tolerance: dict[str, float]) -> list[str]:
    """Every intermediate, loss and gradient of a model, in order; returns what is off by more than tolerated."""
    errors: Errors = {}
    for dtype in tolerance:
        with jax.enable_x64(dtype == "float64"):
            for name, actual, expected in divergences(make_pair(dtype)):
                error = assert_close(name, actual, expected, tolerance=math.inf)
                errors.setdefault(name, {})[dtype] = error
    worst = {dtype: max(of[dtype] for of in errors.values()) for dtype in tolerance}
    _print_table("check", list(tolerance), errors | {"**largest**": worst})
    print(f"| tolerated | {' | '.join(f'{limit:.0e}' for limit in tolerance.values())} |")
    return _too_large(errors, tolerance)


def print_routings(tolerance: dict[str, float], num_iterations: Sequence[int]) -> list[str]:
    """The worst of each routing over its options and these numbers of iterations; returns what is off by too much."""
    columns = [f"{kind} {dtype}" for dtype in tolerance for kind in ("forward", "gradients")]
    errors: Errors = {}
    cases = [
        case
        for case in every_case()
        if case.num_iterations in num_iterations or not case.routing.takes("num_iterations")
    ]
    for dtype in tolerance:
        with jax.enable_x64(dtype == "float64"):
            for case in cases:
                actual, expected = in_jax(case, dtype), in_torch(case, dtype)
                worst = errors.setdefault(case.name, {})
                for name in expected:
                    column = f"{'gradients' if name.startswith('gradient') else 'forward'} {dtype}"
                    error = compare(case, name, actual[name], expected[name], tolerance=math.inf)
                    worst[column] = max(error, worst.get(column, 0.0))
    _print_table("routing", columns, errors)
    return _too_large(errors, {column: tolerance[column.split()[1]] for column in columns})


def _print_table(heading: str, columns: list[str], errors: Errors) -> None:
    print(f"| {heading} | {' | '.join(columns)} |\n| --- | {' | '.join('---' for _ in columns)} |")
    for name, of in errors.items():
        print(f"| {name} | {' | '.join(f'{of[column]:.1e}' for column in columns)} |")


def _too_large(errors: Errors, tolerance: dict[str, float]) -> list[str]:
    return [
        f"{name}, {column}: {error:.1e}, tolerated {tolerance[column]:.0e}"
        for name, of in errors.items()
        for column, error in of.items()
        if error > tolerance[column]
    ]


@contextmanager
def _both_on(device: str) -> Iterator[None]:
    """Both frameworks compute on this device, and never in TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with (
        torch.device("cuda" if device == "gpu" else "cpu"),
        jax.default_device(jax.devices(device)[0]),
        jax.default_matmul_precision("highest"),
    ):
        yield


if __name__ == "__main__":
    main()
