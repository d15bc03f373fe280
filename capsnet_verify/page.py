"""Write verifications as one HTML page, with a histogram of both sides for each value. It needs no other file."""

import math
from collections.abc import Sequence
from html import escape

from capsnet_verify.checks import Check, Histogram
from capsnet_verify.report import number, paragraphs, sentence
from capsnet_verify.verification import Verification

WIDTH, HEIGHT = 200, 40  # of a histogram, in pixels
LARGEST, SMALLEST = 1, -17  # powers of ten at the ends of an error's scale
STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c2024; --faint: #667; --line: #dde1e6; --jax: #4c8fd6;
  --torch: #d4550a; --good: #1a7f45; --bad: #c0212f; --warn: #8a6100; }
@media (prefers-color-scheme: dark) { :root { --back: #14171a; --text: #e4e7ea; --faint: #9aa3ad; --line: #30363d;
  --jax: #3f76b5; --torch: #ff9d5c; --good: #57c785; --bad: #ff7b86; --warn: #e0b04a; } }
body { background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } summary { cursor: pointer; font-size: 1.15rem; margin: 1rem 0 .5rem; }
table { border-collapse: collapse; width: 100%; } div { overflow-x: auto; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: left; vertical-align: middle; }
th { color: var(--faint); font-weight: 500; } td { font-variant-numeric: tabular-nums; }
td small { color: var(--faint); display: block; max-width: 22rem; }
.agrees { color: var(--good); } .DIFFERS { color: var(--bad); font-weight: 700; } .inherits, .no { color: var(--warn); }
svg text { fill: var(--faint); font-size: 10px; } svg line { stroke: var(--line); }
.jax { fill: var(--jax); } .torch { fill: none; stroke: var(--torch); stroke-width: 1.5; }
.tolerance { stroke: var(--faint) !important; stroke-dasharray: 2 2; } circle { fill: currentColor; }
"""


def to_html(verifications: Sequence[Verification]) -> str:
    """Format a page with a section for each verification; those that do not agree are open."""
    sections = "\n".join(_section(each, is_open=len(verifications) == 1 or each.status > 0) for each in verifications)
    area, line = '<rect class="jax" width="14" height="10" />', '<path class="torch" d="M0 5H14" />'
    key = (
        f"{_svg(14, 10, area)} JAX, {_svg(14, 10, line)} PyTorch; heights are logarithms of counts. Errors are "
        f"fractions of the largest value, on a scale from 1e{SMALLEST} to 1e{LARGEST}; a dashed line is the tolerance. "
        "What inherits an error agrees if it is computed from PyTorch's values of the layers below."
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>capsnet verify</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>JAX and PyTorch, value by value</h1>\n<p>{key}</p>\n{sections}\n</body>\n</html>\n"
    )


def _section(verification: Verification, *, is_open: bool) -> str:
    title = escape(f"{verification.subject.title}, {verification.settings.dtype}")
    texts = [sentence(verification), *paragraphs(verification)]
    words = "\n".join(f"<p>{escape(text).replace(chr(10), '<br>')}</p>" for text in texts)
    rows = "\n".join(map(_row, verification.checks))
    head = "".join(f"<th>{name}</th>" for name in ("check", "verdict", "error", "", "largest value", "values"))
    return (
        f'<details{" open" if is_open else ""}>\n<summary class="{verification.verdict}">{title}</summary>\n{words}\n'
        f"<div><table>\n<tr>{head}</tr>\n{rows}\n</table></div>\n</details>"
    )


def _row(check: Check) -> str:
    cells = [
        f"{escape(check.name)}{f'<small>{escape(check.reason)}</small>' if check.reason else ''}",
        f'<span class="{check.verdict}">{check.verdict}</span>',
        number(check.error),
        f'<span class="{check.verdict}">{_error(check)}</span>',
        number(check.scale),
        "" if check.histogram is None else _histogram(check.histogram),
    ]
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _error(check: Check) -> str:
    """Draw the error and its tolerance on a logarithmic scale."""

    def place(error: float) -> float:
        power = math.log10(error) if error > 0 else SMALLEST
        return 4 + 112 * (min(max(power, SMALLEST), LARGEST) - SMALLEST) / (LARGEST - SMALLEST)

    tolerance, error = place(check.tolerance), place(check.error)
    return _svg(
        120,
        16,
        f'<line x1="4" y1="8" x2="116" y2="8" /><line class="tolerance" x1="{tolerance:.0f}" y1="1" '
        f'x2="{tolerance:.0f}" y2="15" /><circle cx="{error:.0f}" cy="8" r="4" />',
    )


def _histogram(histogram: Histogram) -> str:
    """Draw the values of JAX as an area, and those of PyTorch as a line."""
    highest = math.log1p(max(*histogram.actual, *histogram.expected, 1))
    width = WIDTH / len(histogram.actual)

    def outline(counts: Sequence[int]) -> str:
        heights = [HEIGHT * (1 - math.log1p(count) / highest) for count in counts]
        return "".join(f"V{height:.1f}H{width * place:.1f}" for place, height in enumerate(heights, 1))

    area, line = (f"M0 {HEIGHT}{outline(counts)}V{HEIGHT}" for counts in (histogram.actual, histogram.expected))
    return _svg(
        WIDTH,
        HEIGHT + 13,
        f'<path class="jax" d="{area}Z" /><path class="torch" d="{line}" />'
        f'<text y="{HEIGHT + 11}">{histogram.low:.3g}</text>'
        f'<text x="{WIDTH}" y="{HEIGHT + 11}" text-anchor="end">{histogram.high:.3g}</text>',
    )


def _svg(width: int, height: int, inside: str) -> str:
    return f'<svg width="{width}" height="{height}" aria-hidden="true">{inside}</svg>'
