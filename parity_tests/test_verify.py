"""The command `capsnet verify`: what it prints, writes, catches and refuses."""

import doctest
import importlib.util
import json
from dataclasses import replace
from unittest import mock

import pytest
from flax import nnx

import capsnet_verify
from capsnet_jax import CapsNet
from capsnet_jax.presets import PRESETS
from capsnet_verify import Settings, Verification, describe, of_model, of_preset, of_routing, sentence, verify
from capsnet_verify.checks import AGREES, Check
from capsnet_verify.mutants import MUTANTS
from capsnet_verify.verification import plan_of

QUICKLY = ["--batch-size", "3", "--steps", "0"]
USERS = '''
"""Routings of a user's own, in both frameworks."""

import jax
import jax.numpy as jnp
import torch

import capsnet_jax.routing
import capsnet_torch.routing
from capsnet_jax.capsules import Routed


@capsnet_jax.routing.learns(offset="o h")
def ours(votes, activations, *, offset=0.3):
    poses = (activations[:, None, None] * votes).sum(0) + offset
    couplings = jax.nn.softmax((votes * poses).sum(-1), axis=1)
    return Routed(poses, jax.nn.sigmoid(poses.sum(-1)), couplings)


@capsnet_torch.routing.learns(offset="o h")
def theirs(votes, activations, *, offset=0.3):
    poses = torch.einsum("bi,bioh->boh", activations, votes) + offset
    couplings = torch.einsum("bioh,boh->bio", votes, poses).softmax(-1)
    return poses, poses.sum(-1).sigmoid(), couplings


@capsnet_torch.routing.learns(offset="o h")
def theirs_over_inputs(votes, activations, *, offset=0.3):
    poses, active, couplings = theirs(votes, activations, offset=offset)
    return poses, active, torch.einsum("bioh,boh->bio", votes, poses).softmax(1)


def one_more(votes, activations, *, num_iterations=3):
    return capsnet_torch.routing.dynamic(votes, activations, num_iterations=num_iterations + 1)


def one_more_and_an_epsilon(votes, activations, *, num_iterations=3):
    routed = one_more(votes, activations, num_iterations=num_iterations)
    return routed._replace(couplings=routed.couplings * (1 - 1e-9))


def theirs_without_weight(votes, activations):
    return theirs(votes, activations)


def broken(votes, activations):
    raise RuntimeError("It is broken.")


def ended(votes, activations):
    raise SystemExit(0)


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


def test_the_example_of_the_package_runs():
    assert doctest.testmod(capsnet_verify) == (0, 3)


def test_every_check_is_a_row_of_the_table_and_of_the_file(tmp_path, verify_command):
    path = tmp_path / "verified.json"
    status, printed, _ = verify_command("--steps", 2, "--json", path)
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
        "JAX and PyTorch agree in all 74 checks of routing dynamic: values within"
    )
    factor = results["capsule_layers"][0]["factor"]
    assert factor != 1
    assert f"The weight of capsule layer 0 was multiplied by {factor:g} in both models" in printed
    compared = [
        (batch["size"], batch["platform"], [*batch["implementations"].values()]) for batch in results["batches"]
    ]
    assert compared == [
        (3, "cpu", ["direct", "direct", "votes"]),
        (16, "cpu", ["direct", "direct", "fused"]),
        (3, "gpu", ["xla", "xla", "votes"]),
    ]
    assert results["unproved"] == []
    assert (
        "Proved at a batch of 3, stem 0 by direct, primary capsules by direct, routing 0 by votes; at a batch of 16, "
        "routing 0 by fused; at a batch of 3 as on GPU, stem 0 by xla, primary capsules by xla.\n"
    ) in printed


def test_only_a_batch_of_the_given_size_is_compared():
    subject, settings = of_routing("dynamic"), Settings("float32", batch_size=2)
    plan = plan_of(subject, settings)
    verification = Verification(subject, settings, plan, checks=[Check("stem 0", 1.0, 1e-15, 1e-12, AGREES)])
    assert "Proved at a batch of 2, stem 0 by direct, primary capsules by direct, routing 0 by votes.\n" in describe(
        verification
    )
    unproved = "routing 0 by fused, stem 0 by xla, primary capsules by xla"
    assert f"Not proved, as other batch sizes or platforms have them: {unproved}.\n" in describe(verification)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("digits", "official") else (pytest.mark.exhaustive,)) for name in PRESETS],
)
def test_every_implementation_used_in_training_and_evaluation_is_proved(name):
    subject = of_preset(name)
    run, plan = subject.run, plan_of(subject, Settings("float32"))
    proved = {layer for batch in plan.batches if batch.platform is None for layer in batch.implementations.items()}
    model = nnx.eval_shape(lambda: CapsNet.from_config(run.config.model, rngs=nnx.Rngs(0)))
    for size in (1, 2, 4, 15, 17, 25, 27, 50, 99, run.config.training.batch_size, 500, 10_000):
        choices = model.implementations(size)
        assert {(layer, choice.name) for layer, choice in choices.items()} <= proved, size
    trained = {(layer, choice.name) for layer, choice in model.implementations(plan.for_training.size).items()}
    assert trained == {
        (layer, choice.name) for layer, choice in model.implementations(run.config.training.batch_size).items()
    }


def test_on_a_gpu_its_implementations_come_first():
    """Those of a CPU are proved there, too."""
    plan = plan_of(of_preset("digits"), Settings("float32", device="gpu"))
    assert [(batch.size, batch.platform, [*batch.implementations.values()]) for batch in plan.batches] == [
        (3, None, ["xla", "patches", "votes"]),
        (16, "cpu", ["direct", "direct", "fused"]),
    ]
    assert plan.for_training.size == 3
    assert not plan.unproved


def test_convolutions_that_take_a_cpu_minutes_are_left_out_and_named():
    reference = PRESETS["readable"].model
    plan = plan_of(of_model("reference", reference), Settings("float32"))
    assert [(batch.size, batch.platform) for batch in plan.batches] == [(3, None), (16, None), (1, "gpu")]
    assert [*plan.batches[2].implementations.values()] == ["xla", "space_to_depth", "votes"]
    assert not plan.unproved
    plan = plan_of(of_model("of larger images", replace(reference, image_shape=(40, 40, 1))), Settings("float32"))
    assert all(batch.platform is None for batch in plan.batches)
    assert plan.unproved == [("stem 0", "xla"), ("primary capsules", "xla")]


def test_a_mistake_in_one_implementation_is_reported_as_one():
    wrong = next(mutant for mutant in MUTANTS if mutant.mistake == "fused softmax over inputs")
    settings = Settings("float32", steps=0)
    said = sentence(verify(wrong.subject, settings, mistake=wrong.planted(), only_first=True))
    assert "differ, first in couplings 0, batch of 16 (" in said
    assert "Most likely: in routing 0 by fused: the softmax axis: couplings of JAX sum to one over" in said


def test_both_precisions_are_rows_of_a_summary(verify_command):
    status, printed, told = verify_command("--preset", "digits", "--dtype", "float32", "bfloat16", *QUICKLY)
    assert status == 0
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if "preset digits" in line
    ]
    assert [(row[1], row[-1]) for row in rows] == [("float32", "agrees"), ("bfloat16", "agrees")]
    assert 1e-8 < float(rows[0][2]) < 2e-5
    assert 1e-4 < float(rows[1][2]) < 5e-2
    assert printed.splitlines()[-1] == "2 of 2 agree."
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in told.splitlines()]
    assert lines == rows  # one by one, as they are done


def test_routings_of_the_users_own_agree(user, verify_command):
    both = ["--routing", f"{user}:ours", "--torch-routing", f"{user}:theirs"]
    status, printed, _ = verify_command(*both, *QUICKLY)
    assert status == 0, printed
    assert "gradient encoder.primary2digit_capsules.routing_weights.offset" in printed


def test_a_wrong_routing_is_named_with_its_cause(user, verify_command):
    both = ["--jax-routing", f"{user}:ours", "--torch-routing", f"{user}:theirs_over_inputs"]
    status, printed, _ = verify_command(*both, *QUICKLY)
    assert status == 1
    last = printed.splitlines()[-1]
    assert last.startswith("JAX and PyTorch differ, first in couplings 0 (scale-relative error")
    assert "softmax axis: couplings of PyTorch sum to one over input capsules" in last


@pytest.mark.parametrize(
    ("function", "outcome"), [("one_more", "both agree"), ("one_more_and_an_epsilon", "they differ by 1.0e-09 only")]
)
def test_another_number_of_iterations_of_the_users_routing_is_named(function, outcome, user, verify_command):
    both = ["--jax-routing", "dynamic", "--torch-routing", f"{user}:{function}"]
    status, printed, _ = verify_command(*both, *QUICKLY)
    assert status == 1
    assert "first in couplings 0 " in printed
    cause = f"in PyTorch, 4 routing iterations, not 3: with --set num_iterations=4, {outcome}"
    assert f"Most likely: {cause}.\n" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "-1"], "steps is -1, and must be at least 0"),
        (["--learning-rate", "inf"], "learning_rate is inf, and must be a positive number"),
        (["--batch-size", "0"], "batch_size is 0, and must be at least 1"),
        (["--dtype"], "dtype is empty"),
        (["--html", "nowhere/x.html"], "html is nowhere/x.html, and the folder nowhere does not exist"),
        (
            ["--tolerance", "poses 9=1e-6"],
            "--tolerance is for 'poses 9', which is no value or gradient here; the nearest is 'poses 0'",
        ),
        (
            ["--tolerance", "poses 0=-1"],
            "--tolerance is 'poses 0=-1'; expected the name of a check and a number, as in",
        ),
        (["--tolerance", "step 1=1"], "is for 'step 1', which is no value or gradient here; the nearest is 'stem 0'"),
        (["--json", "nowhere/x.json"], "the folder nowhere does not exist"),
        (["--preset", "nothing"], "Unknown preset 'nothing'; expected readable, digits"),
        (["--routing", "nothing"], "Unknown routing 'nothing'; expected dynamic, em"),
        (["--torch-routing", "em"], "--torch-routing is given without --routing"),
        (["--jax-routing", "em", "--torch-routing", "nothing"], "Unknown routing 'nothing'; expected dynamic"),
        (["--jax-routing", "em", "--torch-routing", "no_such_module:f"], "no_such_module"),
        (["--random-model", "1", "--all-routings"], "--all-routings and --random-model are given"),
        (["--torch-weights", "x.pt"], "--torch-weights is given without a model; expected both"),
        (["--random-model", "-1"], "random_model is -1, and must be at least 0"),
        (["--seed", "99999999999"], "seed is 99999999999, and must be less than 4294967296"),
        (["--random-model", "7", "--preset", "em"], "--random-model and --preset are given; expected one of them"),
        (["--self-test", "--dtype", "float32"], "--self-test takes no other options"),
        (
            ["--image-shape", "2", "8", "1"],
            "Images of 2 x 8 are too small: the convolutions of this model, of kernel sizes 3, 5",
        ),
        (["--routing", "capsnet_jax.routing:em"], "has no twin in PyTorch; expected --torch-routing, too"),
        (["--jax-routing", "dynamic", "--torch-routing", "dynamic,foo=3"], "foo"),
        (["--jax-routing", "em", "--torch-routing", "em,min_variance=abc"], "min_variance"),
        (["no_such_folder"], "no_such_folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_option_is_one_sentence(options, message, verify_command):
    status, printed, told = verify_command(*options)
    assert (status, printed) == (2, "")
    assert message in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("broken", "The routing of the PyTorch model raises RuntimeError: It is broken."),
        ("ended", "The routing of the PyTorch model raises SystemExit: 0."),
        (
            "without_couplings",
            "'NoneType']; expected poses, activations and couplings, [(2, 5, 6), (2, 5), (2, 216, 5)]",
        ),
        ("without_gradient", "one of the variables needed for gradient computation has been modified by an inplace"),
        ("theirs_without_weight", "JAX encoder.primary2digit_capsules.routing_weights.offset beyond those of PyTorch"),
    ],
)
def test_a_routing_that_cannot_be_compared_is_one_sentence(function, message, user, verify_command):
    status, _, told = verify_command("--jax-routing", f"{user}:ours", "--torch-routing", f"{user}:{function}")
    assert status == 2
    assert message in told
    assert told.count("\n") == 1


def test_without_a_gpu_the_message_says_so(monkeypatch, verify_command):
    monkeypatch.setattr("jax.default_backend", lambda: "cpu")
    status, printed, told = verify_command("--device", "gpu")
    assert (status, printed) == (2, "")
    assert "There is no GPU that both JAX and PyTorch can use; expected --device cpu" in told


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit])
def test_an_internal_error_is_not_a_verdict(error, monkeypatch, verify_command):
    monkeypatch.setattr("capsnet_verify.verification.new_pair", mock.Mock(side_effect=error(0)))
    status, printed, told = verify_command()
    assert (status, printed) == (2, "")
    assert error.__name__ in told


def test_without_torch_the_message_says_what_to_install(monkeypatch, verify_command):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, _, told = verify_command()
    assert status == 2
    assert 'capsnet verify needs PyTorch, which is not installed: pip install ".[torch]".' in told


@pytest.mark.exhaustive
@pytest.mark.slow
def test_every_preset_and_routing_agrees(verify_command):
    status, printed, _ = verify_command("--all-presets", "--all-routings", "--dtype", "float64", "float32")
    assert status == 0, printed
    assert printed.splitlines()[-1] == "32 of 32 agree."
