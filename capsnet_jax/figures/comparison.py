"""Figure that compares the test errors of routings, at the last epoch and over epochs."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from capsnet_jax.figures.learning_curves import log_scale


def comparison_figure(
    errors: Mapping[str, Float[np.ndarray, "seeds epochs"]], failures: Mapping[str, str] | None = None
) -> Figure:
    """Plot the test errors of routings: at the last epoch, with each seed and the standard deviation; and over epochs.

    Args:
        errors: Test errors of each routing, in percent.
        failures: For routings without errors, the reason.
    """
    names = sorted(errors, key=lambda name: errors[name][:, -1].mean(), reverse=True)  # the best one on top
    failed = [f"{name}: {why}" for name, why in (failures or {}).items()]
    width = 9 + 0.08 * max(map(len, names), default=0)
    figure = Figure(figsize=(width, 0.35 * len(names) + 0.2 * len(failed) + 2.5), dpi=120, layout="constrained")
    last, over_epochs = figure.subplots(1, 2)
    for row, name in enumerate(names):
        # Colour and marker on the left identify the lines on the right; combined, 70 are different.
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
    for axis in (last.xaxis, over_epochs.yaxis):
        log_scale(axis, list(errors.values()))
        axis.grid(alpha=0.3)
    if failed:
        figure.supxlabel("\n".join(failed), fontsize=9)
    return figure
