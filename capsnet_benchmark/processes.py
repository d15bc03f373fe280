"""Worker processes, one for each row of the benchmark, controlled by requests in JSON."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from capsnet_benchmark import worker
from capsnet_jax.errors import UsageError


class WorkerError(UsageError):
    """A worker process reported an error or died."""


class Worker:
    """A process that measures one row.

    Args:
        row: name of the row, for messages.
        module: name of the module that defines the class `Work`.
        arguments: keyword arguments of that class, as JSON types.

    Attributes:
        platform: "cpu" or "gpu", once the process is ready.
        device: name of the device.
    """

    platform, device = "", ""

    def __init__(self, row: str, module: str, arguments: Mapping[str, Any]):
        self.row = row
        self._doing = "starting"
        self._errors = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would block  # noqa: SIM115
        self._caches = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        # Compilation is timed without caches, and JAX must leave memory of the GPU for PyTorch.
        settings = {"JAX_ENABLE_COMPILATION_CACHE": "false", "TORCHINDUCTOR_CACHE_DIR": self._caches.name}
        self._process = subprocess.Popen(
            [sys.executable, "-P", worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | settings | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        )
        self._send({"path": sys.path, "module": module, "arguments": arguments})

    def wait_until_ready(self) -> None:
        """Wait until the process has imported its framework and knows its device."""
        self.platform, self.device = self._receive()

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of `worker.Timer`, or else of the `Work`, in the process, and return its result.

        Raises:
            WorkerError: the method raised, or the process died.
        """
        if method == "prepare":
            self._doing = f"measuring {arguments[0]}"
        self._send([method, *arguments])
        return self._receive()

    def stop(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()
        self._caches.cleanup()

    def _send(self, message: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._death()
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"{self.row} failed while {self._doing}: {reply['error']}")
        return reply["result"]

    def _death(self) -> WorkerError:
        status = self._process.wait()
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        last = f"its last line was: {lines[-1]}" if lines else "it printed nothing"
        return WorkerError(f"The process of {self.row} {how} while {self._doing}; {last}")


@contextmanager
def start_workers(works: Mapping[str, tuple[str, Mapping[str, Any]]]) -> Iterator[list[Worker]]:
    """Start a process for each row and wait until all are ready; kill them at the end.

    Args:
        works: module and arguments of `Worker`, by row.

    Raises:
        UsageError: a process cannot start, or the rows are not on the same device.
    """
    workers: list[Worker] = []
    try:
        for row, (module, arguments) in works.items():
            workers.append(Worker(row, module, arguments))
        for each in workers:
            each.wait_until_ready()
        if len({each.platform for each in workers}) > 1:
            rows = ", ".join(f"{each.row} on {each.device}" for each in workers)
            raise UsageError(
                f"The rows are on different devices: {rows}; expected JAX and PyTorch both with CUDA, or both without, "
                "as with CUDA_VISIBLE_DEVICES= (empty)."
            )
        yield workers
    finally:
        for each in workers:
            each.stop()
