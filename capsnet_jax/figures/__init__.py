"""Figures: functions of arrays that return a matplotlib Figure, without a window."""

from capsnet_jax.figures.comparison import comparison_figure
from capsnet_jax.figures.confusion import confusion_figure
from capsnet_jax.figures.files import save_figure
from capsnet_jax.figures.learning_curves import Curves, learning_curves_figure
from capsnet_jax.figures.reconstructions import reconstructions_figure

__all__ = [
    "Curves",
    "comparison_figure",
    "confusion_figure",
    "learning_curves_figure",
    "reconstructions_figure",
    "save_figure",
]
