"""Figures: functions of arrays that return a matplotlib Figure, without a window."""

from pathlib import Path

from matplotlib.figure import Figure

from capsnet_jax.errors import UsageError
from capsnet_jax.figures.classes import Mistakes, activations_figure, confusion_figure
from capsnet_jax.figures.couplings import convergence_figure, couplings_figure
from capsnet_jax.figures.curves import Curves, comparison_figure, learning_curves_figure
from capsnet_jax.figures.images import perturbations_figure, reconstructions_figure, separations_figure

__all__ = [
    "Curves",
    "Mistakes",
    "activations_figure",
    "comparison_figure",
    "confusion_figure",
    "convergence_figure",
    "couplings_figure",
    "learning_curves_figure",
    "perturbations_figure",
    "reconstructions_figure",
    "save_figure",
    "separations_figure",
]


def save_figure(figure: Figure, path: Path) -> None:
    """Save a figure in the format of the file name, such as .png, .pdf or .svg.

    Raises:
        UsageError: the file cannot be written, or its suffix is not an image format.
    """
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"The picture {path} cannot be written: {reason}") from error
