"""How programs are compiled: options of XLA, a cache on disk, and memory that the compiler leaves behind."""

import ctypes
import os
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import jax

# Which operations XLA for CPU hands to its library YNNPACK. By default it hands over convolutions, too, which its own
# code computes up to three times faster.
ON_CPU = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE"}

CACHE_BYTES = 2**30
SECONDS_WORTH_CACHING = 0.1


def compiler_options() -> dict[str, str]:
    """Return the options with which XLA should compile models for this platform, for `jax.jit`.

    Examples:
        >>> double = jax.jit(lambda x: 2 * x, compiler_options=compiler_options())
        >>> int(double(3))
        6
    """
    return ON_CPU if jax.default_backend() == "cpu" and _is_known() else {}


@cache
def _is_known() -> bool:
    """Whether this version of XLA knows the options for CPU, which are experimental."""
    try:
        jax.jit(lambda x: x, compiler_options=ON_CPU).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def use_cache() -> None:
    """Keep compiled programs in the user's cache folder, so that the next process starts in seconds.

    The least recently used ones are deleted when there is more than a gigabyte. JAX finds a program by its text, its
    options, the device and the versions. A folder that is already set, as by `JAX_COMPILATION_CACHE_DIR`, is left as it
    is, and `JAX_ENABLE_COMPILATION_CACHE=false` uses none.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    with suppress(OSError, RuntimeError):  # a home that does not exist or cannot be written
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "capsnet-jax"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", SECONDS_WORTH_CACHING)


def compile_lean(function: Any, *arguments: Any) -> Any:
    """Compile a jitted function for these arguments or shapes, and return freed memory to the system.

    The compiler leaves hundreds of megabytes with the allocator of the C library, which large arrays cannot use; the
    process that trains the full-size model needs a quarter less memory without them.
    """
    _return_freed_memory()
    compiled = function.lower(*arguments).compile()
    _return_freed_memory()
    return compiled


def _return_freed_memory() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # only in glibc
    if trim is not None:
        trim(0)
