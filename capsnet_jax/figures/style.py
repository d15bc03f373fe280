"""The style of all figures: sizes of text, and colours for colour-blind readers; markers and lines differ in grey."""

from typing import Any, cast

import numpy as np
from jaxtyping import Float
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Petroff, "Accessible Color Sequences for Data Visualization" (2021): ten colours. https://arxiv.org/abs/2107.02270
COLORS = (
    *("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"),
    *("#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"),
)
MARKERS = "osD^vPX"  # with the colours, 70 combinations
RIGHT, WRONG = COLORS[0], COLORS[2]
SHARES = "Blues"  # the colour map of fractions, from white to dark
BAND = 0.25  # opacity of a band around a line

styled = rc_context(
    {
        "figure.dpi": 120,
        "figure.constrained_layout.use": True,
        "font.size": 9,
        "figure.labelsize": 9,
        "axes.titlesize": 9,
        "axes.labelsize": 9,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.fontsize": 8,
        "lines.markersize": 4,
        "hatch.linewidth": 0.6,
        "text.parse_math": False,  # the names of runs and classes are no formulas
    }
)
"""Decorator of functions that draw a figure."""


def place(ax: Axes | None, width: float, height: float) -> tuple[Figure, Axes]:
    """Return axes to draw in and their figure: new ones of this size in inches, unless there are axes already."""
    if ax is not None:
        return cast(Figure, ax.figure), ax
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def viewable(images: Float[np.ndarray, "*size channels"]) -> Float[np.ndarray, "..."]:
    """Return images as they can be shown: three channels as colours, and the mean of any other number in grey."""
    return images if images.shape[-1] == 3 else images.mean(axis=-1)


def draw_tiles(
    ax: Axes, tiles: Float[np.ndarray, "rows columns height width *rgb"], gap: int = 1, **options: Any
) -> Any:
    """Draw a table of small images as one image, and put a tick at each row and column.

    Args:
        ax: axes to draw in.
        tiles: the images, in grey or in colours.
        gap: pixels between them, which show the background of the axes.
        options: of `imshow`.

    Returns:
        What `imshow` returns.
    """
    rows, columns, height, width, *rgb = tiles.shape
    fill = 1.0 if rgb else np.nan  # matplotlib does not paint NaN, but has no such colour
    margins = ((0, 0), (0, 0), (0, gap), (0, gap), *((0, 0) for _ in rgb))
    padded = np.pad(tiles, margins, constant_values=fill).swapaxes(1, 2)
    joined = padded.reshape(rows * (height + gap), columns * (width + gap), *rgb)
    shown = ax.imshow(joined[: joined.shape[0] - gap, : joined.shape[1] - gap], **options)
    ax.set_xticks(np.arange(columns) * (width + gap) + (width - 1) / 2)
    ax.set_yticks(np.arange(rows) * (height + gap) + (height - 1) / 2)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return shown
