"""Figures of reconstructed images: beside their originals, from changed poses, and of overlapping digits."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from capsnet_jax.figures.style import WRONG, draw_tiles, place, styled, viewable

Images = Float[np.ndarray, "images height width channels"]

# Complementary, so that pixels of both capsules are white. The first one is twice as light as the second one in grey.
FIRST, SECOND = np.array([1, 0.65, 0]), np.array([0, 0.35, 1])


@styled
def reconstructions_figure(
    images: Images,
    reconstructions: Images,
    labels: Int[np.ndarray, " images"],
    predictions: Int[np.ndarray, " images"],
    class_names: Sequence[str],
) -> Figure:
    """Draw images in a row, and below each its reconstruction from the capsule of the predicted class.

    Args:
        images: images in [0, 1].
        reconstructions: reconstructions of these images.
        labels: true classes, named above.
        predictions: predicted classes, named below; bold and red where they differ.
        class_names: names of the classes.
    """
    figure = Figure(figsize=(0.8 * len(images) + 1, 2.3))
    axes = figure.subplots(2, len(images), squeeze=False)
    for column, (label, prediction) in enumerate(zip(labels, predictions, strict=True)):
        for axis, image in zip(axes[:, column], (images[column], reconstructions[column]), strict=True):
            axis.imshow(viewable(image), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        axes[0, column].set_title(class_names[label])
        is_wrong = {"color": WRONG, "weight": "bold"} if prediction != label else {}
        axes[1, column].set_xlabel(class_names[prediction], **is_wrong)
    axes[0, 0].set_ylabel("image")
    axes[1, 0].set_ylabel("capsule")
    return figure


@styled
def perturbations_figure(
    reconstructions: Float[np.ndarray, "dimensions changes height width channels"],
    changes: Float[np.ndarray, " changes"],
    *,
    ax: Axes | None = None,
) -> Figure:
    """Draw what each dimension of a pose means: a row of reconstructions for each dimension, while it is changed.

    Args:
        reconstructions: reconstructions with pixels in [0, 1].
        changes: the number that is added to the dimension in each column.
        ax: axes to draw in; by default those of a new figure.

    References:
        Sabour, Frosst, Hinton, "Dynamic Routing Between Capsules" (2017), figure 4.
    """
    rows, columns, height, width, _ = reconstructions.shape
    figure, ax = place(ax, 0.5 * columns + 0.8, 0.5 * rows * height / width + 0.8)
    draw_tiles(ax, viewable(reconstructions), cmap="gray", vmin=0, vmax=1)
    ax.set_xticks(ax.get_xticks(), [f"{change:+.2f}" if change else "0" for change in np.round(changes, 9)])
    ax.set_yticks(ax.get_yticks(), map(str, range(rows)))
    ax.set_xlabel("added to the dimension")
    ax.set_ylabel("dimension of the pose")
    return figure


@styled
def separations_figure(
    images: Images,
    separations: Float[np.ndarray, "images 2 height width channels"],
    labels: Int[np.ndarray, "images 2"],
    predictions: Int[np.ndarray, "images 2"],
    class_names: Sequence[str],
    *,
    ax: Axes | None = None,
) -> Figure:
    """Draw images of two classes, and below each its reconstructions from two capsules: in two colours, and alone.

    Pixels of the first capsule are orange, of the second one blue, and of both white. Colour images turn grey.

    Args:
        images: images in [0, 1].
        separations: reconstructions from the capsules of the two predicted classes.
        labels: true classes, named below the predicted ones.
        predictions: predicted classes, named below; bold and red where they are not the true ones.
        class_names: names of the classes.
        ax: axes to draw in; by default those of a new figure.

    References:
        Sabour, Frosst, Hinton, "Dynamic Routing Between Capsules" (2017), figure 5.
    """
    height, width = images.shape[1:3]
    figure, ax = place(ax, 0.9 * len(images) + 1.2, 3.6 * height / width + 0.8)
    grey = images.mean(axis=-1, keepdims=True) * np.ones(3)
    first, second = (separations[:, capsule].mean(axis=-1, keepdims=True) for capsule in (0, 1))
    draw_tiles(ax, np.stack([grey, first * FIRST + second * SECOND, first * FIRST, second * SECOND]))
    ax.set_yticks(ax.get_yticks(), ["image", "both capsules", "first capsule", "second capsule"])
    named = [[" ".join(class_names[k] for k in classes) for classes in rows] for rows in (predictions, labels)]
    ax.set_xticks(ax.get_xticks(), [f"{found}\n{true}" for found, true in zip(*named, strict=True)])
    ax.set_xlabel("predicted classes, and below them the true ones")
    for tick, *classes in zip(ax.get_xticklabels(), predictions, labels, strict=True):
        if set(classes[0]) != set(classes[1]):
            tick.set(color=to_rgb(WRONG), weight="bold")
    return figure
