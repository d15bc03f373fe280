"""Figures of classification: the confusion matrix with the worst mistakes, and activations of classes."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from capsnet_jax.figures.style import RIGHT, SHARES, WRONG, place, styled, viewable

BINS = 40  # of activations, which are in [0, 1]


class Mistakes(NamedTuple):
    """Images that were classified wrongly.

    Attributes:
        images: images in [0, 1].
        labels: their classes.
        predictions: the classes that they were taken for.
        activations: activations of the capsules of the predicted classes.
    """

    images: Float[np.ndarray, "mistakes height width channels"]
    labels: Int[np.ndarray, " mistakes"]
    predictions: Int[np.ndarray, " mistakes"]
    activations: Float[np.ndarray, " mistakes"]


@styled
def confusion_figure(
    confusion: Int[np.ndarray, "o o"],
    class_names: Sequence[str],
    mistakes: Mistakes | None = None,
    *,
    ax: Axes | None = None,
) -> Figure:
    """Draw a confusion matrix; each cell is coloured by its fraction of the images of the true class.

    Args:
        confusion: numbers of images, `[true predicted]`.
        class_names: names of rows and columns.
        mistakes: images to draw on the right, each with its class, the predicted class and the activation of that.
        ax: axes for the matrix, instead of those of a new figure; mistakes are then not drawn.
    """
    side = float(np.clip(0.4 * len(class_names), 3, 14))
    if ax is not None or mistakes is None or len(mistakes.images) == 0:
        figure, ax = place(ax, side + 2.5, side + 1.5)
    else:
        rows = max(round((side + 1.5) / 1.3), 1)
        columns = -(-len(mistakes.images) // rows)
        figure = Figure(figsize=(side + 2.5 + 1.1 * columns, side + 1.5))
        ((left, right),) = figure.subfigures(1, 2, squeeze=False, width_ratios=(side + 2.5, 1.1 * columns))
        ax = left.subplots()
        _draw_mistakes(right.subplots(rows, columns, squeeze=False), mistakes, class_names)
    _draw_confusion(ax, confusion, class_names)
    return figure


def _draw_confusion(ax: Axes, confusion: Int[np.ndarray, "o o"], class_names: Sequence[str]) -> None:
    size = len(class_names)
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    # The square root makes small fractions visible.
    shown = ax.imshow(shares, cmap=SHARES, norm=PowerNorm(0.5, vmin=0, vmax=1))
    fontsize = 9 if size <= 25 else 5
    ax.set_xticks(range(size), class_names, fontsize=fontsize, rotation=90 if max(map(len, class_names)) > 2 else 0)
    ax.set_yticks(range(size), class_names, fontsize=fontsize)
    ax.set_xlabel("predicted")
    ax.set_ylabel("true")
    if size <= 25:
        for true, predicted in np.argwhere(confusion):
            color = "white" if shares[true, predicted] > 0.4 else "black"
            text = str(confusion[true, predicted])
            ax.text(predicted, true, text, ha="center", va="center", fontsize=7, color=color)
    ax.figure.colorbar(shown, ax=ax, ticks=[0, 0.01, 0.1, 0.5, 1], format="{x:.0%}", shrink=0.8)


def _draw_mistakes(axes: np.ndarray, mistakes: Mistakes, class_names: Sequence[str]) -> None:
    space = "\n" if max(map(len, class_names)) > 2 else " "
    for axis in axes.ravel():
        axis.axis("off")
    for axis, image, label, prediction, activation in zip(axes.T.ravel(), *mistakes, strict=False):
        axis.imshow(viewable(image), cmap="gray", vmin=0, vmax=1)
        axis.set_title(f"{class_names[label]}{space}as {class_names[prediction]}, {activation:.2f}", fontsize=8)


@styled
def activations_figure(
    right: Float[np.ndarray, " right"], wrong: Float[np.ndarray, " wrong"], *, ax: Axes | None = None
) -> Figure:
    """Draw histograms of the activations of right classes, and of the most active wrong class of each image.

    Args:
        right: activations of the capsules of the labels.
        wrong: the largest activation among the other capsules of each image.
        ax: axes to draw in; by default those of a new figure.
    """
    figure, ax = place(ax, 5.5, 3.5)
    ax.hist(right, BINS, range=(0, 1), histtype="stepfilled", color=RIGHT, alpha=0.7, label="right class")
    ax.hist(wrong, BINS, range=(0, 1), histtype="step", color=WRONG, hatch="////", label="most active wrong class")
    ax.set(xlim=(0, 1), yscale="log", xlabel="activation", ylabel="number of capsules")
    ax.legend()
    return figure
