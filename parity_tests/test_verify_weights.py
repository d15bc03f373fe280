"""`capsnet verify` with weights from files: damaged ones are refused, or reported by name."""

import json
import pickle

import numpy as np
import pytest
import torch

from capsnet_jax.config import Config, ModelConfig, TrainingConfig
from capsnet_jax.interchange.weights import to_torch
from capsnet_jax.runs.folder import Run
from tests.interchange.damages import DAMAGED_STATES, NAME, Bomb

# Both hidden layers of the decoder are as wide, and the last two capsule layers have one shape: shapes cannot tell them
# apart.
SQUARE = ModelConfig(
    stem_channels=5,
    stem_kernel=3,
    primary_groups=2,
    primary_dim=4,
    primary_kernel=4,
    primary_stride=3,
    primary_scale=1.0,
    hidden_capsules=((6, 4), (6, 4)),
    class_dim=4,
    routing="uniform",
    decoder_hidden=(11, 11),
)
SAME_SHAPE = "encoder.hidden_capsules.1.input_caps2U.weight", "encoder.primary2digit_capsules.input_caps2U.weight"
SWAPPED = dict(zip(SAME_SHAPE, reversed(SAME_SHAPE), strict=True))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with layers of equal shape, and its weights."""
    folder = tmp_path_factory.mktemp("run")
    run = Run(folder, Config(SQUARE, training=TrainingConfig(epochs=1)).with_sizes((12, 13, 1), 6), tuple("abcdef"))
    model = run.new_model()
    run.write_config()
    run.save_weights(model)
    return folder, to_torch(model)


QUICKLY = ["--batch-size", 3, "--steps", 0, "--dtype", "float32"]
DAMAGED_FILES = {name: case for name, case in DAMAGED_STATES.items() if name not in ("transposed", "bfloat16")}


@pytest.mark.parametrize(("damage", "message"), DAMAGED_FILES.values(), ids=DAMAGED_FILES)
def test_damaged_weights_are_refused_by_name(damage, message, run, tmp_path, verify_command):
    folder, state = run
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in damage(state).items()}
    torch.save(tensors, tmp_path / "damaged.pt")
    status, _, told = verify_command(folder, "--torch-weights", tmp_path / "damaged.pt")
    assert status == 2
    assert told.count("\n") == 1
    assert message.replace("8 of 9", f"{len(state) - 1} of {len(state)}") in told


def test_a_truncated_file_and_a_pickle_are_refused(run, tmp_path, verify_command):
    folder, state = run
    whole = tmp_path / "whole.pt"
    torch.save({name: torch.from_numpy(array) for name, array in state.items()}, whole)
    cut, bomb, trace = tmp_path / "cut.pt", tmp_path / "bomb.pt", tmp_path / "trace"
    cut.write_bytes(whole.read_bytes()[:-1000])
    bomb.write_bytes(pickle.dumps({NAME: Bomb(str(trace))}))
    for path in (cut, bomb):
        status, _, told = verify_command(folder, "--torch-weights", path)
        assert (status, told.count("\n")) == (2, 1)
        assert path.name in told
    assert not trace.exists()
    pickle.loads(bomb.read_bytes())
    assert trace.exists()


@pytest.mark.parametrize(
    ("damage", "first", "cause"),
    {
        "transposed square": (
            lambda state: state | {NAME: state[NAME].T.copy()},
            f"weight {NAME}",
            "transposed: JAX has the axes of PyTorch in the order 1, 0",
        ),
        "swapped layers": (
            lambda state: {SWAPPED.get(name, name): array for name, array in state.items()},
            f"weight {SAME_SHAPE[1]}",  # in the order of the file
            f"entries mixed up: {SAME_SHAPE[1]} of PyTorch is {SAME_SHAPE[0]} of JAX",
        ),
        "one bit": (
            lambda state: state | {NAME: np.nextafter(state[NAME], np.float32(9))},
            f"weight {NAME}",
            "Most likely: weights of another training step or precision, or an entry that was changed",
        ),
    }.values(),
    ids=["transposed square", "swapped layers", "one bit"],
)
def test_damage_that_shapes_do_not_show_is_reported_by_name(damage, first, cause, run, tmp_path, verify_command):
    folder, state = run
    torch.save({name: torch.from_numpy(array) for name, array in damage(state).items()}, tmp_path / "damaged.pt")
    arguments = [folder, "--torch-weights", tmp_path / "damaged.pt", *QUICKLY]
    status, printed, _ = verify_command(*arguments, "--json", tmp_path / "verified.json")
    assert status == 1
    assert f"differ, first in {first} (" in printed.splitlines()[-1]
    assert cause in printed.splitlines()[-1]
    (results,) = json.loads((tmp_path / "verified.json").read_text())["verifications"]
    weights = [check for check in results["checks"] if check["name"].startswith("weight ")]
    assert len(weights) == len(state)
    differing = [check["name"] for check in weights if check["verdict"] == "DIFFERS"]
    assert len(differing) == (2 if "mixed up" in cause else 1)


def test_the_same_weights_from_another_file_agree(run, tmp_path, verify_command):
    folder, state = run
    torch.save({name: torch.from_numpy(array) for name, array in state.items()}, tmp_path / "same.pt")
    status, printed, _ = verify_command(folder, "--torch-weights", tmp_path / "same.pt", *QUICKLY)
    assert status == 0, printed
    assert f"| weight {NAME} " in printed


def test_values_too_small_to_be_compared_are_no_agreement(run, tmp_path, verify_command):
    """With a first layer of zeros, the gradients of the decoder are zero, whatever computes them."""
    folder, state = run
    torch.save(
        {name: torch.from_numpy(array * (name != "decoder.0.weight")) for name, array in state.items()},
        tmp_path / "cold.pt",
    )
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    status, printed, _ = verify_command(tmp_path / "cold.pt", *QUICKLY)
    assert status == 2
    last = printed.splitlines()[-1]
    assert "agree in what could be compared, but these checks prove nothing: decoder 0, " in last
    assert "gradient decoder.2.weight" in last
    assert last.endswith(" (too small).")
    assert "stem" not in last
