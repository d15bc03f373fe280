"""The command `convert`: weights keep every bit, and every damaged file is refused."""

import dataclasses
import json
import os
import pickle
import shutil
import sys

import numpy as np
import pytest
import safetensors.numpy

from capsnet_jax.config import Config
from capsnet_jax.interchange.state_files import read_state
from capsnet_jax.presets import PRESETS
from tests.cli.conversions import SMALL_RUN, convert, error_of
from tests.interchange.architectures import ARCHITECTURES, CONVOLUTIONAL, assert_same, new_run, random_state
from tests.interchange.damages import DAMAGED_STATES, Bomb
from tests.tiny_run import metrics, printed


@pytest.fixture(scope="module")
def state():
    return random_state(SMALL_RUN)


@pytest.fixture
def run_dir(state, tmp_path):
    """A run of known images, without metrics."""
    run = SMALL_RUN._replace(folder=tmp_path / "run", class_names=tuple("abcdefghij"), data_checksum=7)
    run.write_config()
    safetensors.numpy.save_file(state, run.folder / "model.safetensors")
    return run.folder


KINDS = ARCHITECTURES | {"convolutional": CONVOLUTIONAL}


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        *(pytest.param(model, "float32", id=f"{kind}-float32") for kind, model in KINDS.items()),
        pytest.param(CONVOLUTIONAL, "float64", id="convolutional-float64"),
        *(
            pytest.param(model, "float64", id=f"{kind}-float64", marks=pytest.mark.exhaustive)
            for kind, model in ARCHITECTURES.items()
        ),
    ],
)
def test_there_and_back_changes_no_bit(model, dtype, tmp_path, capsys):
    run = new_run(model, tmp_path / "run")
    state = random_state(run, dtype)
    run.write_config()
    safetensors.numpy.save_file(state, run.folder / "model.safetensors")
    (tmp_path / "config.json").write_text((run.folder / "config.json").read_text())
    encoder, decoder, whole = (tmp_path / f"{name}.safetensors" for name in ("encoder", "decoder", "whole"))
    if model.decoder_hidden:
        assert convert(run.folder, "--to", encoder, decoder) == 0
        assert convert(encoder, decoder, "--to", whole) == 0
    else:
        assert convert(run.folder, "--to", whole) == 0
    assert convert(whole, "--to", tmp_path / "back") == 0
    assert_same(read_state([whole]), state)
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (run.folder / "model.safetensors").read_bytes()
    assert (tmp_path / "back" / "config.json").read_text() == (run.folder / "config.json").read_text()


def test_the_line_of_each_file_has_its_number_of_weights(run_dir, state, tmp_path, capsys):
    encoder = sum(array.size for name, array in state.items() if name.startswith("encoder"))
    decoder = sum(array.size for name, array in state.items() if name.startswith("decoder"))
    assert convert(run_dir, "--to", tmp_path / "e.safetensors", tmp_path / "d.safetensors") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/e.safetensors: 5 entries, {encoder:,} weights in float32",
        f"{tmp_path}/d.safetensors: 4 entries, {decoder:,} weights in float32",
    ]
    assert convert(run_dir, "--to", tmp_path / "copy") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/copy/model.safetensors: 9 entries, {encoder + decoder:,} weights in float32",
        f"{tmp_path}/copy/README.md: model card",
        f"{tmp_path}/copy/config.json: options",
    ]
    assert f"{encoder + decoder:,} weights in float32" in (tmp_path / "copy" / "README.md").read_text()


