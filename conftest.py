"""What all tests share."""

import os
from collections.abc import Iterator

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

# Machine code that is not optimized compiles in half the time; the program it is made of is the same.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


@pytest.fixture(scope="session", autouse=True)
def _compilation_cache(pytestconfig: pytest.Config) -> Iterator[None]:
    """Keep compiled programs for all test processes, and for the next run; `pytest --cache-clear` deletes them.

    Most of the time of the tests is compilation, of the same small programs over and over. JAX finds a program by its
    code, its options and the version of the compiler, so a change of any of them compiles it again.
    """
    folder = pytestconfig.rootpath / ".pytest_cache" / "d" / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()
    yield
    compilation_cache.reset_cache()
