"""Saving of figures."""

from pathlib import Path

from matplotlib.figure import Figure

from capsnet_jax.errors import UsageError


def save_figure(figure: Figure, path: Path) -> None:
    """Save a figure in the format of the file name, such as .png, .pdf or .svg.

    Raises:
        UsageError: The file cannot be written, or its ending is not that of a picture.
    """
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"The picture {path} cannot be written: {reason}") from error
