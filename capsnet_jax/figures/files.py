"""Figures in files."""

from pathlib import Path

from matplotlib.figure import Figure

from capsnet_jax.errors import UsageError


def save_figure(figure: Figure, path: Path) -> None:
    """Save a figure, in the format that the file's ending names.

    Raises:
        UsageError: the file cannot be written, or its ending is of no kind of picture.
    """
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"The picture {path} cannot be written: {reason}") from error
