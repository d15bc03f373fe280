"""Weights in files of every kind, and what tells a model by its weights alone."""

import dataclasses
import json
import stat
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from einops import rearrange
from flax import nnx

from capsnet_jax import UsageError
from capsnet_jax.config import Config, ModelConfig
from capsnet_jax.interchange.state_files import read_state, write_state
from capsnet_jax.interchange.weights import weight_table
from capsnet_jax.runs.folder import Run

# All weights that a dense architecture can have: several convolutions, normalisation, routing weights, hidden layers.
MANY = ModelConfig(
    image_shape=(19, 22, 2),
    num_classes=5,
    stem_below=((3, 4), (5, 2)),
    stem_channels=4,
    stem_kernel=3,
    stem_stride=2,
    batch_norm=True,
    primary_groups=2,
    primary_dim=6,
    primary_kernel=2,
    primary_stride=2,
    primary_scale=1.5,
    primary_activation="sigmoid",
    hidden_capsules=((8, 9), (7, 5)),
    class_dim=3,
    decoder_hidden=(12, 14),
    decoder_bias=True,
    routing="dynamic,capsule_bias=0.1",
)
DEPTHWISE = ModelConfig(
    image_shape=(19, 22, 2), num_classes=5,
    stem_channels=12, stem_kernel=3, primary_groups=3, primary_dim=4, primary_kernel=3, primary_stride=3,
    primary_depthwise=True, class_dim=5, decoder_hidden=(6, 7),
)  # fmt: skip
PLAIN = dataclasses.replace(DEPTHWISE, primary_depthwise=False, primary_stride=2)
# Weights do not tell the sizes of this one; files keep it all the same.
CONVOLUTIONAL = ModelConfig(
    image_shape=(19, 22, 2),
    num_classes=5,
    stem_channels=4,
    stem_kernel=5,
    stem_stride=2,
    primary_groups=3,
    primary_dim=4,
    primary_kernel=1,
    primary_stride=1,
    primary_activation="sigmoid",
    conv_capsules=((2, 4, 3, 2),),
    matrix_poses=True,
    class_dim=4,
    shared_class_transform=True,
    decoder_hidden=None,
    routing="em",
)
ARCHITECTURES = {"plain": PLAIN, "depthwise": DEPTHWISE, "everything": MANY}
FROM_CONFIG = ("stem_stride", "primary_scale", "primary_squash", "routing", "num_iterations", "initial_weights")


def new_run(model: ModelConfig, folder: Path = Path("run")) -> Run:
    return Run(folder, Config(model), tuple("01234"))


def random_state(run: Run, dtype: str = "float32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    model = nnx.eval_shape(run.new_model)
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    state = {}
    for row in weight_table(model):
        array = rng.uniform(0.1, 1, flat[row.path].shape).astype(dtype)
        state[row.name] = np.array(rearrange(array, f"{row.jax_axes} -> {row.torch_axes}"), order="C")
    return state


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for name, array in expected.items():
        assert state[name].dtype == array.dtype
        np.testing.assert_array_equal(state[name], array)


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


def test_the_number_of_batches_is_left_out(state, tmp_path):
    counted = state | {"encoder.image2primary_capsules.2.num_batches_tracked": np.array(7)}
    safetensors.numpy.save_file(counted, tmp_path / "a.safetensors")
    assert_same(read_state([tmp_path / "a.safetensors"]), state)


def test_a_type_that_numpy_lacks_is_named(tmp_path):
    header = json.dumps({"decoder.2.bias": {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"abc")
    with pytest.raises(UsageError, match=r"a.safetensors: The entry decoder.2.bias is F8_E4M3; expected float16"):
        read_state([tmp_path / "a.safetensors"])


def test_parts_of_a_pair_in_different_types_are_refused(state, tmp_path):
    paths = [tmp_path / "encoder.safetensors", tmp_path / "decoder.safetensors"]
    mixed = {name: array.astype(np.float64) if name.startswith("decoder") else array for name, array in state.items()}
    write_state(mixed, paths)
    with pytest.raises(
        UsageError, match=r"and .*decoder\.safetensors: The entry decoder.0.weight is float64, and 5 of"
    ):
        read_state(paths)


def test_a_file_that_cannot_be_written_leaves_the_one_before(state, tmp_path, monkeypatch):
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
def test_names_that_are_not_of_weights_are_refused(names, message, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.bin").write_bytes(b"weights")
    with pytest.raises(UsageError, match=message):
        read_state([tmp_path / name for name in names])
