"""Prints what agrees with PyTorch to what error: `python -m parity_tests.table`, for docs/parity.md."""

import jax

from parity_tests.compare import TOLERANCE, assert_close
from parity_tests.pair import divergences, make_pair


def main() -> None:
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


if __name__ == "__main__":
    main()
