"""A lock on a folder, so that two processes do not train in it. The system releases it when the process ends."""

import importlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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
        file = (folder / LOCK).open("a+")
    except (ImportError, OSError):
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UsageError(
                f"The run folder {folder} is in use by {holder}; expected that to end first, or another folder."
            ) from error
        except OSError:  # some network file systems have no locks
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):
                (folder / LOCK).unlink()
