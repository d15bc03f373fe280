"""Figures of images: reconstructions, and confusion matrices."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from matplotlib import rc_context
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

Images = Float[np.ndarray, "images height width channels"]


def reconstructions_figure(
    images: Images, reconstructions: Images, labels: Int[np.ndarray, " images"], predictions: Int[np.ndarray, " images"]
) -> Figure:
    """Draw images in a row, and below each its reconstruction from the capsule of the predicted class.

    Args:
        images: images in [0, 1], with 1 or 3 channels.
        reconstructions: reconstructions of these images.
        labels: true classes, shown above.
        predictions: predicted classes, shown below; in red where they differ.
    """
    figure = Figure(figsize=(0.8 * len(images) + 1, 2.3), dpi=120, layout="constrained")
    axes = figure.subplots(2, len(images), squeeze=False)
    for column, (label, prediction) in enumerate(zip(labels, predictions, strict=True)):
        for axis, image in zip(axes[:, column], (images[column], reconstructions[column]), strict=True):
            axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        axes[0, column].set_title(str(label), fontsize=9)
        axes[1, column].set_xlabel(str(prediction), fontsize=9, color="black" if prediction == label else "red")
    axes[0, 0].set_ylabel("image", fontsize=9)
    axes[1, 0].set_ylabel("capsule", fontsize=9)
    return figure


@rc_context({"text.parse_math": False})  # the names of runs and classes are no formulas
def confusion_figure(confusion: Int[np.ndarray, "o o"], class_names: Sequence[str]) -> Figure:
    """Draw a confusion matrix; each cell is coloured by its fraction of the images of the true class.

    Args:
        confusion: numbers of images, `[true predicted]`.
        class_names: names of rows and columns.
    """
    size = len(class_names)
    side = np.clip(0.4 * size, 3, 14)
    figure = Figure(figsize=(side + 2.5, side + 1.5), dpi=120, layout="constrained")
    axis = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    # The square root makes small fractions visible.
    shown = axis.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    fontsize = 9 if size <= 25 else 5
    axis.set_xticks(range(size), class_names, fontsize=fontsize, rotation=90 if max(map(len, class_names)) > 2 else 0)
    axis.set_yticks(range(size), class_names, fontsize=fontsize)
    axis.set_xlabel("predicted", fontsize=9)
    axis.set_ylabel("true", fontsize=9)
    if size <= 25:
        for true, predicted in np.argwhere(confusion):
            color = "white" if shares[true, predicted] > 0.4 else "black"
            text = str(confusion[true, predicted])
            axis.text(predicted, true, text, ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(shown, ax=axis, ticks=[0, 0.01, 0.1, 0.5, 1], format="{x:.0%}", shrink=0.8)
    return figure
