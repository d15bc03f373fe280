"""How programs are compiled: options of XLA, and memory that the compiler leaves behind."""

import ctypes
import sys
from functools import cache
from typing import Any

import jax

# Which operations XLA for CPU hands to its library YNNPACK. By default it hands over convolutions, too, which its own
# code computes up to three times faster.
ON_CPU = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE"}


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