def test_without_a_config_sizes_are_those_of_the_weights_and_the_rest_is_a_presets(state, tmp_path, capsys):
    safetensors.numpy.save_file(state, tmp_path / "a.safetensors")
    for preset, scale in (("readable", 0.01), ("digits", 1.0)):
        assert convert(tmp_path / "a.safetensors", "--to", tmp_path / preset, "--preset", preset) == 0
        fields = json.loads((tmp_path / preset / "config.json").read_text())
        assert fields["model"]["primary_scale"] == scale
        assert fields["model"]["decoder_hidden"] == [12, 14]
        assert fields["model"]["primary_stride"] == 2
        assert (fields["model"]["image_shape"], fields["class_names"]) == ([9, 11, 1], list("0123456789"))
        assert fields["data_checksum"] == 0
        expected = json.loads(json.dumps(PRESETS[preset].to_json()))
        assert (fields["data"], fields["training"]) == (expected["data"], expected["training"])
    capsys.readouterr()
    assert convert(tmp_path / "a.safetensors", "--to", tmp_path / "default") == 0
    assert capsys.readouterr().err == (
        "Scale 0.01, 'none' as squash and routing dynamic are taken from preset readable, "
        "as the weights do not determine them.\n"
    )
    assert (tmp_path / "default" / "config.json").read_text() == (tmp_path / "readable" / "config.json").read_text()


def test_a_config_beside_a_file_is_used_unless_a_preset_is_given(run_dir, tmp_path, capsys):
    best = run_dir / "best.safetensors"
    best.write_bytes((run_dir / "model.safetensors").read_bytes())
    assert convert(best, "--to", tmp_path / "as_it_is") == 0
    assert convert(best, "--to", tmp_path / "by_preset", "--preset", "digits") == 0
    assert (tmp_path / "as_it_is" / "config.json").read_text() == (run_dir / "config.json").read_text()
    assert json.loads((tmp_path / "by_preset" / "config.json").read_text())["class_names"] == list("0123456789")


def test_a_model_without_decoder_needs_the_shape_of_its_images(tmp_path, capsys):
    model = dataclasses.replace(SMALL_RUN.config.model, decoder_hidden=None)
    state = random_state(SMALL_RUN._replace(config=Config(model)))
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file(state, path)
    assert convert(path, "--to", tmp_path / "folder") == 2
    assert "expected --image-shape HEIGHT WIDTH CHANNELS, or a config.json beside them." in error_of(capsys)
    assert convert(path, "--to", tmp_path / "folder", "--image-shape", 9, 11, 1) == 0
    capsys.readouterr()
    assert convert(tmp_path / "folder", "--to", tmp_path / "e.safetensors", tmp_path / "d.safetensors") == 2
    assert error_of(capsys) == f"The model has no decoder to write into {tmp_path}/d.safetensors; expected one file."
    assert not (tmp_path / "e.safetensors").exists()


@pytest.mark.parametrize("beside", ["config", "no config"])
@pytest.mark.parametrize(("damage", "message"), DAMAGED_STATES.values(), ids=DAMAGED_STATES)
def test_a_damaged_state_is_refused_by_name_and_nothing_is_written(
    damage, message, beside, run_dir, state, tmp_path, capsys
):
    path = run_dir / "model.safetensors"
    path.write_bytes(safetensors.numpy.save(damage(state)))
    if beside == "no config":
        (run_dir / "config.json").unlink()
    for target in ("target", "target.safetensors"):
        assert convert(path, "--to", tmp_path / target) == 2
        error = error_of(capsys)
        assert error.startswith(f"{path}")
        assert message in error
        assert not (tmp_path / target).exists()


