"""Tables in Markdown."""

import math
from collections.abc import Sequence


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows of cells as a Markdown table with aligned columns, which also reads well as plain text.

    Args:
        rows: the headings, then the rows, all of the same length. The first column is aligned to the left, all others
            to the right.
    """
    widths = [max(2, *map(len, column)) for column in zip(*rows, strict=True)]  # a rule is at least -:
    lines = [
        " | ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width) for number, (cell, width) in enumerate(pairs)
        )
        for pairs in (zip(row, widths, strict=True) for row in rows)
    ]
    rule = " | ".join("-" * width if number == 0 else "-" * (width - 1) + ":" for number, width in enumerate(widths))
    return "\n".join(f"| {line} |" for line in (lines[0], rule, *lines[1:]))


def number_cell(value: int | float | None, decimals: int) -> str:
    """Format a number for a cell, with thousands separators; "-" for None, NaN and infinity."""
    return "-" if value is None or not math.isfinite(value) else f"{value:,.{decimals}f}"
