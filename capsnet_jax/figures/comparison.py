"""The figure that compares routings: their test errors, at the last epoch and over epochs."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter


def comparison_figure(
    errors: Mapping[str, Float[np.ndarray, "seeds epochs"]], failures: Mapping[str, str] | None = None
) -> Figure:
    """Plot the test errors of routings: at the last epoch, with each seed and their deviation; and over epochs.

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
