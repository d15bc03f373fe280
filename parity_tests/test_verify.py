"""The command `capsnet verify`, as its users run it: what it prints, writes, catches and refuses."""

import json
import pickle

import numpy as np
import pytest
import torch

from capsnet_jax.cli import main
from capsnet_jax.config import Config, ModelConfig, TrainingConfig
from capsnet_jax.runs import Run
from capsnet_jax.weights import to_torch
from capsnet_verify import command, self_test
from capsnet_verify.mutants.models import MUTANTS
from capsnet_verify.self_test import Trial
from tests.damages import DAMAGED_STATES, NAME, Bomb

QUICKLY = ["--steps", "0"]
# A hidden layer as wide as the other, and two layers of capsules of equal shape: what shapes alone cannot tell.
SQUARE = ModelConfig(
    stem_channels=5,
    stem_kernel=3,
    primary_groups=2,
    primary_dim=4,
    primary_kernel=4,
    primary_stride=3,
    primary_scale=1.0,
    hidden_capsules=((6, 4), (6, 4), (6, 4)),
    class_dim=7,
    decoder_hidden=(11, 11),
)
USERS = '''
"""Routings of a user's own, in both frameworks."""

import jax
import jax.numpy as jnp
import torch
from jaxtyping import Array, Float

from capsnet_jax.capsules import Routed


def ours(votes, activations, *, offset: Float[Array, "o h"] | float = 0.3):
    poses = (activations[:, None, None] * votes).sum(0) + offset
    couplings = jax.nn.softmax((votes * poses).sum(-1), axis=1)
    return Routed(poses, jax.nn.sigmoid(poses.sum(-1)), couplings)


def theirs(votes, activations, *, offset: Float[torch.Tensor, "o h"] | float = 0.3):
    poses = torch.einsum("bi,bioh->boh", activations, votes) + offset
    couplings = torch.einsum("bioh,boh->bio", votes, poses).softmax(-1)
    return poses, poses.sum(-1).sigmoid(), couplings


def theirs_over_inputs(votes, activations, *, offset: Float[torch.Tensor, "o h"] | float = 0.3):
    poses, active, couplings = theirs(votes, activations, offset=offset)
    return poses, active, torch.einsum("bioh,boh->bio", votes, poses).softmax(1)


def theirs_without_weight(votes, activations):
    return theirs(votes, activations)


def broken(votes, activations):
    raise RuntimeError("It is broken.")


def without_couplings(votes, activations):
    return votes.sum(1), activations[:, :1].expand(-1, votes.shape[2]), None


def without_gradient(votes, activations):
    poses = votes.sum(1)
    couplings = torch.einsum("bioh,boh->bio", votes, poses).softmax(-1)
    active = (couplings**2).sum(1).sigmoid()
    couplings *= 2
    return poses, active, couplings
'''


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A module of the user's."""
    (tmp_path / "users_own_routing.py").write_text(USERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return "users_own_routing"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with layers of equal shape, and its weights."""
    folder = tmp_path_factory.mktemp("run")
    run = Run(folder, Config(SQUARE, training=TrainingConfig(epochs=1)), (12, 13, 1), tuple("abcde"))
    model = run.new_model()
    run.write_config()
    run.save_weights(model)
    return folder, to_torch(model)


def verify(capsys, *arguments: object) -> tuple[int, str, str]:
    status = main(["verify", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_every_check_is_a_row_of_the_table_and_of_the_file(tmp_path, capsys):
    path = tmp_path / "verified.json"
    status, printed, _ = verify(capsys, "--steps", 2, "--json", path)
    assert status == 0
    written = json.loads(path.read_text())
    assert {"versions", "device", "commit"} <= written.keys()
    (results,) = written["verifications"]
    assert (results["status"], results["first_divergence"], results["without_power"]) == (0, None, {})
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("| ")][2:]
    assert [row[0].strip() for row in rows] == [check["name"] for check in results["checks"]]
    for row, check in zip(rows, results["checks"], strict=True):
        assert row[2].strip() == f"{check['error']:.1e}"
        assert check["error"] <= check["tolerance"] == (1e-9 if check["name"].startswith("step") else 1e-12)
        assert check["scale"] > 1e-4
        assert check["verdict"] == row[4].strip() == "agrees"
    assert rows[0][0].split() == ["stem", "0"]
    assert rows[-1][0].split() == ["step", "2"]
    assert printed.splitlines()[-1].startswith(
        "JAX and PyTorch agree in all 26 checks of routing dynamic: values within"
    )
    factor = results["capsule_layers"][0]["factor"]
    assert factor != 1
    assert f"The weight of capsule layer 0 was multiplied by {factor:g} on both sides" in printed


def test_both_precisions_are_rows_of_a_summary(capsys):
    status, printed, told = verify(capsys, "--routing", "uniform", "--dtype", "float32", "bfloat16", *QUICKLY)
    assert status == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if "uniform" in line]
    assert [(row[1], row[-1]) for row in rows] == [("float32", "agrees"), ("bfloat16", "agrees")]
    assert 1e-8 < float(rows[0][2]) < 2e-5
    assert 1e-4 < float(rows[1][2]) < 5e-2
    assert printed.splitlines()[-1] == "2 of 2 agree."
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in told.splitlines()]
    assert lines == rows  # one by one, as they are done


def test_routings_of_the_users_own_agree(user, capsys):
    both = ["--jax-routing", f"{user}:ours", "--torch-routing", f"{user}:theirs"]
    status, printed, _ = verify(capsys, *both, "--steps", 1)
    assert status == 0, printed
    assert "gradient encoder.primary2digit_capsules.routing_weights.offset" in printed


def test_a_wrong_one_is_named_with_its_cause(user, capsys):
    both = ["--jax-routing", f"{user}:ours", "--torch-routing", f"{user}:theirs_over_inputs"]
    status, printed, _ = verify(capsys, *both, *QUICKLY)
    assert status == 1
    last = printed.splitlines()[-1]
    assert last.startswith("JAX and PyTorch differ, first in couplings 0 (scale-relative error")
    assert "softmax axis: couplings of PyTorch sum to one over input capsules" in last


def test_a_preset_is_made_hot_first(capsys):
    status, printed, _ = verify(capsys, "--preset", "digits", *QUICKLY)
    assert status == 0, printed
    assert "of preset digits: values within" in printed


DAMAGED_FILES = {name: case for name, case in DAMAGED_STATES.items() if name not in ("transposed", "bfloat16")}


@pytest.mark.parametrize(("damage", "message"), DAMAGED_FILES.values(), ids=DAMAGED_FILES)
def test_damaged_weights_are_refused_by_name(damage, message, run, tmp_path, capsys):
    folder, state = run
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in damage(state).items()}
    torch.save(tensors, tmp_path / "damaged.pt")
    status, _, told = verify(capsys, folder, "--torch-weights", tmp_path / "damaged.pt")
    assert status == 2
    assert told.count("\n") == 1
    assert message.replace("8 of 9", f"{len(state) - 1} of {len(state)}") in told


def test_a_truncated_file_and_a_pickle_are_refused(run, tmp_path, capsys):
    folder, state = run
    whole = tmp_path / "whole.pt"
    torch.save({name: torch.from_numpy(array) for name, array in state.items()}, whole)
    cut, bomb, trace = tmp_path / "cut.pt", tmp_path / "bomb.pt", tmp_path / "trace"
    cut.write_bytes(whole.read_bytes()[:-1000])
    bomb.write_bytes(pickle.dumps({NAME: Bomb(str(trace))}))
    for path in (cut, bomb):
        status, _, told = verify(capsys, folder, "--torch-weights", path)
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
            lambda state: {_swapped(name): array for name, array in state.items()},
            "weight encoder.hidden_capsules.2.input_caps2U.weight",  # in the order of the file
            "entries mixed up: encoder.hidden_capsules.2.input_caps2U.weight of PyTorch is "
            "encoder.hidden_capsules.1.input_caps2U.weight of JAX",
        ),
        "one bit": (
            lambda state: state | {NAME: np.nextafter(state[NAME], np.float32(9))},
            f"weight {NAME}",
            "Most likely: weights of another training step or precision, or an entry that was changed",
        ),
    }.values(),
    ids=["transposed square", "swapped layers", "one bit"],
)
def test_what_shapes_do_not_tell_is_reported_by_name(damage, first, cause, run, tmp_path, capsys):
    folder, state = run
    torch.save({name: torch.from_numpy(array) for name, array in damage(state).items()}, tmp_path / "damaged.pt")
    arguments = [folder, "--torch-weights", tmp_path / "damaged.pt", *QUICKLY, "--dtype", "float32"]
    status, printed, _ = verify(capsys, *arguments, "--json", tmp_path / "verified.json")
    assert status == 1
    assert f"differ, first in {first} (" in printed.splitlines()[-1]
    assert cause in printed.splitlines()[-1]
    (results,) = json.loads((tmp_path / "verified.json").read_text())["verifications"]
    weights = [check for check in results["checks"] if check["name"].startswith("weight ")]
    assert len(weights) == len(state)
    differing = [check["name"] for check in weights if check["verdict"] == "DIFFERS"]
    assert len(differing) == (2 if "mixed up" in cause else 1)


def _swapped(name: str) -> str:
    for this, other in ((1, 2), (2, 1)):
        if name == f"encoder.hidden_capsules.{this}.input_caps2U.weight":
            return name.replace(str(this), str(other), 1)
    return name


def test_the_same_weights_from_another_file_agree(run, tmp_path, capsys):
    folder, state = run
    torch.save({name: torch.from_numpy(array) for name, array in state.items()}, tmp_path / "same.pt")
    status, printed, _ = verify(capsys, folder, "--torch-weights", tmp_path / "same.pt", "--steps", 1)
    assert status == 0, printed
    assert f"| weight {NAME} " in printed


def test_what_is_too_cold_to_be_seen_is_no_agreement(run, tmp_path, capsys):
    """Without weights of its first layer the decoder has gradients of zero, which anything else might have, too."""
    folder, state = run
    torch.save(
        {name: torch.from_numpy(array * (name != "decoder.0.weight")) for name, array in state.items()},
        tmp_path / "cold.pt",
    )
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    status, printed, _ = verify(capsys, tmp_path / "cold.pt", *QUICKLY)
    assert status == 2
    last = printed.splitlines()[-1]
    assert "agree in what could be seen. These checks had no power. cold: decoder 0, " in last
    assert "gradient decoder.2.weight" in last
    assert "stem" not in last


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "-1"], "steps is -1, and must be at least 0"),
        (["--batch-size", "0"], "batch_size is 0, and must be at least 1"),
        (["--dtype"], "dtype is empty"),
        (["--json", "nowhere/x.json"], "the folder nowhere does not exist"),
        (["--preset", "nothing"], "Unknown preset 'nothing'; expected readable, digits"),
        (["--routing", "nothing"], "Unknown routing 'nothing'; expected dynamic, em"),
        (["--jax-routing", "em"], "Only one of --jax-routing and --torch-routing is given; expected both"),
        (["--jax-routing", "em", "--torch-routing", "nothing"], "Unknown routing 'nothing'; expected dynamic"),
        (["--jax-routing", "em", "--torch-routing", "no_such_module:f"], "no_such_module"),
        (["--routing", "em", "--jax-routing", "em", "--torch-routing", "em"], "--jax-routing is given, too"),
        (["--random-model", "1", "--all-routings"], "--all-routings and --random-model are given"),
        (["--torch-weights", "x.pt"], "expected its folder or file, too"),
        (["--random-model", "-1"], "random_model is -1, and must be at least 0"),
        (["--seed", "99999999999"], "seed is 99999999999, and must be less than 4294967296"),
        (["--random-model", "7", "--preset", "em"], "--random-model and --preset are given; expected one of them"),
        (["--self-test", "--dtype", "float32"], "--self-test takes no other options"),
        (["--image-shape", "8", "8", "1"], "--image-shape is that of weights; expected their file, too"),
        (["--routing", "capsnet_jax.routing:em"], "has no twin in PyTorch; expected --jax-routing and --torch-routing"),
        (["--jax-routing", "dynamic", "--torch-routing", "dynamic,foo=3"], "foo"),
        (["--jax-routing", "em", "--torch-routing", "em,min_variance=abc"], "min_variance"),
        (["no_such_folder"], "no_such_folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_option_is_one_sentence(options, message, capsys):
    status, printed, told = verify(capsys, *options)
    assert (status, printed) == (2, "")
    assert message in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("broken", "The routing of the PyTorch side raises RuntimeError: It is broken."),
        ("without_couplings", "NoneType; expected poses, activations and couplings, ((2, 5, 6), (2, 5), (2, 216, 5))"),
        ("without_gradient", "one of the variables needed for gradient computation has been modified by an inplace"),
        ("theirs_without_weight", "JAX encoder.primary2digit_capsules.routing_weights.offset beyond those of PyTorch"),
    ],
)
def test_a_routing_that_cannot_be_compared_is_one_sentence(function, message, user, capsys):
    status, _, told = verify(capsys, "--jax-routing", f"{user}:ours", "--torch-routing", f"{user}:{function}")
    assert status == 2
    assert message in told
    assert told.count("\n") == 1


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("jax.default_backend", lambda: "cpu")
    status, printed, told = verify(capsys, "--device", "gpu")
    assert (status, printed) == (2, "")
    assert "There is no GPU that both JAX and PyTorch can use; expected --device cpu" in told


def test_what_goes_wrong_inside_is_no_verdict(monkeypatch, capsys):
    monkeypatch.setattr("capsnet_verify.verification.heat", lambda pair: 1 / 0)
    status, printed, told = verify(capsys)
    assert (status, printed) == (2, "")
    assert "ZeroDivisionError" in told


def test_without_torch_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    status, _, told = verify(capsys)
    assert status == 2
    assert 'capsnet verify needs PyTorch, which is not installed: pip install ".[torch]".' in told


@pytest.mark.parametrize(("expected", "status"), [("couplings 0", 0), ("stem 0", 1)])
def test_the_self_test_fails_if_a_mutant_is_not_caught_by_its_check(expected, status, monkeypatch, capsys):
    trials = [
        Trial("right", None, lambda: None),
        Trial("wrong", expected, lambda: self_test.caught_model(MUTANTS[0])),
    ]
    monkeypatch.setattr(self_test, "trials", lambda: iter(trials))
    assert verify(capsys, "--self-test")[0] == status


def test_a_mutant_that_is_not_caught_at_all_fails_the_self_test(monkeypatch, capsys):
    monkeypatch.setattr(self_test, "trials", lambda: iter([Trial("unseen", "poses", lambda: None)]))
    status, printed, _ = verify(capsys, "--self-test")
    assert status == 1
    assert "FAILED not caught" in printed
    assert printed.splitlines()[-1] == "0 of 1 mutants were caught, 1 trials went wrong."


@pytest.mark.exhaustive
@pytest.mark.slow
def test_every_preset_and_routing_agrees(capsys):
    status, printed, _ = verify(capsys, "--all-presets", "--all-routings", "--dtype", "float64", "float32")
    assert status == 0, printed
    assert printed.splitlines()[-1] == "32 of 32 agree."


def test_every_mutant_is_a_trial():
    trials = list(self_test.trials())
    assert sum(trial.caught_by is not None for trial in trials) == 97  # as README.md and docs/parity.md tell
    assert sum(trial.caught_by is None for trial in trials) == 3
    assert len({trial.mistake for trial in trials}) == len(trials)
