"""The command `export`: a file computes the same as the model and runs with JAX alone, or it is not kept."""

import re
import sys

import jax
import numpy as np
import pytest
import tyro
from flax import nnx
from jax.export import deserialize

import capsnet_jax.cli.export
from capsnet_jax import UsageError
from capsnet_jax.capsules import Routed
from capsnet_jax.cli.export import Export, largest_error
from capsnet_jax.config import Config, ModelConfig
from capsnet_jax.interchange.stablehlo import PLATFORMS, to_stablehlo
from capsnet_jax.interchange.weights import save_weights
from capsnet_jax.runs.folder import BEST, WEIGHTS, Run
from tests.cli.exports import BATCH_SIZES, CASES, new_images, new_model, responses
from tests.conftest import IMAGE_SHAPE, SMALL
from tests.processes import run_without

TOLERANCE = 2e-6  # of the largest value; measured: 1.3e-6


def assert_close(actual, expected):
    assert set(actual) == set(expected)
    for name, values in expected.items():
        assert actual[name].shape == values.shape
        assert actual[name].dtype == values.dtype
        assert np.abs(values).max() > 1e-3
        np.testing.assert_allclose(actual[name], values, rtol=0, atol=TOLERANCE * np.abs(values).max())


@pytest.fixture
def run_dir(tmp_path):
    run = Run(tmp_path / "run", Config(ModelConfig(IMAGE_SHAPE, 10, **SMALL)), tuple("abcdefghij"))
    run.write_config()
    for name, seed in ((WEIGHTS, 0), (BEST, 1)):
        save_weights(run.folder / name, new_model(seed, **SMALL))
    return run.folder


# Other presets and routings compute other values, but are exported in the same way.
ORDINARY = ("preset readable", "preset efficient", "preset em", "fused", "self_routing")


@pytest.mark.parametrize(
    "case", [case if case in ORDINARY else pytest.param(case, marks=pytest.mark.exhaustive) for case in CASES]
)
def test_a_program_is_the_model_on_any_number_of_images(case):
    model = new_model(3, **CASES[case])
    images = new_images(max(BATCH_SIZES))
    expected = responses(model, images)
    assert len(expected) == 2 + (model.decoder is not None)
    program = deserialize(bytearray(to_stablehlo(model)))
    assert program.platforms == PLATFORMS
    for number in BATCH_SIZES:
        first = {name: values[:number] for name, values in expected.items()}
        assert_close(program.call(images[:number]), first)


def test_the_model_itself_is_left_as_it_was():
    model = new_model(0, **CASES["preset efficient"])
    model.train()
    before = nnx.state(model)
    frames = jax.config.jax_traceback_in_locations_limit
    to_stablehlo(model)
    assert not model.stem.norms[0].use_running_average
    assert model.capsule_layers[0].implementation == "auto"
    assert jax.tree.all(jax.tree.map(np.array_equal, nnx.state(model), before))
    assert jax.config.jax_traceback_in_locations_limit == frames


def test_products_are_exact_on_every_platform_and_no_folder_is_named():
    program = to_stablehlo(new_model(0, **SMALL))
    text = deserialize(bytearray(program)).mlir_module()
    products = re.findall(r"= stablehlo\.(?:dot_general|convolution).*", text)
    assert len(products) > 5
    assert all("HIGHEST" in line for line in products)
    for folder in (sys.prefix, capsnet_jax.cli.export.__file__.rpartition("/")[0], "capsnet_jax"):
        assert folder.encode() not in program


def test_a_file_runs_where_there_is_only_jax(run_dir, tmp_path):
    Export(run_dir).run()
    np.save(tmp_path / "images.npy", new_images(3))
    program = f"""
import jax.export, numpy, pathlib
program = jax.export.deserialize(pathlib.Path({str(run_dir / "model.stablehlo")!r}).read_bytes())
numpy.savez({str(tmp_path / "out.npz")!r}, **program.call(numpy.load({str(tmp_path / "images.npy")!r})))"""
    result = run_without(["capsnet_jax", "flax", "torch", "capsnet_torch", "einops"], program)
    assert result.returncode == 0, result.stderr
    with np.load(tmp_path / "out.npz") as outputs:
        assert_close(outputs, responses(new_model(0, **SMALL), new_images(3)))


