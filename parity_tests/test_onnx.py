"""An ONNX file, run by onnxruntime, returns what the JAX model returns, for any number of images."""

import logging
import shutil

import pytest

from capsnet_jax import UsageError
from capsnet_jax.cli.export import Export, run_onnx, write_onnx
from capsnet_jax.config import Config, ModelConfig
from capsnet_jax.interchange.weights import save_weights
from capsnet_jax.runs.folder import WEIGHTS, Run
from capsnet_torch.routing import ROUTINGS
from parity_tests.compare import assert_close
from tests.cli.exports import BATCH_SIZES, CASES, TINY, new_images, new_model, responses
from tests.conftest import IMAGE_SHAPE

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

TOLERANCE = 1e-5  # of the largest value; measured: 2e-6
NOT_IN_ONNX = {"variational"}  # ONNX has no digamma function
PRESETS = {"preset official": "dynamic", "preset efficient": "self_attention", "preset em": "em"}
EXPORTED = [*PRESETS, *(name for name in ROUTINGS if name not in {*NOT_IN_ONNX, *PRESETS.values()})]
DECODED = TINY | {"decoder_hidden": (5, 6), "routing": "self_routing"}


def new_run(folder, **options) -> Run:
    return Run(folder, Config(ModelConfig(**options)).with_sizes(IMAGE_SHAPE, 10), tuple("abcdefghij"))


def save_run(folder, model, **options) -> Run:
    run = new_run(folder, **options)
    run.write_config()
    save_weights(run.folder / WEIGHTS, model)
    return run


def assert_same_function(path, model):
    images = new_images(max(BATCH_SIZES))
    expected = responses(model, images)
    for number in BATCH_SIZES:
        outputs = run_onnx(path, images[:number])
        assert list(outputs) == list(expected)
        for name, values in expected.items():
            assert_close(name, outputs[name], values[:number], tolerance=TOLERANCE)


@pytest.fixture(scope="module")
def model():
    return new_model(3, **DECODED)


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    """The folder of a run after `capsnet export --format onnx`, and what the command printed."""
    run = save_run(tmp_path_factory.mktemp("onnx") / "run", model, **DECODED)
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lines.append)
        Export(run.folder, "onnx").run()
    return run.folder, lines


def test_the_command_writes_the_same_function_for_any_number_of_images(exported, model):
    folder, _ = exported
    assert_same_function(folder / "model.onnx", model)


def test_the_command_writes_one_file_without_local_paths(exported):
    folder, lines = exported
    path = folder / "model.onnx"
    (line,) = lines
    assert line.startswith(f"{path}: {path.stat().st_size / 1e6:.1f} MB, differs from the model by ")
    assert {file.name for file in folder.iterdir()} == {"config.json", WEIGHTS, "model.onnx"}
    assert b"capsnet_torch" not in path.read_bytes()
    assert logging.root.manager.disable == logging.NOTSET
    (images,) = onnxruntime.InferenceSession(path).get_inputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(float)", ["b", *IMAGE_SHAPE])


def test_a_file_with_other_weights_is_not_kept(exported, tmp_path, monkeypatch):
    run = save_run(tmp_path / "run", new_model(0, **DECODED), **DECODED)
    other = exported[0] / "model.onnx"
    monkeypatch.setattr("capsnet_jax.cli.export.write_onnx", lambda run, model, path: shutil.copy(other, path))
    with pytest.raises(UsageError, match=r"model.onnx was not kept, as it differs from the model by"):
        Export(run.folder, "onnx").run()
    assert {file.name for file in run.folder.iterdir()} == {"config.json", WEIGHTS}


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", EXPORTED)
def test_every_routing_is_exported(case, tmp_path):
    model = new_model(3, **CASES[case])
    write_onnx(new_run(tmp_path, **CASES[case]), model, tmp_path / "model.onnx")
    assert_same_function(tmp_path / "model.onnx", model)


@pytest.mark.parametrize("routing", sorted(NOT_IN_ONNX))
def test_a_routing_that_onnx_cannot_express_is_named(routing, tmp_path):
    options = TINY | {"routing": routing, "num_iterations": 1, "class_dim": 2}
    with pytest.raises(
        UsageError, match=rf"routing {routing} cannot be written as ONNX: No ONNX function .*digamma.*>\.$"
    ):
        write_onnx(new_run(tmp_path, **options), new_model(0, **options), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
    assert logging.root.manager.disable == logging.NOTSET


def test_a_routing_without_a_twin_is_named(tmp_path):
    options = TINY | {"routing": "capsnet_jax.routing.kmeans:kmeans,num_iterations=2"}
    with pytest.raises(
        UsageError, match=r"Routing capsnet_jax.routing.kmeans:kmeans has no twin in PyTorch.*dynamic, em"
    ):
        write_onnx(new_run(tmp_path, **options), new_model(0, **options), tmp_path / "model.onnx")
