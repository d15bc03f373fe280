"""Every picture, as a matplotlib figure that belongs to no window."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, SymmetricalLogLocator

from capsnet_jax.errors import UsageError

Images = Float[np.ndarray, "images height width channels"]


def reconstructions_figure(
    images: Images, reconstructions: Images, labels: Int[np.ndarray, " images"], predictions: Int[np.ndarray, " images"]
) -> Figure:
    """Images in a row, their reconstructions from the capsule of the predicted class below.

    Args:
        images: in [0, 1], of 1 or 3 channels.
        reconstructions: of the same images.
        labels: their classes, as titles.
        predictions: told in red where they are wrong.
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


def comparison_figure(
    errors: Mapping[str, Float[np.ndarray, "seeds epochs"]], failures: Mapping[str, str] | None = None
) -> Figure:
    """Test errors of routings: at the last epoch, of each seed and with their deviation; and from epoch to epoch.

    Args:
        errors: of each routing, in percent.
        failures: why there are none of these routings.
    """
    names = sorted(errors, key=lambda name: errors[name][:, -1].mean(), reverse=True)  # the best one on top
    failed = [f"{name}: {why}" for name, why in (failures or {}).items()]
    width = 9 + 0.08 * max(map(len, names), default=0)
    figure = Figure(figsize=(width, 0.35 * len(names) + 0.2 * len(failed) + 2.5), dpi=120, layout="constrained")
    last, over_epochs = figure.subplots(1, 2)
    for row, name in enumerate(names):
        # Colour and marker on the left are the key to the lines on the right; together they do not soon repeat.
        color, marker = f"C{row % 10}", "osD^vPX"[row % 7]
        seeds, epochs = errors[name].shape
        means = errors[name].mean(axis=0)
        deviation = errors[name][:, -1].std(ddof=1) if seeds > 1 else None
        last.errorbar(means[-1], row, xerr=deviation, fmt=marker, capsize=4, color=color)
        last.plot(errors[name][:, -1], np.full(seeds, row), "|", markersize=10, color="black", alpha=0.5)
        over_epochs.plot(np.arange(1, epochs + 1), means, marker=marker, markersize=5, color=color, label=name)
    last.set(yticks=range(len(names)), yticklabels=names, ylim=(-0.6, max(len(names), 1) - 0.4))
    for row, label in enumerate(last.get_yticklabels()):
        label.set_color(f"C{row % 10}")
    num_epochs = max((error.shape[1] for error in errors.values()), default=1)
    over_epochs.set(xlim=(0.6, num_epochs + 0.4))
    over_epochs.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    last.set_xlabel("test error at the last epoch, %", fontsize=9)
    over_epochs.set_xlabel("epoch", fontsize=9)
    over_epochs.set_ylabel("mean test error, %", fontsize=9)
    values = np.concatenate([error.ravel() for error in errors.values()]) if names else np.ones(1)
    for axis, scale in ((last.xaxis, last.set_xscale), (over_epochs.yaxis, over_epochs.set_yscale)):
        if values.min() > 0 and values.max() / values.min() > 10:
            scale("log")
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
    if failed:
        figure.supxlabel("\n".join(failed), fontsize=9)
    return figure


def confusion_figure(confusion: Int[np.ndarray, "o o"], class_names: Sequence[str]) -> Figure:
    """How many images of each class are taken for each, coloured by their share of the images of the class.

    Args:
        confusion: numbers of images, `[true predicted]`.
        class_names: of rows and columns.
    """
    size = len(class_names)
    side = np.clip(0.4 * size, 3, 14)
    figure = Figure(figsize=(side + 2.5, side + 1.5), dpi=120, layout="constrained")
    axis = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    # The root shows confusions, which are few of many.
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


class Curves(NamedTuple):
    """How a run went, as points: over training steps the loss, and over epochs the errors in percent.

    Attributes:
        chunk_losses: mean training loss of each chunk, at its last step.
        epoch_losses: mean training loss of each epoch, in the middle of its steps.
        validation_errors: after each epoch; none without validation images.
        test_errors: after each epoch.
    """

    chunk_losses: Float[np.ndarray, "chunks 2"]
    epoch_losses: Float[np.ndarray, "epochs 2"]
    validation_errors: Float[np.ndarray, "validations 2"]
    test_errors: Float[np.ndarray, "epochs 2"]


def learning_curves_figure(runs: Mapping[str, Curves]) -> Figure:
    """Training losses of runs over steps on the left, their validation and test errors over epochs on the right.

    Args:
        runs: by the names that they have in the legend.
    """
    columns = min(len(runs), 1 if max(map(len, runs)) > 60 else 2)
    legend_height = 0.2 * math.ceil(len(runs) / columns)
    figure = Figure(figsize=(10, 4 + legend_height), dpi=120, layout="constrained")
    losses, errors = figure.subplots(1, 2)
    for row, (name, curves) in enumerate(runs.items()):
        color, marker = f"C{row % 10}", "osD^vPX"[row % 7]
        style = {"color": color, "marker": marker, "markersize": 4}
        losses.plot(*curves.chunk_losses.T, color=color, alpha=0.25, linewidth=0.7)
        losses.plot(*curves.epoch_losses.T, **style, label=name)
        errors.plot(*curves.validation_errors.T, **style, linestyle="--", markerfacecolor="none")
        errors.plot(*curves.test_errors.T, **style)
    _log_scale(losses, [points[:, 1] for curves in runs.values() for points in curves[:2]])
    losses.set_xlabel("training step", fontsize=9)
    losses.set_ylabel("training loss, mean of an epoch (faint: of a chunk)", fontsize=9)
    _log_scale(errors, [points[:, 1] for curves in runs.values() for points in curves[2:]])
    errors.set_xlabel("epoch", fontsize=9)
    errors.set_ylabel("error, %", fontsize=9)
    for axis in (losses, errors):
        axis.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
    if any(len(curves.validation_errors) for curves in runs.values()):
        test = Line2D([], [], color="black", marker="o", markersize=4)
        validation = Line2D([], [], color="black", marker="o", markersize=4, markerfacecolor="none", linestyle="--")
        errors.legend([test, validation], ["test", "validation"], fontsize=8)
    figure.legend(*losses.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=8)
    return figure


def _log_scale(axis: Axes, values: Sequence[np.ndarray]) -> None:
    """Makes the vertical axis logarithmic, but for zero, if values are not too close to each other for that."""
    of_all = np.concatenate(values)
    positive = of_all[of_all > 0]
    ratio = positive.max() / positive.min() if positive.size else 1
    if ratio > 3:
        subs = (1, 2, 5) if ratio > 10 else (1, 1.5, 2, 3, 4, 5, 7)
        if 0 in of_all:
            axis.set_yscale("symlog", linthresh=positive.min(), linscale=0.3)
            axis.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=positive.min(), subs=subs))
            axis.set_ylim(bottom=-0.1 * positive.min())
        else:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=subs))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a picture, of a kind that the file's ending tells.

    Raises:
        UsageError: the file cannot be written, or its ending is of no kind of picture.
    """
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"The picture {path} cannot be written: {reason}") from error
