"""Settings that all tests share: faster compilation, and a cache of compiled programs."""

import gc
import os
from collections.abc import Iterator

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

# Compilation takes a fifth of the time without optimization of the machine code, in one piece, and without the newer
# generator of loops. What JAX traces and lowers is the same. XLA aborts on a flag that it does not know.
FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
FLAGS += ["--xla_cpu_use_fusion_emitters=false"] if jax.__version_info__ < (0, 11) else []
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
# JAX creates many small objects while it traces, which frequent garbage collections would look through in vain.
gc.set_threshold(100_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def _compilation_cache(pytestconfig: pytest.Config) -> Iterator[None]:
    """Keep compiled programs for all test processes, and for the next run; `pytest --cache-clear` deletes them.

    The tests spend most of their time compiling the same small programs. JAX identifies a program by its code, its
    options and the version of the compiler, so a change of any of these compiles it again.
    """
    folder = pytestconfig.rootpath / ".pytest_cache" / "d" / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)  # of processes that tests start
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()
    yield
    compilation_cache.reset_cache()
