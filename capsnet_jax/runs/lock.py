"""A lock on a folder, so that two processes do not train in it. The system releases it when the process ends."""

import importlib
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from capsnet_jax.errors import UsageError

LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of an existing folder inside this block. Without effect where the system has no file locks.

    Raises:
        UsageError: another process holds it; the message says which.
    """
    try:
        fcntl = importlib.import_module("fcntl")  # not on Windows
        file = _lock(fcntl, folder)
    except (ImportError, OSError):  # some network file systems have no locks
        yield
        return
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):
                (folder / LOCK).unlink()


def _lock(fcntl: Any, folder: Path) -> TextIO:
    """Return the locked file, open.

    Raises:
        UsageError: another process holds the lock.
        OSError: there can be no lock.
    """
    path = folder / LOCK
    while True:
        with ExitStack() as opened:
            file = opened.enter_context(path.open("a+"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise UsageError(
                    f"The run folder {folder} is in use by {holder}; expected that to end first, or another folder."
                ) from error
            with suppress(FileNotFoundError):  # the holder before may have removed the file just now
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    opened.pop_all()
                    return file
