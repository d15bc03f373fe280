"""PyTorch files are converted without changing a bit, pickles are not executed, and damage is named."""

import itertools
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch

import capsnet_torch
from capsnet_jax import UsageError
from capsnet_jax.interchange.state_files import read_state, write_state
from tests.cli.conversions import SMALL_RUN, convert, error_of
from tests.interchange.architectures import ARCHITECTURES, CONVOLUTIONAL, assert_same, new_run, random_state
from tests.interchange.damages import DAMAGED_STATES, Bomb

STATE = random_state(SMALL_RUN)


def twin(run) -> capsnet_torch.CapsNet:
    """A new PyTorch model of the sizes of a run."""
    return capsnet_torch.CapsNet.from_config(vars(run.config.model))


def tensors(state):
    """Convert arrays to tensors, through float64, as torch does not take arrays of bfloat16."""
    return {
        name: torch.tensor(array.astype(np.float64)).to(getattr(torch, array.dtype.name))
        for name, array in state.items()
    }


def assert_same_tensors(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor)


def load(path):
    return torch.load(path, weights_only=True)


MODELS = ARCHITECTURES | {"convolutional": CONVOLUTIONAL}
EXHAUSTIVE = {("plain", "float64"), ("everything", "float32"), ("depthwise", "float64"), ("convolutional", "float32")}


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param(*case, marks=[pytest.mark.exhaustive] if case in EXHAUSTIVE else [])
        for case in itertools.product(MODELS, ("float32", "float64"))
    ],
)
def test_a_state_dict_is_the_same_after_conversion_there_and_back(name, precision, tmp_path, capsys):
    model, precision = MODELS[name], getattr(torch, precision)
    run = new_run(model, tmp_path / "run")
    run.write_config()
    (tmp_path / "config.json").write_text((run.folder / "config.json").read_text())
    torch.manual_seed(0)
    theirs = twin(run).to(precision)
    whole = theirs.state_dict()
    torch.save(whole, tmp_path / "whole.pt")
    for source, target in (
        ("whole.pt", "folder"),
        ("folder", "whole.safetensors"),
        ("whole.safetensors", "back.pt"),
    ):
        assert convert(tmp_path / source, "--to", tmp_path / target) == 0
    counts = {name for name in whole if name.endswith("num_batches_tracked")}
    assert len(counts) == (3 if model.batch_norm else 0)
    assert_same_tensors(load(tmp_path / "back.pt"), {name: whole[name] for name in whole if name not in counts})
    other = twin(run).to(precision)
    other.load_state_dict(load(tmp_path / "back.pt"), strict=True)
    assert_same_tensors(other.state_dict(), whole)


def test_the_two_state_dicts_of_the_reference_model_are_the_same_after_conversion_there_and_back(tmp_path, capsys):
    torch.manual_seed(0)
    theirs = twin(SMALL_RUN)
    for part in ("encoder", "decoder"):
        torch.save(getattr(theirs, part).state_dict(), tmp_path / f"{part}.pt")
    pair = [tmp_path / "encoder.pt", tmp_path / "decoder.pt"]
    back = [tmp_path / "back.encoder.pth", tmp_path / "back.decoder.safetensors"]
    assert convert(*pair, "--to", tmp_path / "folder") == 0
    assert convert(tmp_path / "folder", "--to", *back) == 0
    assert_same_tensors(load(back[0]), theirs.encoder.state_dict())
    assert_same_tensors(safetensors.torch.load_file(back[1]), theirs.decoder.state_dict())


def test_encoder_and_decoder_in_the_wrong_order_are_refused(tmp_path, capsys):
    write_state(STATE, [tmp_path / "encoder.pt", tmp_path / "decoder.pt"])
    assert convert(tmp_path / "decoder.pt", tmp_path / "encoder.pt", "--to", tmp_path / "folder") == 2
    assert "The weights lack encoder.image2primary_capsules.0.weight." in error_of(capsys)
    assert convert(tmp_path / "encoder.pt", "--to", tmp_path / "folder") == 2
    assert "no entry that begins with 'encoder.', but image2primary_capsules.0.weight" in error_of(capsys)


@pytest.mark.parametrize(("damage", "message"), DAMAGED_STATES.values(), ids=DAMAGED_STATES)
def test_a_damaged_state_dict_is_refused_by_name_and_nothing_is_written(damage, message, tmp_path, capsys):
    path = tmp_path / "model.pt"
    torch.save(tensors(damage(STATE)), path)
    assert convert(path, "--to", tmp_path / "target") == 2
    error = error_of(capsys)
    assert error.startswith(f"{path}")
    assert message in error
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("old_format", [False, True], ids=["zip", "before 1.6"])
def test_a_truncated_file_is_refused(old_format, tmp_path, capsys):
    path = tmp_path / "model.pt"
    torch.save(tensors(STATE), path, _use_new_zipfile_serialization=not old_format)
    assert_same(read_state([path]), STATE)
    whole = path.read_bytes()
    for content in (b"", whole[:30], whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        assert convert(path, "--to", tmp_path / "target") == 2
        assert error_of(capsys).startswith(f"{path}: It cannot be read by torch: ")
        assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_is_never_executed(protocol, tmp_path, capsys):
    path, trace = tmp_path / "model.pt", tmp_path / "trace"
    bomb = pickle.dumps({"decoder.2.bias": Bomb(str(trace))}, protocol=protocol)
    in_archive = tmp_path / "archive.pt"
    torch.save({"decoder.2.bias": Bomb(str(trace))}, in_archive, pickle_protocol=protocol)
    for content in (bomb, in_archive.read_bytes(), b"no weights at all"):
        path.write_bytes(content)
        assert convert(path, "--to", tmp_path / "target") == 2
        error = error_of(capsys)
        assert error == f"{path}: It is not a file of tensors only, and was not unpickled; expected a state_dict."
        assert not trace.exists()
    pickle.loads(bomb)
    assert trace.exists()
    trace.rmdir()
    torch.load(in_archive, weights_only=False)
    assert trace.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(3)], "It holds a list; expected a state_dict, a tensor for each name"),
        ({"model": {"decoder.2.bias": torch.ones(3)}, "epoch": 3}, "The entry model is a dict; expected a tensor"),
        ({3: torch.ones(2)}, "It has an entry named 3; expected a state_dict"),
        ({"decoder.2.bias": torch.ones(3).to_sparse()}, "The entry decoder.2.bias is sparse; expected float16"),
        ({"decoder.2.bias": torch.ones(3, dtype=torch.complex64)}, "The entry decoder.2.bias is complex64; expected"),
    ],
)
def test_a_file_that_is_not_a_state_dict_is_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(UsageError, match=rf"model\.pt: {message}"):
        read_state([tmp_path / "model.pt"])


def test_parameters_and_views_are_read(tmp_path):
    matrix = torch.arange(12, dtype=torch.float64).reshape(3, 4)
    torch.save({"a": torch.nn.Parameter(matrix), "b": matrix.T, "c": matrix[1:, 1]}, tmp_path / "model.pt")
    state = read_state([tmp_path / "model.pt"])
    expected = np.array([[4.0 * row + column for column in range(4)] for row in range(3)])
    assert_same(state, {"a": expected, "b": expected.T, "c": np.array([5.0, 9.0])})
    for target in ("back.pt", "back.safetensors"):
        write_state(state, [tmp_path / target])
        assert_same(read_state([tmp_path / target]), state)
