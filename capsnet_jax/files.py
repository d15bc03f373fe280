"""Atomic writing of files."""

from pathlib import Path


def replace_file(path: Path, text: str) -> None:
    """Write a text file atomically: after a crash, the file is either the old or the new one."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
