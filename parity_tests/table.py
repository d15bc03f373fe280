"""Prints what agrees with PyTorch to what error: `python -m parity_tests.table`, for docs/parity.md."""

import jax

from parity_tests.compare import TOLERANCE, assert_close
from parity_tests.pair import divergences, make_pair
from parity_tests.test_routing import compare, every_case, in_jax, in_torch


def main() -> None:
    print_models()
    print()
    print_routings()


def print_models() -> None:
    """Every intermediate, loss and gradient of a model, in the order in which they are computed."""
    errors: dict[str, dict[str, float]] = {}
    for dtype in TOLERANCE:
        with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
            for name, actual, expected in divergences(make_pair(dtype)):
                error = assert_close(name, actual, expected, tolerance=TOLERANCE[dtype])
                errors.setdefault(name, {})[dtype] = error
    print(f"| check | {' | '.join(TOLERANCE)} |\n| --- | {' | '.join('---' for _ in TOLERANCE)} |")
    for name, of in errors.items():
        print(f"| {name} | {' | '.join(f'{of[dtype]:.1e}' for dtype in TOLERANCE)} |")
    worst = {dtype: max(of[dtype] for of in errors.values()) for dtype in TOLERANCE}
    print(f"| **largest** | {' | '.join(f'{worst[dtype]:.1e}' for dtype in TOLERANCE)} |")
    print(f"| tolerated | {' | '.join(f'{TOLERANCE[dtype]:.0e}' for dtype in TOLERANCE)} |")


def print_routings() -> None:
    """The worst of each routing, over its numbers of iterations and options."""
    columns = [f"{kind} {dtype}" for dtype in TOLERANCE for kind in ("forward", "gradients")]
    errors: dict[str, dict[str, float]] = {}
    for dtype in TOLERANCE:
        with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
            for case in every_case():
                actual, expected = in_jax(case, dtype), in_torch(case, dtype)
                worst = errors.setdefault(case.name, {})
                for name in expected:
                    column = f"{'gradients' if name.startswith('gradient') else 'forward'} {dtype}"
                    error = compare(case, name, actual[name], expected[name])
                    worst[column] = max(error, worst.get(column, 0.0))
    print(f"| routing | {' | '.join(columns)} |\n| --- | {' | '.join('---' for _ in columns)} |")
    for routing, of in errors.items():
        print(f"| {routing} | {' | '.join(f'{of[column]:.1e}' for column in columns)} |")


if __name__ == "__main__":
    main()
