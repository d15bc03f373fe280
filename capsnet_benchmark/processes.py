"""A process for each framework, which is told what to do by lines of JSON."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from capsnet_benchmark import worker
from capsnet_jax.errors import UsageError


class WorkerError(UsageError):
    """A process said what went wrong, or ended without a word."""


class Worker:
    """A process that measures a row.

    Args:
        row: what it is called in messages.
        module: where its class `Work` is.
        arguments: of that class, in types that JSON has.
    """

    def __init__(self, row: str, module: str, arguments: Mapping[str, Any]):
        self.row = row
        self._doing = "starting"
        self._errors = tempfile.TemporaryFile("w+")  # a pipe that nobody empties would stop it  # noqa: SIM115
        self._caches = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._process = subprocess.Popen(
            [sys.executable, "-P", worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=self._environment(),
        )
        self._send({"path": sys.path, "module": module, "arguments": arguments})

    def _environment(self) -> dict[str, str]:
        compiled_anew = {"JAX_ENABLE_COMPILATION_CACHE": "false", "TORCHINDUCTOR_CACHE_DIR": self._caches.name}
        shares_the_gpu = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        return os.environ | compiled_anew | shares_the_gpu

    def introduction(self) -> dict[str, str]:
        """Waits until it has started; returns its "platform", "cpu" or "gpu", and its "device"."""
        return self._receive()

    def prepare(self, name: str) -> float:
        """Makes it ready for a measurement; returns the seconds of the first call, in which programs are compiled."""
        return self._ask("prepare", name)["seconds"]

    def sample(self, name: str) -> float:
        """Seconds of the measurement that it is ready for."""
        return self._ask("sample", name)["seconds"]

    def peak_memory(self) -> int | None:
        """The most bytes that it used so far; None if that is not known."""
        return self._ask("peak_memory", "")["bytes"]

    def tell(self, name: str) -> Any:
        """What a method of its `Work` returns, as JSON has it."""
        return self._ask("tell", name)["told"]

    def stop(self) -> None:
        """Ends the process, whatever it is doing."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()
        self._caches.cleanup()

    def _ask(self, verb: str, name: str) -> dict[str, Any]:
        self._doing = f"measuring {name}" if name else "measuring memory"
        self._send({verb: name})
        return self._receive()

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._death()
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.row} failed at {self._doing}: {answer['error']}")
        return answer

    def _death(self) -> WorkerError:
        status = self._process.wait()
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        last = f"its last line was: {lines[-1]}" if lines else "it told nothing"
        return WorkerError(f"The process of {self.row} {how} at {self._doing}; {last}")


def same_device(introductions: dict[str, dict[str, str]]) -> tuple[str, str]:
    """The platform and the device that all rows are on.

    Raises:
        UsageError: they are not on the same.
    """
    devices = [(introduction["platform"], introduction["device"]) for introduction in introductions.values()]
    if len({platform for platform, _ in devices}) > 1:
        told = ", ".join(f"{row} on {introduction['device']}" for row, introduction in introductions.items())
        raise UsageError(
            f"The rows are not on the same device: {told}; expected JAX and PyTorch both with CUDA, or both without, "
            "as with CUDA_VISIBLE_DEVICES= (empty)."
        )
    return devices[0]
