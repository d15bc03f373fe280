"""What users import: the public names, the example in the package's docstring, and models from disk."""

import doctest
import inspect
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from jax.export import deserialize

import capsnet_jax
from capsnet_jax import CapsNet, UsageError
from capsnet_jax.cli.main import main
from capsnet_jax.interchange.weights import save_weights
from tests.conftest import IMAGE_SHAPE, SMALL

WRITTEN = Path(__file__).parent / "written_by_0_1_0"


def test_every_public_name_is_there_and_documented():
    assert 18 <= len(capsnet_jax.__all__) <= 25
    for name in capsnet_jax.__all__:
        value = getattr(capsnet_jax, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), name
    assert capsnet_jax.__version__[0].isdecimal()


def test_the_example_in_the_docstring_runs():
    results = doctest.testmod(capsnet_jax)
    assert results.attempted >= 6
    assert results.failed == 0


def images() -> np.ndarray:
    return np.random.default_rng(0).random((3, 8, 8, 1), np.float32)


def expected_activations() -> np.ndarray:
    """Those that version 0.1.0 computed from the same images."""
    return np.loadtxt(WRITTEN / "activations.txt")


@pytest.mark.parametrize("folder", ["run", "exported"])
def test_what_0_1_0_wrote_is_loaded(folder):
    model = capsnet_jax.load(WRITTEN / folder)
    np.testing.assert_allclose(model(images()).activations, expected_activations(), rtol=1e-5)
    assert model.config.image_shape == (8, 8, 1)


def test_weights_and_programs_that_0_1_0_wrote_are_read(tmp_path):
    target = tmp_path / "converted"
    shutil.copy(WRITTEN / "run" / "config.json", tmp_path)
    shutil.copy(WRITTEN / "weights.safetensors", tmp_path)
    assert main(["convert", str(tmp_path / "weights.safetensors"), "--to", str(target)]) == 0
    activations = capsnet_jax.load(target)(images()).activations
    np.testing.assert_allclose(activations, expected_activations(), rtol=1e-5)
    program = deserialize(bytearray((WRITTEN / "model.stablehlo").read_bytes()))
    np.testing.assert_allclose(program.call(images())["activations"], expected_activations(), rtol=1e-5)


def test_load_says_what_it_looked_for(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere does not exist; .* config.json and model.safetensors in it"):
        capsnet_jax.load(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file is a file; expected the folder of a run or of a converted model"):
        capsnet_jax.load(str(tmp_path / "file"))
    with pytest.raises(UsageError, match=r"is not the folder of a run: it has no config\.json"):
        capsnet_jax.load(tmp_path)
    shutil.copy(WRITTEN / "run" / "config.json", tmp_path)
    with pytest.raises(UsageError, match=r"has no model\.safetensors: none were saved yet"):
        capsnet_jax.load(tmp_path)
    with pytest.raises(UsageError, match=r"expected .* config.json and best.safetensors in it"):
        capsnet_jax.load(tmp_path / "nowhere", best=True)
    save_weights(tmp_path / "model.safetensors", CapsNet(IMAGE_SHAPE, 10, **SMALL, rngs=nnx.Rngs(0)))
    with pytest.raises(UsageError, match=r"model\.safetensors: The weight"):
        capsnet_jax.load(tmp_path)
