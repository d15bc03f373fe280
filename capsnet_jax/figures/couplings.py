"""Figures of routing: the couplings of an image, and how couplings and activations converge."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from capsnet_jax.figures.style import BAND, RIGHT, SHARES, WRONG, draw_tiles, styled, viewable

PANEL = 8.0  # inches, of a panel that is wide; of others, a third


@styled
def couplings_figure(
    couplings: Float[np.ndarray, "iterations height width groups o"],
    activations: Float[np.ndarray, "iterations o"],
    image: Float[np.ndarray, "image_height image_width channels"],
    class_names: Sequence[str],
) -> Figure:
    """Draw the couplings of an image: a panel for each iteration, with a row for each class.

    In a row, there is a map for each group of input capsules, of the couplings at their positions.

    Args:
        couplings: couplings of the input capsules by iteration, position, group and class.
        activations: activations of the classes in each iteration, written beside the rows.
        image: the image, in [0, 1].
        class_names: names of the classes.
    """
    iterations, down, across, groups, classes = couplings.shape
    ratio = classes * (down + 1) / (groups * (across + 1))
    panel, rows, columns = (PANEL, iterations, 1) if ratio < 0.5 else (PANEL / 3, 1, iterations)
    width = columns * (panel + 0.7) + 2
    figure = Figure(figsize=(width, max(rows * (ratio * panel + 0.4) + 0.5, 2.5)))
    ((left, right),) = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.2, width - 1.2))
    original = left.subplots()
    original.imshow(viewable(image), cmap="gray", vmin=0, vmax=1)
    original.set(xticks=[], yticks=[], title="image")
    axes = right.subplots(rows, columns, squeeze=False).ravel()
    for number, (ax, maps) in enumerate(zip(axes, couplings, strict=True), 1):
        tiles = np.moveaxis(maps, (3, 2), (0, 1))  # [classes groups height width]
        ax.set_facecolor("0.8")
        shown = draw_tiles(ax, tiles, cmap=SHARES, vmin=min(0, couplings.min()), vmax=couplings.max())
        named = zip(class_names, activations[number - 1], strict=True)
        ax.set_yticks(ax.get_yticks(), [f"{name}  {activation:.2f}" for name, activation in named])
        every = -(-groups // 16)
        ax.set_xticks(ax.get_xticks()[::every], map(str, range(0, groups, every)))
        ax.set_title(f"iteration {number}" if iterations > 1 else "couplings")
    axes[-1].set_xlabel("group of input capsules")
    axes[0].set_ylabel("class and its activation")
    right.colorbar(shown, ax=list(axes), label="coupling", shrink=0.8, aspect=30)
    return figure


@styled
def convergence_figure(
    entropies: Float[np.ndarray, "iterations images"],
    right: Float[np.ndarray, "iterations images"],
    wrong: Float[np.ndarray, "iterations others"],
) -> Figure:
    """Draw how routing converges: means over images in each iteration, and a band that holds 80 % of the images.

    Args:
        entropies: normalized entropy of the couplings; 1 if all are equal, 0 if each input capsule has one parent.
        right: activations of the capsules of the labels.
        wrong: the largest activation among the other capsules of each image; none if there are no others.
    """
    figure = Figure(figsize=(8, 3.2))
    left, beside = figure.subplots(1, 2)
    _draw_iterations(left, entropies, color="black", marker="o")
    left.set_ylabel("entropy of the couplings, of at most 1")
    _draw_iterations(beside, right, color=RIGHT, marker="o", label="right class")
    if wrong.size:
        _draw_iterations(beside, wrong, color=WRONG, marker="s", linestyle="--", label="most active wrong class")
    beside.set_ylabel("activation")
    beside.legend()
    for ax in (left, beside):
        ax.set(xlabel="iteration", xticks=range(1, len(entropies) + 1))
        ax.grid(alpha=0.3)
    return figure


def _draw_iterations(ax: Axes, values: Float[np.ndarray, "iterations images"], color: str, **style: Any) -> None:
    numbers = np.arange(1, len(values) + 1)
    ax.plot(numbers, values.mean(axis=1), color=color, **style)
    ax.fill_between(numbers, *np.quantile(values, (0.1, 0.9), axis=1), color=color, alpha=BAND, linewidth=0)
