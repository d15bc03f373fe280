"""State_dicts of a model: a wrong one is refused by the name of its entry and changes nothing; files keep every bit."""

import pickle

import numpy as np
import pytest

from capsnet_jax import UsageError
from capsnet_jax.interchange.weights import from_torch, load_weights, save_weights, to_torch

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
