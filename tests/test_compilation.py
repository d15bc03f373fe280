"""Options of the compiler, and its cache on disk."""

import jax
import jax.numpy as jnp
import numpy as np

from capsnet_jax import compilation
from capsnet_jax.compilation import compiler_options
from capsnet_jax.ops import convolution
from tests.processes import run_without

COMPILE = """
import jax
from capsnet_jax import compilation
compilation.SECONDS_WORTH_CACHING = 0.0
compilation.use_cache()
print(jax.jit(lambda x: 2 * x)(3.0))
"""


def test_xla_computes_convolutions_itself_on_cpu():
    operands = jnp.ones((3, 9, 8, 4)), jnp.ones((3, 2, 4, 5))
    by_default, ours = (
        jax.jit(convolution, static_argnums=2, compiler_options=options).lower(*operands, 1).compile()
        for options in (None, compiler_options())
    )
    assert " convolution(" in ours.as_text()
    np.testing.assert_allclose(ours(*operands), by_default(*operands), rtol=1e-6)


def test_there_are_no_options_for_other_platforms_or_versions_that_do_not_know_them(monkeypatch):
    assert compiler_options()
    monkeypatch.setattr(compilation, "ON_CPU", {"xla_cpu_experimental_ynn_fusion_type": "NO_SUCH_TYPE"})
    compilation._is_known.cache_clear()
    assert compiler_options() == {}
    monkeypatch.undo()
    compilation._is_known.cache_clear()
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    assert compiler_options() == {}


def test_programs_are_cached_in_the_users_folder_unless_another_is_set_or_none_is_wanted(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    other = tmp_path / "other"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(other))
    run_without([], COMPILE).check_returncode()
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
    run_without([], COMPILE).check_returncode()
    assert not [*(tmp_path / "home").rglob("*-cache")]
    monkeypatch.delenv("JAX_ENABLE_COMPILATION_CACHE")
    run_without([], COMPILE).check_returncode()
    programs = [*(tmp_path / "home" / "capsnet-jax").glob("*-cache")]
    assert programs
    run_without([], COMPILE).check_returncode()
    assert [*(tmp_path / "home" / "capsnet-jax").glob("*-cache")] == programs


def test_a_home_that_cannot_be_written_has_no_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    done = run_without([], COMPILE)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "6.0", "")
