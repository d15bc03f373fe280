"""The public names, the examples in their docstrings, and loading models that version 0.1.0 saved."""

import doctest
import inspect
import io
import re
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


PUBLIC = capsnet_jax.__all__
CONSTANTS = ("PRESETS", "PRETRAINED", "ROUTINGS")  # dictionaries, which the docstring of the package explains


def example_of(name: str) -> doctest.DocTest:
    """The example in the docstring of the package or of a public name."""
    text = inspect.getdoc(capsnet_jax if name == "capsnet_jax" else getattr(capsnet_jax, name))
    return doctest.DocTestParser().get_doctest(text or "", {}, name, None, None)


def test_the_public_names():
    assert 18 <= len(PUBLIC) <= 27
    assert set(CONSTANTS) < set(PUBLIC)
    assert capsnet_jax.__version__[0].isdecimal()


@pytest.mark.parametrize("name", CONSTANTS)
def test_the_example_of_the_package_uses_the_constants(name):
    assert any(name in part.source and part.want for part in example_of("capsnet_jax").examples)


@pytest.mark.parametrize("name", ["capsnet_jax", *(name for name in PUBLIC if name not in CONSTANTS)])
def test_a_public_name_has_an_example_that_runs(name):
    example = example_of(name)
    assert any(part.want for part in example.examples), f"the example of {name} shows no result"
    report = io.StringIO()
    results = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=report.write)
    assert results.failed == 0, report.getvalue()


@pytest.mark.parametrize("name", [name for name in PUBLIC if inspect.isfunction(getattr(capsnet_jax, name))])
def test_a_public_function_documents_its_arguments_and_result(name):
    function = getattr(capsnet_jax, name)
    doc, signature = inspect.getdoc(function), inspect.signature(function)
    if signature.return_annotation is not None:
        assert re.search(r"^(Returns|Yields):$", doc, flags=re.MULTILINE), "no section Returns"
    for argument in signature.parameters:
        assert re.search(rf"^    {argument}: ", doc, flags=re.MULTILINE), argument


def images() -> np.ndarray:
    return np.random.default_rng(0).random((3, 8, 8, 1), np.float32)


def expected_activations() -> np.ndarray:
    """Activations that version 0.1.0 computed from the same images."""
    return np.loadtxt(WRITTEN / "activations.txt")


activations_of = nnx.jit(lambda model, images: model(images).activations)


@pytest.mark.parametrize("folder", ["run", "exported"])
def test_models_saved_by_0_1_0_are_loaded(folder):
    model = capsnet_jax.load(WRITTEN / folder)
    np.testing.assert_allclose(activations_of(model, images()), expected_activations(), rtol=1e-5)
    assert model.config.image_shape == (8, 8, 1)


def test_weights_and_programs_saved_by_0_1_0_are_read(tmp_path):
    target = tmp_path / "converted"
    shutil.copy(WRITTEN / "run" / "config.json", tmp_path)
    shutil.copy(WRITTEN / "weights.safetensors", tmp_path)
    assert main(["convert", str(tmp_path / "weights.safetensors"), "--to", str(target)]) == 0
    activations = activations_of(capsnet_jax.load(target), images())
    np.testing.assert_allclose(activations, expected_activations(), rtol=1e-5)
    program = deserialize(bytearray((WRITTEN / "model.stablehlo").read_bytes()))
    np.testing.assert_allclose(program.call(images())["activations"], expected_activations(), rtol=1e-5)


def test_errors_of_load_name_what_is_expected(tmp_path):
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
