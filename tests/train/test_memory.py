"""Freed memory is returned to the system, and peak memory is that of this process alone."""

import ctypes
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from capsnet_benchmark import worker
from capsnet_jax.compilation import compile_lean
from capsnet_jax.train.memory import peak_memory_of_process

BLOCK, NUMBER = 2**16, 2_000  # small enough to be kept by the allocator, 131 MB of them


def resident() -> int:
    """Resident memory of this process in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="Not the GNU C library.")
def test_compiling_returns_freed_memory_to_the_system():
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    blocks = [libc.malloc(ctypes.c_size_t(BLOCK)) for _ in range(NUMBER)]
    last = libc.malloc(ctypes.c_size_t(BLOCK))  # above all others, so that they are not returned when freed
    for block in blocks:
        ctypes.memset(block, 1, BLOCK)
    before = resident()
    for block in blocks:
        libc.free(block)
    assert before - resident() < BLOCK * NUMBER / 2
    program = compile_lean(jax.jit(lambda x: 2 * x + 1), jnp.arange(3.0))
    assert before - resident() > BLOCK * NUMBER / 2
    assert program(jnp.arange(3.0)).tolist() == [1, 3, 5]
    libc.free(last)


@pytest.mark.skipif(
    sys.platform != "linux", reason="Only on Linux does a child process inherit the peak of its parent."
)
def test_peak_memory_does_not_include_the_parent_process():
    parent = """
import subprocess, sys
large = b"1" * 600_000_000
small = "from capsnet_jax.train.memory import peak_memory; print(peak_memory())"
subprocess.run([sys.executable, "-c", small], check=True)
"""
    told = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    assert 50e6 < int(told.stdout) < 500e6


def test_the_copy_in_the_benchmark_agrees():
    """The benchmark has a copy, because its process must not import JAX."""
    first, second, third = peak_memory_of_process(), worker.peak_memory_of_process(), peak_memory_of_process()
    assert first <= second <= third < 1.01 * first
