"""Atomic writing of files."""

from pathlib import Path


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file atomically, text as UTF-8: after a crash, the file is either the old or the new one."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)