def test_a_damaged_file_is_refused_and_a_pickle_not_executed(run_dir, tmp_path, capsys):
    path, trace = run_dir / "model.safetensors", tmp_path / "trace"
    whole = path.read_bytes()
    bomb = pickle.dumps(Bomb(str(trace)))
    for content in (b"", whole[:100], whole[:-1], whole + b"\0", bomb):
        path.write_bytes(content)
        assert convert(path, "--to", tmp_path / "target") == 2
        assert error_of(capsys).startswith(f"{path} is not a safetensors file that can be read: ")
        assert not (tmp_path / "target").exists()
    assert not trace.exists()
    pickle.loads(bomb)
    assert trace.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--to", "run"], "has a config.json already; expected a folder without"),
        (["run", "--to", "card"], "has a README.md already; expected a folder without"),
        (["run", "--to", "file.txt"], "is a file; expected the name of a folder, or one that ends in"),
        (["run", "--to"], "Got 0 names of weights"),
        (["--to", "copy"], "Got 0 names of weights"),
        (["run", "--to", "copy", "--image-shape", "8", "8", "1"], "--image-shape is (8, 8, 1), and in run/config.json"),
        (["run", "--to", "mine.pt"], "mine.pt exists already; expected the name of a new file"),
        (["run", "--to", "new.safetensors", "file.txt/d.safetensors"], "d.safetensors cannot be written"),
        (["run", "--to", "copy", "--preset", "huge"], "Unknown preset 'huge'; expected readable, digits"),
        (["run", "--to", "copy", "--preset", "digits", "--image-shape", "9", "12", "1"], "--image-shape is (9, 12, 1)"),
        (["nothing", "--to", "copy"], "nothing does not exist; expected a file or folder of weights"),
        (["card", "--to", "copy"], "card has no model.safetensors"),
        (["run/model.safetensors", "run/model.safetensors", "--to", "copy"], "is given twice"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_refused_in_a_sentence(arguments, message, run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "README.md").write_text("mine")
    (tmp_path / "file.txt").write_text("mine")
    (tmp_path / "mine.pt").write_text("mine")
    assert convert(*arguments) == 2
    assert message in error_of(capsys)
    assert sorted(os.listdir(tmp_path)) == ["card", "file.txt", "mine.pt", "run"]
    assert sorted(os.listdir(run_dir)) == ["config.json", "model.safetensors"]


def test_without_torch_a_file_of_torch_says_what_to_install(run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "capsnet_torch.state_files", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "model.pt").write_bytes(b"")
    for source, target in ((tmp_path / "model.pt", tmp_path / "folder"), (run_dir, tmp_path / "new.pt")):
        assert convert(source, "--to", target) == 2
        assert "need PyTorch, which is not installed: pip install 'capsnet-jax[torch]'." in error_of(capsys)
    assert (tmp_path / "model.pt").read_bytes() == b""


def test_a_converted_run_is_evaluated_as_the_run_itself(tiny_run, tmp_path, capsys):
    assert convert(tiny_run.folder, "--to", tmp_path / "copy") == 0
    assert printed("evaluate", str(tmp_path / "copy"))[-1] == tiny_run.lines[-1]
    card = (tmp_path / "copy" / "README.md").read_text()
    measured = metrics(tiny_run.folder)[-1]["test_accuracy"]
    assert tiny_run.lines[-1].startswith(f"test accuracy {measured:.4f} on ")
    assert f'"value": {round(measured, 4)}' in card
    # The metrics of the last epoch do not belong to other weights.
    run = shutil.copytree(tiny_run.folder, tmp_path / "run")
    (run / "model.safetensors").rename(run / "best.safetensors")
    assert convert(run / "best.safetensors", "--to", tmp_path / "best") == 0
    assert "Nothing was measured" in (tmp_path / "best" / "README.md").read_text()


def test_dtype_rounds_every_weight(state, run_dir, tmp_path, capsys):
    half = tmp_path / "half.safetensors"
    assert convert(run_dir, "--to", half, "--dtype", "float16") == 0
    assert "weights in float16" in capsys.readouterr().out
    rounded = read_state([half])
    assert rounded.keys() == state.keys()
    for name, array in state.items():
        assert rounded[name].dtype == np.float16
        np.testing.assert_array_equal(rounded[name], array.astype(np.float16))


def test_a_weight_too_large_for_dtype_is_refused(state, run_dir, tmp_path, capsys):
    name = min(state)
    large = state | {name: np.full_like(state[name], 1e5)}
    safetensors.numpy.save_file(large, run_dir / "model.safetensors")
    assert convert(run_dir, "--to", tmp_path / "half", "--dtype", "float16") == 2
    message = error_of(capsys)
    assert f"The entry {name} has values that are too large for float16; expected another --dtype" in message
    assert not (tmp_path / "half").exists()
