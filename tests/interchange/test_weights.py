"""State_dicts: wrong ones change nothing, those of other models give what fits; files keep every bit."""

import pickle

import numpy as np
import pytest
from flax import nnx

from capsnet_jax import PRESETS, CapsNet, UsageError
from capsnet_jax.interchange.weights import from_torch, load_weights, save_weights, take_weights, to_torch, weight_table
from tests.conftest import IMAGE_SHAPE, SMALL

NAME = "decoder.2.weight"


def changed(state, change):
    state = {name: array.copy() for name, array in state.items()}
    change(state)
    return state


DAMAGES = {
    "missing": (lambda state: state.pop(NAME), rf"lack {NAME}"),
    "unknown": (lambda state: state.update(extra=np.ones(3)), "unknown entries extra"),
    "renamed": (lambda state: state.update({"decoder.3.weight": state.pop(NAME)}), rf"lack {NAME}.*decoder\.3\.weight"),
    "transposed": (lambda state: state.update({NAME: state[NAME].T}), rf"{NAME} is \(12, 14\).*\(14, 12\)"),
    "integers": (lambda state: state.update({NAME: state[NAME].astype(int)}), rf"{NAME} is int64"),
    "nan": (lambda state: state[NAME].__setitem__((3, 2), np.nan), rf"{NAME} has values that are not finite"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_state_is_refused_by_entry_and_changes_nothing(damage, message, small_model):
    before = to_torch(small_model)
    doubled = {name: 2 * array for name, array in before.items()}
    with pytest.raises(UsageError, match=message):
        from_torch(small_model, changed(doubled, damage))
    for name, array in to_torch(small_model).items():
        np.testing.assert_array_equal(array, before[name])


def test_a_file_keeps_every_bit(small_model, tmp_path):
    before = to_torch(small_model)
    save_weights(tmp_path / "weights.safetensors", small_model)
    from_torch(small_model, {name: 0 * array for name, array in before.items()})
    load_weights(tmp_path / "weights.safetensors", small_model)
    for name, array in to_torch(small_model).items():
        np.testing.assert_array_equal(array, before[name])
        assert array.any()


def test_arrays_are_writable_copies(small_model):
    state = to_torch(small_model)
    state[NAME][:] = 7
    assert not np.any(to_torch(small_model)[NAME] == 7)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_file_that_is_not_safetensors_is_refused_and_never_unpickled(small_model, tmp_path):
    path, trace = tmp_path / "weights.safetensors", tmp_path / "trace"
    save_weights(path, small_model)
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[:-1], pickle.dumps(Bomb(str(trace)))):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"weights\.safetensors is not a safetensors file"):
            load_weights(path, small_model)
    assert not trace.exists()


def test_a_wrong_file_is_refused_by_file_and_entry(small_model, tmp_path):
    from safetensors.numpy import save_file

    save_file(changed(to_torch(small_model), lambda state: state.pop(NAME)), tmp_path / "short.safetensors")
    with pytest.raises(UsageError, match=rf"short\.safetensors: .*{NAME}"):
        load_weights(tmp_path / "short.safetensors", small_model)


def model_of(**changes) -> CapsNet:
    options = SMALL | {"routing": "uniform", "rngs": nnx.Rngs(9), "image_shape": IMAGE_SHAPE, "num_classes": 10}
    return CapsNet(**options | changes)


STEM = ("encoder.image2primary_capsules.0.weight", "encoder.image2primary_capsules.0.bias")
PRIMARY = ("encoder.image2primary_capsules.2.weight", "encoder.image2primary_capsules.2.bias")
CLASSES = ("encoder.primary2digit_capsules.input_caps2U.weight",)
FIRST, HIDDEN, PIXELS = ("decoder.0.weight",), ("decoder.2.weight", "decoder.2.bias"), ("decoder.4.weight",)
ROUTING = tuple(f"encoder.primary2digit_capsules.routing_weights.beta_{letter}" for letter in "au")

# Options of a new model: which weights start anew, and which of the other one are not used.
OTHERS = {
    "same": ({}, (), ()),
    "classes": ({"num_classes": 3}, CLASSES + FIRST, CLASSES + FIRST),
    "image size": ({"image_shape": (12, 13, 1)}, CLASSES + PIXELS, CLASSES + PIXELS),
    "channels": ({"image_shape": (9, 11, 2)}, STEM + PIXELS, STEM + PIXELS),
    "routing": ({"routing": "em"}, ROUTING, ()),
    "no decoder": ({"decoder_hidden": None}, (), FIRST + HIDDEN + PIXELS),
    "decoder bias": ({"decoder_bias": True}, ("decoder.0.bias", "decoder.4.bias"), ()),
    # A bias of the same shape is not taken for a kernel of another size.
    "kernel": ({"primary_kernel": 5}, PRIMARY + CLASSES, PRIMARY + CLASSES),
    "deeper": (
        {"stem_below": ((8, 1),)},
        (*STEM, *PRIMARY, "encoder.image2primary_capsules.4.weight", "encoder.image2primary_capsules.4.bias"),
        STEM + PRIMARY,
    ),
}


@pytest.mark.parametrize(("options", "anew", "unused"), OTHERS.values(), ids=OTHERS)
def test_weights_that_fit_are_taken_and_the_others_are_named(options, anew, unused, small_model):
    source, model = to_torch(small_model), model_of(**options)
    before = to_torch(model)
    transfer = take_weights(model, source)
    assert (set(transfer.anew), set(transfer.unused)) == (set(anew), set(unused))
    after = to_torch(model)
    assert set(transfer.taken) == after.keys() - set(anew)
    for name, array in after.items():
        np.testing.assert_array_equal(array, before[name] if name in anew else source[name], err_msg=name)


def test_taken_weights_are_finite_and_some_fit_or_nothing_changes(small_model):
    other = model_of(stem_kernel=5, primary_dim=6, class_dim=7, decoder_hidden=None)
    before = to_torch(small_model)
    with pytest.raises(UsageError, match=r"^None of the 5 weights fits this model in name and shape; expected .*\.$"):
        take_weights(small_model, to_torch(other))
    for value, message in ((np.inf, "has values that are not finite"), (1e39, "are too large for float32")):
        wrong = {name: array.astype(np.float64) + 1 for name, array in before.items()}
        wrong[NAME][2, 3] = value
        for function in (take_weights, from_torch):
            with pytest.raises(UsageError, match=rf"{NAME} .*{message}"):
                function(small_model, wrong)
    for name, array in to_torch(small_model).items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("name", PRESETS)
def test_a_state_sets_all_that_a_model_learned(name):
    """So a model that is loaded needs no initial weights."""
    model = nnx.eval_shape(lambda: CapsNet.from_preset(name, rngs=nnx.Rngs(0)))
    assert {row.path for row in weight_table(model)} == set(dict(nnx.to_flat_state(nnx.state(model))))
