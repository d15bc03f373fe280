"""Writing files so that each is either there whole or not at all."""

from pathlib import Path


def replace_file(path: Path, text: str) -> None:
    """Write a file in place of the one before; a crash leaves one or the other."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)
