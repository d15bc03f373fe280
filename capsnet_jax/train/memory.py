"""Bytes: of the device, of a program, of this process."""

import ctypes
import math
import re
import sys
from pathlib import Path
from typing import Any

import jax


def available_memory() -> int | float:
    """Bytes that the device has for programs and their data, or on CPU what is free now; infinite if it cannot tell."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return min(_available_on_host(), _available_in_group())


def _available_on_host() -> int | float:
    """What Linux says could be had without swapping, caches included."""
    path = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: +(\d+) kB", path.read_text()) if path.exists() else None
    return 1024 * int(found[1]) if found else math.inf


def _available_in_group() -> int | float:
    """What is left to the container or job, if it has a limit (Linux control groups, version 2)."""
    limit, current = (Path("/sys/fs/cgroup") / f"memory.{name}" for name in ("max", "current"))
    if not (limit.exists() and current.exists()) or limit.read_text().strip() == "max":
        return math.inf
    return int(limit.read_text()) - int(current.read_text())


def peak_memory() -> int | None:
    """The most bytes that were in use on the device so far; on CPU, of this process. None if that is not known."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return peak_memory_of_process()


def peak_memory_of_process() -> int | None:
    """The most bytes that this process had in memory so far; None if that is not known.

    `capsnet_benchmark.worker` has the same function, as its process, which also measures PyTorch, must not import JAX.
    """
    status = Path("/proc/self/status")
    # What `getrusage` tells on Linux is at least what the process had that started this one.
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return 1024 * int(found[1])
    if sys.platform == "win32":
        return None
    import resource  # not there on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def program_memory(compiled: Any) -> int:
    """Bytes that a compiled program needs: its arguments, its results where they do not take their place, and more."""
    analysis = compiled.memory_analysis()
    sizes = (analysis.argument_size_in_bytes, analysis.output_size_in_bytes, analysis.temp_size_in_bytes)
    return sum(sizes) - analysis.alias_size_in_bytes


def compile_lean(function: Any, *arguments: Any) -> Any:
    """Compiles a jitted function for these arguments or shapes, and gives back to the system what others have freed.

    The compiler leaves hundreds of megabytes with the allocator of the C library, out of reach of the large arrays that
    the program needs; the full-size training process is a quarter smaller without them.
    """
    _return_freed_memory()
    compiled = function.lower(*arguments).compile()
    _return_freed_memory()
    return compiled


def _return_freed_memory() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # of the GNU library
    if trim is not None:
        trim(0)
