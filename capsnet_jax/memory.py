"""Bytes: of the device, of a program, of this process."""

import math
import os
import sys
from typing import Any

import jax


def available_memory() -> int | float:
    """Bytes that the device has for programs and their data, or on CPU what is free now; infinite if it cannot tell."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", ()):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return math.inf


def peak_memory() -> int | None:
    """The most bytes that were in use on the device so far; on CPU, of this process. None if that is not known."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    if sys.platform == "win32":
        return None
    import resource  # not there on Windows

    # The kernel counts in units of 1024 bytes, but for macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def program_memory(compiled: Any) -> int:
    """Bytes that a compiled program needs: its arguments, its results where they do not take their place, and more."""
    analysis = compiled.memory_analysis()
    sizes = (analysis.argument_size_in_bytes, analysis.output_size_in_bytes, analysis.temp_size_in_bytes)
    return sum(sizes) - analysis.alias_size_in_bytes
