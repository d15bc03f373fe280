"""Weights in files of every kind, and what tells a model by its weights alone."""

import dataclasses
import json
import re
import stat
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from einops import rearrange
from flax import nnx

from capsnet_jax import UsageError
from capsnet_jax.architecture import run_of_state
from capsnet_jax.config import Config, ModelConfig
from capsnet_jax.presets import PRESETS
from capsnet_jax.runs import Run
from capsnet_jax.state_files import read_state, write_state
from capsnet_jax.weights import weight_table

# All weights that a dense architecture can have: several convolutions, normalisation, routing weights, hidden layers.
MANY = ModelConfig(
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
    stem_channels=12, stem_kernel=3, primary_groups=3, primary_dim=4, primary_kernel=3, primary_stride=3,
    primary_depthwise=True, class_dim=5, decoder_hidden=(6, 7),
)  # fmt: skip
PLAIN = dataclasses.replace(DEPTHWISE, primary_depthwise=False, primary_stride=2)
# Weights do not tell the sizes of this one; files keep it all the same.
CONVOLUTIONAL = ModelConfig(
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
    return Run(folder, Config(model), (19, 22, 2), tuple("01234"))


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


@pytest.mark.parametrize("model", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_weights_tell_all_sizes_of_their_model(model):
    run = new_run(model)
    state = random_state(run)
    told = {name: getattr(model, name) for name in FROM_CONFIG}
    known = Config(dataclasses.replace(PRESETS["digits"].model, **told), PRESETS["digits"].data)
    found = run_of_state(state, known, Path("run"))
    assert found == run._replace(config=dataclasses.replace(known, model=model))


@pytest.mark.parametrize("preset", ["readable", "digits", "official", "paper", "efficient"])
def test_a_preset_is_found_again_from_its_weights(preset):
    config = PRESETS[preset]
    run = Run(Path("run"), config, (28, 28, 1), tuple("0123456789"))
    assert run_of_state(random_state(run), config, Path("run")) == run


def test_without_a_decoder_the_shape_of_images_must_be_given():
    run = new_run(dataclasses.replace(PLAIN, decoder_hidden=None))
    state = random_state(run)
    with pytest.raises(UsageError, match=r"have no decoder.* expected --image-shape HEIGHT WIDTH CHANNELS, or a"):
        run_of_state(state, run.config, run.folder)
    assert run_of_state(state, run.config, run.folder, image_shape=(19, 22, 2)) == run
    with pytest.raises(UsageError, match=r"image2primary_capsules.0.weight is of 2 channels; .* \(19, 22, 1\)"):
        run_of_state(state, run.config, run.folder, image_shape=(19, 22, 1))


def test_a_stride_is_not_guessed():
    """19 x 22 images: a stem of 3 leaves 17 x 20; under a kernel of 9, strides 6 to 8 all make 2 x 2."""
    run = new_run(dataclasses.replace(PLAIN, primary_kernel=9, primary_stride=6))
    state = random_state(run)
    assert run_of_state(state, run.config, run.folder) == run
    with pytest.raises(UsageError, match="do not tell the stride of the primary capsules: 6, 7, 8 make 12 of images"):
        run_of_state(state, Config(), run.folder)


def test_where_two_activations_explain_the_weights_the_config_decides():
    """Of 6 channels, 3 groups of 2 at 1 x 2 positions, or 2 groups of 2 + 1 at 1 x 3."""
    norm = dataclasses.replace(PLAIN, primary_groups=3, primary_dim=2, primary_stride=4)
    sigmoid = dataclasses.replace(norm, primary_groups=2, primary_activation="sigmoid", primary_stride=2)
    runs = [new_run(model)._replace(image_shape=(5, 9, 2)) for model in (norm, sigmoid)]
    state, other = map(random_state, runs)
    assert_same(state, other)
    for run in runs:
        assert run_of_state(state, run.config, run.folder) == run


def change(state, **changes):
    """The state with other shapes."""
    names = {"classes": "encoder.primary2digit_capsules.input_caps2U.weight", "pixels": "decoder.4.weight"}
    names |= {"stem": "encoder.image2primary_capsules.0.weight"}
    return state | {names[name]: np.zeros(shape, np.float32) for name, shape in changes.items()}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: change(state, classes=(191, 4, 5, 5)), "are of 191 primary capsules, which no stride makes"),
        (lambda state: change(state, classes=(192, 4, 5)), r"input_caps2U.weight is \(192, 4, 5\); expected 4 axes"),
        (lambda state: change(state, pixels=(7, 1, 19, 22)), r"0.weight is of 2 channels; .* shape \(19, 22, 1\)"),
        (lambda state: change(state, stem=(12, 2, 3, 4)), r"capsules.0.weight has a kernel of 3 x 4; expected"),
        (lambda state: {name: state[name] for name in state if "caps2U" not in name}, r"lack encoder.*caps2U.weight"),
        (lambda state: {name: state[name] for name in state if name != "decoder.4.weight"}, r"lack decoder.4.weight\."),
        (lambda state: {name: state[name] for name in state if "capsules.2" not in name}, r"lack .*capsules.2.weight"),
        (lambda state: {f"module.{name}": state[name] for name in state}, r"but module.encoder.*; expected the names"),
        (
            lambda state: state | {"encoder.hidden_capsules.0.weight": np.zeros((9, 3, 4, 2, 4), np.float32)},
            r"encoder.hidden_capsules.0.weight is of convolutional capsules, .* expected a config.json beside them",
        ),
    ],
)  # fmt: skip
def test_weights_that_tell_no_model_are_refused_by_name(state, damage, message):
    with pytest.raises(UsageError, match=message):
        run_of_state(damage(state), new_run(PLAIN).config, Path("run"))


def test_images_too_small_for_the_given_kernels_are_refused(state):
    small = change(state, pixels=(7, 2, 4, 22))
    with pytest.raises(UsageError, match=re.escape("Images of 4 x 22 are too small")):
        run_of_state(small, new_run(PLAIN).config, Path("run"))


def test_a_run_found_from_weights_can_be_written_and_read(state, tmp_path):
    run = run_of_state(state, new_run(PLAIN).config, tmp_path / "run")
    run.write_config()
    fields = json.loads((run.folder / "config.json").read_text())
    assert fields["image_shape"] == [19, 22, 2]
    assert fields["class_names"] == list("01234")
    assert fields["data_checksum"] == 0
