"""The command `export`: a file computes the same as the model and runs with JAX alone, or it is not kept."""

import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
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
from tests.tiny_run import printed

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
    return write_run(tmp_path / "run")


def write_run(folder: Path) -> Path:
    """Write a run without metrics, whose best weights are not the last ones."""
    run = Run(folder, Config(ModelConfig(IMAGE_SHAPE, 10, **SMALL)), tuple("abcdefghij"))
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


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run, the file of its best weights in another folder, and the lines that the command printed."""
    here = tmp_path_factory.mktemp("exported")
    run, best = write_run(here / "run"), here / "best.stablehlo"
    lines = [printed("export", str(run)), printed("export", str(run), "--best", "--output", str(best))]
    return run, best, lines


@pytest.fixture(scope="module")
def of_the_model():
    """A function of the seed of a small model, that returns what a file of it should return for three images."""
    compiled = jax.jit(lambda state, images: nnx.merge(graphdef, state).encode(images))
    decode = jax.jit(lambda state, *capsules: nnx.merge(graphdef, state).decode(*capsules))
    graphdef, _ = nnx.split(new_model(0, **SMALL))

    def outputs(seed: int) -> dict[str, np.ndarray]:
        state = nnx.state(new_model(seed, **SMALL))
        poses, activations = jax.device_get(compiled(state, new_images(3)))
        reconstructions = jax.device_get(decode(state, poses, activations.argmax(axis=1)))
        return {"poses": poses, "activations": activations, "reconstructions": reconstructions}

    return outputs


def test_a_file_runs_where_there_is_only_jax(exported, of_the_model, tmp_path):
    np.save(tmp_path / "images.npy", new_images(3))
    program = f"""
import jax.export, numpy, pathlib
program = jax.export.deserialize(pathlib.Path({str(exported[0] / "model.stablehlo")!r}).read_bytes())
numpy.savez({str(tmp_path / "out.npz")!r}, **program.call(numpy.load({str(tmp_path / "images.npy")!r})))"""
    result = run_without(["capsnet_jax", "flax", "torch", "capsnet_torch", "einops"], program)
    assert result.returncode == 0, result.stderr
    with np.load(tmp_path / "out.npz") as outputs:
        assert_close(outputs, of_the_model(0))


def test_the_command_prints_file_size_and_error(exported, of_the_model):
    """Of the last or of the best weights. The file of the last weights is compared with the model above."""
    run, best, ((line,), (line_of_best,)) = exported
    path = run / "model.stablehlo"
    assert line.startswith(f"{path}: {path.stat().st_size / 1e6:.1f} MB, differs from the model by ")
    assert float(line.partition(" by ")[2].split()[0]) < TOLERANCE
    assert line_of_best.startswith(f"{best}: ")
    assert_close(deserialize(bytearray(best.read_bytes())).call(new_images(3)), of_the_model(1))
    assert not list(best.parent.rglob("*.partial"))


def test_a_file_that_differs_is_not_kept(run_dir, monkeypatch):
    """The file of a model in which the weights of one pixel are slightly wrong."""
    wrong = new_model(0, **SMALL)
    wrong.decoder.to_pixels[...] = wrong.decoder.to_pixels[...].at[:, 2, 3, 0].add(0.01)
    program = to_stablehlo(wrong)
    monkeypatch.setattr(capsnet_jax.cli.export, "to_stablehlo", lambda model: program)
    path = run_dir / "model.stablehlo"
    message = r"model.stablehlo was not kept, as it differs from the model by \d.* expected 1e-05 at most\.$"
    with pytest.raises(UsageError, match=message):
        Export(run_dir).run()
    assert not path.exists()
    path.write_text("of before")
    with pytest.raises(UsageError, match=r"model.stablehlo exists already; expected a new name, or --overwrite\.$"):
        Export(run_dir).run()
    with pytest.raises(UsageError, match=message):
        Export(run_dir, overwrite=True).run()
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
