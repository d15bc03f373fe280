"""Figures of curves: the learning curves of runs, and the test errors of routings over epochs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, SymmetricalLogLocator

from capsnet_jax.figures.style import BAND, COLORS, MARKERS, styled


class Curves(NamedTuple):
    """Learning curves of a run, as points: losses over training steps, errors in percent over epochs.

    Attributes:
        chunk_losses: mean training loss of each chunk of steps, at its last step.
        epoch_losses: mean training loss of each epoch, at the middle of its steps.
        validation_errors: after each epoch; empty without validation images.
        test_errors: after each epoch.
    """

    chunk_losses: Float[np.ndarray, "chunks 2"]
    epoch_losses: Float[np.ndarray, "epochs 2"]
    validation_errors: Float[np.ndarray, "validations 2"]
    test_errors: Float[np.ndarray, "epochs 2"]


@styled
def learning_curves_figure(runs: Mapping[str, Sequence[Curves]]) -> Figure:
    """Plot training losses of runs over steps and, in a second panel, validation and test errors over epochs.

    Args:
        runs: learning curves of the seeds of each run, by its name, which is shown in the legend. Of several seeds,
            the mean is a line, and the range from the lowest to the highest a band.
    """
    columns = min(len(runs), 1 if max(map(len, runs)) > 60 else 2)
    legend_height = 0.2 * math.ceil(len(runs) / columns)
    figure = Figure(figsize=(10, 4 + legend_height))
    losses, errors = figure.subplots(1, 2)
    for row, (name, seeds) in enumerate(runs.items()):
        color = COLORS[row % len(COLORS)]
        style = {"color": color, "marker": MARKERS[row % len(MARKERS)]}
        chunk_losses, epoch_losses, validation_errors, test_errors = zip(*seeds, strict=True)
        for points in chunk_losses:
            losses.plot(*points.T, color=color, alpha=0.25, linewidth=0.7)
        _plot_seeds(losses, epoch_losses, **style, label=name)
        _plot_seeds(errors, validation_errors, **style, linestyle="--", markerfacecolor="none")
        _plot_seeds(errors, test_errors, **style)
    of_all = [curves for seeds in runs.values() for curves in seeds]
    log_scale(losses.yaxis, [points[:, 1] for curves in of_all for points in curves[:2]])
    losses.set_xlabel("training step")
    losses.set_ylabel("training loss, mean of an epoch (faint: of a chunk)")
    log_scale(errors.yaxis, [points[:, 1] for curves in of_all for points in curves[2:]])
    errors.set_xlabel("epoch")
    errors.set_ylabel("error, %")
    for axis in (losses, errors):
        axis.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
    if any(len(curves.validation_errors) for curves in of_all):
        test = Line2D([], [], color="black", marker="o")
        validation = Line2D([], [], color="black", marker="o", markerfacecolor="none", linestyle="--")
        errors.legend([test, validation], ["test", "validation"])
    figure.legend(*losses.get_legend_handles_labels(), loc="outside lower center", ncols=columns)
    return figure


def _plot_seeds(ax: Axes, seeds: Sequence[Float[np.ndarray, "_ 2"]], **style: Any) -> None:
    """Plot the mean of the points of several seeds as a line, and their range as a band, where all have a point."""
    steps = np.array(sorted(set.intersection(*(set(points[:, 0]) for points in seeds))))
    values = np.stack([points[np.isin(points[:, 0], steps), 1] for points in seeds])
    ax.plot(steps, values.mean(axis=0), **style)
    if len(seeds) > 1:
        ax.fill_between(steps, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=BAND, linewidth=0)


@styled
def comparison_figure(
    errors: Mapping[str, Float[np.ndarray, "seeds epochs"]], failures: Mapping[str, str] | None = None
) -> Figure:
    """Plot the test errors of routings: at the last epoch, with each seed and the standard deviation; and over epochs.

    Args:
        errors: test errors of each routing, in percent.
        failures: for routings without errors, the reason.
    """
    names = sorted(errors, key=lambda name: errors[name][:, -1].mean(), reverse=True)  # the best one on top
    failed = [f"{name}: {why}" for name, why in (failures or {}).items()]
    width = 9 + 0.08 * max(map(len, names), default=0)
    figure = Figure(figsize=(width, 0.35 * len(names) + 0.2 * len(failed) + 2.5))
    last, over_epochs = figure.subplots(1, 2)
    for row, name in enumerate(names):
        # Colour and marker on the left identify the lines on the right; combined, 70 are different. Names stay black:
        # light colours are hard to read, above all in grey.
        color, marker = COLORS[row % len(COLORS)], MARKERS[row % len(MARKERS)]
        seeds, epochs = errors[name].shape
        means = errors[name].mean(axis=0)
        deviation = errors[name][:, -1].std(ddof=1) if seeds > 1 else None
        last.errorbar(means[-1], row, xerr=deviation, fmt=marker, capsize=4, color=color)
        last.plot(errors[name][:, -1], np.full(seeds, row), "|", markersize=10, color="black", alpha=0.5)
        over_epochs.plot(np.arange(1, epochs + 1), means, marker=marker, markersize=5, color=color, label=name)
    last.set(yticks=range(len(names)), yticklabels=names, ylim=(-0.6, max(len(names), 1) - 0.4))
    num_epochs = max((error.shape[1] for error in errors.values()), default=1)
    over_epochs.set(xlim=(0.6, num_epochs + 0.4))
    over_epochs.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    last.set_xlabel("test error at the last epoch, %")
    over_epochs.set_xlabel("epoch")
    over_epochs.set_ylabel("mean test error, %")
    for axis in (last.xaxis, over_epochs.yaxis):
        log_scale(axis, list(errors.values()))
        axis.grid(alpha=0.3)
    if failed:
        figure.supxlabel("\n".join(failed))
    return figure


def log_scale(axis: Axis, values: Sequence[np.ndarray]) -> None:
    """Make the x or y axis logarithmic, with room for zero if needed, unless the values are too similar for that.

    Args:
        axis: `xaxis` or `yaxis` of a subplot.
        values: arrays of all values along this axis.
    """
    of_all = np.concatenate([array.ravel() for array in values]) if values else np.ones(1)
    positive = of_all[of_all > 0]
    ratio = positive.max() / positive.min() if positive.size else 1
    if ratio > 3:
        is_x = axis is axis.axes.xaxis
        set_scale = axis.axes.set_xscale if is_x else axis.axes.set_yscale
        set_limits = axis.axes.set_xlim if is_x else axis.axes.set_ylim
        subs = (1, 2, 5) if ratio > 10 else (1, 1.5, 2, 3, 4, 5, 7)
        if 0 in of_all:
            set_scale("symlog", linthresh=positive.min(), linscale=0.3)
            axis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=positive.min(), subs=subs))
            set_limits(-0.1 * positive.min())
        else:
            set_scale("log")
            axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
