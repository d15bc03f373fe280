"""An ONNX file, run by onnxruntime, is the JAX model on any number of images."""

import logging

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
NOT_IN_ONNX = {"variational"}  # of which ONNX has no digamma function
PRESETS = {"preset official": "dynamic", "preset efficient": "self_attention", "preset em": "em"}
WRITTEN = [*PRESETS, *(name for name in ROUTINGS if name not in {*NOT_IN_ONNX, *PRESETS.values()})]


def new_run(folder, **options) -> Run:
    return Run(folder, Config(ModelConfig(**options)).with_sizes(IMAGE_SHAPE, 10), tuple("abcdefghij"))


@pytest.mark.parametrize("case", WRITTEN)
def test_a_file_is_the_model_on_any_number_of_images(case, tmp_path):
    model = new_model(3, **CASES[case])
    write_onnx(new_run(tmp_path, **CASES[case]), model, tmp_path / "model.onnx")
    images = new_images(max(BATCH_SIZES))
    expected = responses(model, images)
    for number in BATCH_SIZES:
        outputs = run_onnx(tmp_path / "model.onnx", images[:number])
        assert list(outputs) == list(expected)
        for name, values in expected.items():
            assert_close(name, outputs[name], values[:number], tolerance=TOLERANCE)


def test_the_command_writes_one_file_that_names_no_folder(tmp_path, capsys):
    run, model = new_run(tmp_path / "run", **TINY), new_model(0, **TINY)
    run.write_config()
    save_weights(run.folder / WEIGHTS, model)
    Export(run.folder, "onnx").run()
    path = run.folder / "model.onnx"
    told = capsys.readouterr()
    assert told.out.startswith(f"{path}: {path.stat().st_size / 1e6:.1f} MB, differs from the model by ")
    assert told.err == ""
    assert {file.name for file in run.folder.iterdir()} == {"config.json", WEIGHTS, "model.onnx"}
    assert b"capsnet_torch" not in path.read_bytes()
    assert logging.root.manager.disable == logging.NOTSET
    (images,) = onnxruntime.InferenceSession(path).get_inputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(float)", ["b", *IMAGE_SHAPE])


@pytest.mark.parametrize("routing", sorted(NOT_IN_ONNX))
def test_a_routing_that_onnx_cannot_express_is_named(routing, tmp_path):
    options = TINY | {"routing": routing}
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


def test_a_file_of_other_weights_is_not_kept(tmp_path, monkeypatch):
    run, model = new_run(tmp_path / "run", **TINY), new_model(0, **TINY)
    run.write_config()
    save_weights(run.folder / WEIGHTS, model)

    def write_other(run, model, path):
        write_onnx(run, new_model(1, **TINY), path)

    monkeypatch.setattr("capsnet_jax.cli.export.write_onnx", write_other)
    with pytest.raises(UsageError, match=r"model.onnx was not kept, as it differs from the model by"):
        Export(run.folder, "onnx").run()
    assert {file.name for file in run.folder.iterdir()} == {"config.json", WEIGHTS}
