"""Weights in files of every kind: kept bit by bit, refused by name."""

import json
import stat
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from capsnet_jax import UsageError
from capsnet_jax.interchange.state_files import read_state, write_state
from tests.interchange.architectures import PLAIN, assert_same, new_run, random_state


@pytest.fixture(scope="module")
def state():
    return random_state(new_run(PLAIN))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("targets", [["model.safetensors"], ["folder"], ["one.safetensors", "two.safetensors"]])
def test_files_keep_every_bit(state, targets, dtype, tmp_path):
    state = {name: array.astype(dtype) + np.asarray(1e-12, dtype) for name, array in state.items()}
    paths = [tmp_path / target for target in targets]
    written = write_state(state, paths)
    assert_same(read_state(paths), state)
    assert sum(len(part) for part in written.values()) == len(state)
    for path, part in written.items():
        assert_same(safetensors.numpy.load_file(path), part)
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(_new_file(tmp_path / "other").stat().st_mode)
    assert not list(tmp_path.rglob("*.partial"))


def _new_file(path: Path) -> Path:
    path.write_text("")
    return path


def test_a_pair_has_the_names_of_the_reference_model(state, tmp_path):
    encoder, decoder = tmp_path / "encoder.safetensors", tmp_path / "decoder.safetensors"
    write_state(state, [encoder, decoder])
    assert set(safetensors.numpy.load_file(encoder)) == {
        "image2primary_capsules.0.weight",
        "image2primary_capsules.0.bias",
        "image2primary_capsules.2.weight",
        "image2primary_capsules.2.bias",
        "primary2digit_capsules.input_caps2U.weight",
    }
    assert set(safetensors.numpy.load_file(decoder)) == {"0.weight", "2.weight", "2.bias", "4.weight"}


def test_the_counter_of_batches_is_ignored(state, tmp_path):
    counted = state | {"encoder.image2primary_capsules.2.num_batches_tracked": np.array(7)}
    safetensors.numpy.save_file(counted, tmp_path / "a.safetensors")
    assert_same(read_state([tmp_path / "a.safetensors"]), state)


def test_a_type_that_numpy_lacks_is_named(tmp_path):
    header = json.dumps({"decoder.2.bias": {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"abc")
    with pytest.raises(UsageError, match=r"a.safetensors: The entry decoder.2.bias is F8_E4M3; expected float16"):
        read_state([tmp_path / "a.safetensors"])


def test_a_pair_of_files_with_different_dtypes_is_refused(state, tmp_path):
    paths = [tmp_path / "encoder.safetensors", tmp_path / "decoder.safetensors"]
    mixed = {name: array.astype(np.float64) if name.startswith("decoder") else array for name, array in state.items()}
    write_state(mixed, paths)
    with pytest.raises(
        UsageError, match=r"and .*decoder\.safetensors: The entry decoder.0.weight is float64, and 5 of"
    ):
        read_state(paths)


def test_a_failed_write_keeps_the_existing_file(state, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    write_state(state, [path])
    other = {name: 2 * array for name, array in state.items()}

    def fail(partial, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fail)
        with pytest.raises(UsageError, match=r"model.safetensors cannot be written: .*No space left on device"):
            write_state(other, [path])
    assert_same(read_state([path]), state)
    with pytest.raises(UsageError, match=r"model.safetensors/other.safetensors cannot be written: "):
        write_state(other, [path / "other.safetensors"])
    write_state(other, [path])
    assert_same(read_state([path]), other)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "Got 0 names of weights; expected one file or folder, or two files"),
        (["a.pt", "b.pt", "c.pt"], "Got 3 names of weights"),
        (["a.pt", "a.pt"], r"a\.pt is given twice"),
        (["a.pt", "folder"], r"folder is one of two names; expected files that end in .safetensors, .pt, .pth"),
        (["a.safetensors"], r"a.safetensors does not exist; expected a file or folder of weights"),
        (["empty"], r"empty has no model.safetensors; expected the folder of a run"),
        (["weights.bin"], r"weights.bin ends in '.bin'; expected .safetensors, .pt, .pth"),
    ],
)
def test_wrong_paths_are_refused(names, message, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.bin").write_bytes(b"weights")
    with pytest.raises(UsageError, match=message):
        read_state([tmp_path / name for name in names])