def test_the_command_prints_file_size_and_error(run_dir, tmp_path, capsys):
    tyro.cli(Export, args=[str(run_dir)]).run()
    path = run_dir / "model.stablehlo"
    line = capsys.readouterr().out
    assert line.startswith(f"{path}: {path.stat().st_size / 1e6:.1f} MB, differs from the model by ")
    assert float(line.partition(" by ")[2].split()[0]) < TOLERANCE
    assert line.count("\n") == 1

    best = tmp_path / "best.stablehlo"
    tyro.cli(Export, args=[str(run_dir), "--best", "--output", str(best)]).run()
    assert capsys.readouterr().out.startswith(f"{best}: ")
    for file, seed in ((path, 0), (best, 1)):
        outputs = deserialize(bytearray(file.read_bytes())).call(new_images(3))
        assert_close(outputs, responses(new_model(seed, **SMALL), new_images(3)))
    assert not list(tmp_path.rglob("*.partial"))


def test_a_file_that_differs_is_not_kept(run_dir, monkeypatch):
    """The file of a model in which the weights of one pixel are slightly wrong."""
    wrong = new_model(0, **SMALL)
    wrong.decoder.to_pixels[...] = wrong.decoder.to_pixels[...].at[:, 2, 3, 0].add(0.01)
    monkeypatch.setattr(capsnet_jax.cli.export, "to_stablehlo", lambda model: to_stablehlo(wrong))
    path = run_dir / "model.stablehlo"
    message = r"model.stablehlo was not kept, as it differs from the model by \d.* expected 1e-05 at most\.$"
    with pytest.raises(UsageError, match=message):
        Export(run_dir).run()
    assert not path.exists()
    path.write_text("of before")
    with pytest.raises(UsageError, match=message):
        Export(run_dir).run()
    assert path.read_text() == "of before"
    assert not list(run_dir.glob("*.partial"))


def test_the_largest_error_is_that_of_the_worst_output():
    expected = {"poses": np.array([[4.0, -8.0]]), "activations": np.array([0.5, 0.25])}
    assert largest_error(expected, expected) == 0
    assert largest_error(expected | {"poses": np.array([[4.0, -7.0]])}, expected) == 1 / 8
    worst = expected | {"poses": np.array([[4.0, -7.0]]), "activations": np.array([0.5, 0.375])}
    assert largest_error(worst, expected) == 1 / 4
    zero = {"poses": np.zeros((1, 2))}
    assert largest_error(zero, zero) == 0


@pytest.mark.parametrize(
    "poses", [np.array([[4.0, np.nan]]), np.array([[4.0, -np.inf]]), np.array([4.0, -8.0]), np.float32([[4, -8]]), None]
)
def test_the_error_is_infinite_if_outputs_cannot_be_compared(poses):
    expected = {"poses": np.array([[4.0, -8.0]])}
    actual = {} if poses is None else {"poses": poses}
    assert largest_error(actual, expected) == np.inf
    assert largest_error(expected, actual) == np.inf
    assert largest_error(expected, {"poses": np.zeros((1, 2))}) == np.inf


def test_a_wrong_folder_output_or_missing_package_is_an_error(run_dir, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="is not the folder of a run"):
        Export(tmp_path).run()
    with pytest.raises(UsageError, match=r"The output .*run is a folder; expected the name of a file\."):
        Export(run_dir, output=run_dir).run()
    with pytest.raises(UsageError, match=r"The output is .*model.safetensors; expected a name that ends in \.onnx\."):
        Export(run_dir, format="onnx", output=run_dir / "model.safetensors").run()
    with pytest.raises(UsageError, match=r"The output .*model is in a folder that does not exist; expected"):
        Export(run_dir, output=tmp_path / "nowhere" / "model").run()
    for package in ("torch", "onnxscript"):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UsageError, match=rf"^--format onnx needs (torch|{package}), which is not installed: pip"):
            Export(run_dir, "onnx").run()
    assert {path.name for path in run_dir.iterdir()} == {"config.json", WEIGHTS, BEST}


def routing_that_calls_python(votes, activations):
    called = jax.pure_callback(
        np.asarray, jax.ShapeDtypeStruct(votes.shape, votes.dtype), votes, vmap_method="expand_dims"
    )
    return Routed(called.sum(axis=0), jax.nn.sigmoid(called.sum(axis=(0, 2))), called[..., 0])


def test_a_routing_that_calls_python_is_named():
    model = new_model(0, **SMALL | {"routing": routing_that_calls_python})
    with pytest.raises(UsageError, match="of routing routing_that_calls_python cannot be written as StableHLO"):
        to_stablehlo(model)
