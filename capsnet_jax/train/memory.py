"""Memory of the device, of a compiled program and of this process, in bytes."""

import math
import re
import sys
from pathlib import Path
from typing import Any

import jax


def available_memory() -> int | float:
    """Memory of the device or, on CPU, memory that is free now; infinite if unknown."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    available: int | float = math.inf
    host = Path("/proc/meminfo")
    if host.exists() and (found := re.search(r"MemAvailable: +(\d+) kB", host.read_text())):
        available = 1024 * int(found[1])  # what Linux can provide without swapping
    # A container or job may have a limit of its own (Linux control groups, version 2).
    limit, current = (Path("/sys/fs/cgroup") / f"memory.{name}" for name in ("max", "current"))
    if limit.exists() and current.exists() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(current.read_text()))
    return available


def peak_memory() -> int | None:
    """Peak memory use on the device or, on CPU, of this process; None if unknown."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return peak_memory_of_process()


def peak_memory_of_process() -> int | None:
    """Peak resident memory of this process; None if unknown.

    `capsnet_benchmark.worker` has a copy of this function, because it also measures PyTorch and must not import JAX.
    """
    status = Path("/proc/self/status")
    # On Linux, `getrusage` returns at least the peak of the parent process.
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return 1024 * int(found[1])
    if sys.platform == "win32":
        return None
    import resource  # does not exist on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def program_memory(compiled: Any) -> int:
    """Memory that a compiled program needs: arguments, results that are not written in place, and temporaries."""
    analysis = compiled.memory_analysis()
    sizes = (analysis.argument_size_in_bytes, analysis.output_size_in_bytes, analysis.temp_size_in_bytes)
    return sum(sizes) - analysis.alias_size_in_bytes
