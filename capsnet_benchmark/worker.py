"""The process that measures one row of the benchmark: it answers requests in JSON and times calls.

This file is run by its path and imports neither JAX nor PyTorch, so the same code times both. A process loads only one
of them. The class `Work` of the module named in the first request provides the functions to time.
"""

import ctypes
import gc
import importlib
import json
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

WARM_UP = 3  # untimed calls after the first, which compiles
SHORTEST = 0.05  # seconds of a sample; short calls are repeated to get there, as clocks are coarse
LIBC = ctypes.CDLL(None) if sys.platform != "win32" else None
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h> in the GNU C library


class Timer:
    """Measures time and memory of the calls that a `Work` prepares.

    Args:
        work: an instance of `capsnet_benchmark.jax_work.Work` or `capsnet_torch.benchmark.Work`.
    """

    def __init__(self, work: Any):
        self._work = work
        self._calls: list[tuple[Callable[[], Any], float, int]] = []  # call, weight in the sum, repeats
        self._host_only = False

    def prepare(self, name: str) -> float:
        """Prepare a measurement and warm up; return the seconds of the first call, which compiles."""
        self._calls = []  # frees the previous measurement
        self._host_only = name == "dispatch"
        first = 0.0
        for call, weight in self._work.prepare(name):
            first += self._seconds(call)
            shortest = min(self._seconds(call) for _ in range(WARM_UP))
            # Repeated dispatches would fill the queue of the device, and the host would wait.
            repeats = 1 if self._host_only else math.ceil(SHORTEST / max(shortest, 1e-9))
            self._calls.append((call, weight, max(repeats, 1)))
        self._work.warmed_up()
        return first

    def sample(self) -> float:
        """Time the prepared calls, and return the weighted sum of their seconds."""
        return sum(weight * self._seconds(call, repeats) for call, weight, repeats in self._calls)

    def peak_memory(self) -> int | None:
        """Return the largest number of bytes in use so far, on the GPU or of this process; None if unknown."""
        return self._work.peak_device_memory() or peak_memory_of_process()

    def extra_memory(self) -> int | None:
        """Measure the bytes that the prepared call needs in addition to its inputs and results; None if unknown."""
        work, (call, _, _) = self._work, self._calls[0]
        on_cpu = work.platform == "cpu"
        if on_cpu:
            if not hasattr(LIBC, "mallopt"):
                return None
            keep_freed_memory(2**16)  # freed memory that the process keeps would hide what the call allocates
            work.block(call())
            gc.collect()
            time.sleep(0.1)  # XLA's threads free temporary arrays after the result is available
            LIBC.malloc_trim(0)  # type: ignore[union-attr]
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        work.warmed_up()
        before = (process_memory("VmRSS") or 0) if on_cpu else work.memory_in_use()
        result = call()
        work.block(result)
        extra = (self.peak_memory() or 0) - before - work.size(result)
        if on_cpu:
            keep_freed_memory(2**25)  # the largest threshold that malloc reaches by itself; calls are faster with it
        return max(extra, 0)

    def _seconds(self, call: Callable[[], Any], repeats: int = 1) -> float:
        """Measure the mean seconds of consecutive calls, until the last result is available."""
        result = None
        start = time.perf_counter()
        for _ in range(repeats):
            result = call()
        returned = time.perf_counter()
        self._work.block(result)
        return ((returned if self._host_only else time.perf_counter()) - start) / repeats


def process_memory(name: str) -> int | None:
    """Return the memory of this process in bytes: "VmRSS" for now, "VmHWM" for the peak; None except on Linux."""
    status = Path("/proc/self/status")
    found = re.search(rf"{name}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * int(found[1]) if found else None


def peak_memory_of_process() -> int | None:
    """Return the largest number of bytes of memory that this process has used so far; None if unknown.

    Same as `capsnet_jax.train.memory.peak_memory_of_process`, which cannot be imported without JAX.
    """
    # On Linux, `getrusage` includes the parent process, so it is only a fallback.
    if (peak := process_memory("VmHWM")) is not None or sys.platform == "win32":
        return peak
    import resource  # does not exist on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def keep_freed_memory(size: int) -> None:
    """Let malloc of the GNU C library keep freed blocks of up to this many bytes."""
    assert LIBC is not None
    LIBC.mallopt(M_MMAP_THRESHOLD, size)
    LIBC.mallopt(M_TRIM_THRESHOLD, 2 * size)


def main() -> None:
    """Answer the requests of the parent process, `capsnet_benchmark.processes.Worker`, until it closes the pipe."""
    # Frameworks print to standard output, which must not mix with the replies.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        job = json.loads(sys.stdin.readline())
        sys.path[:] = job["path"]
        work = importlib.import_module(job["module"]).Work(**job["arguments"])
        timer = Timer(work)
        result: Any = (work.platform, work.device)
        print(json.dumps({"result": result}), file=replies)
        for method, *arguments in map(json.loads, sys.stdin):
            result = getattr(timer if hasattr(timer, method) else work, method)(*arguments)
            print(json.dumps({"result": result}), file=replies)
    except Exception as error:  # anything that a framework may raise
        traceback.print_exc()
        kind = type(error).__name__
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        message = ": ".join([kind, *lines[:1]] if kind != "UsageError" else lines)
        print(json.dumps({"error": message}), file=replies)


if __name__ == "__main__":
    main()
