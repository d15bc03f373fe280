"""The command `check-routing`: what it prints, its exit status, and the comparison with PyTorch."""

import subprocess
import sys

import pytest

from capsnet_jax import UsageError
from capsnet_jax.cli.main import main
from capsnet_jax.routing import ROUTINGS, get_routing
from capsnet_jax.routing.properties import CHECKS, Finding, Subject, draw_case


def test_the_command_prints_a_line_for_each_check_and_a_verdict(capsys):
    assert main(["check-routing", "uniform"]) == 0
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert first == "uniform, from 11 capsules of pose size 4 to 5 of pose size 6:"
    assert [line[:9] for line in lines] == ["ok       "] * len(CHECKS)
    assert lines[4] == "ok       activations       Activations are in [0, 1]."
    assert last == "uniform passed all 13 checks."


def test_the_command_says_what_failed_and_exits_with_status_1(capsys):
    assert main(["check-routing", "random,seed=3"]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if line.startswith("FAILED")]
    assert [line[9:27].strip() for line in failed] == ["order of inputs", "order of outputs"]
    assert all("poses are off by" in line for line in failed)
    assert last == "random,seed=3 failed 2 of 13 checks (order of inputs, order of outputs)."


def test_the_command_says_what_was_not_run(capsys, monkeypatch, tmp_path):
    (tmp_path / "stuck_routing.py").write_text("def stuck(votes, activations):\n    return 1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["check-routing", "stuck_routing:stuck"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == (
        "FAILED   result            Routing stuck_routing:stuck raises ZeroDivisionError: division by zero "
        "(stuck_routing.py, line 2)."
    )
    assert lines[2] == "not run  repeatable        The check 'result' must pass first."
    assert lines[-1] == "stuck_routing:stuck failed 1 of 13 checks (result); 12 were not run."


def test_errors_about_arguments_name_the_routing():
    """In a separate process without jaxtyping's checks of shapes, which would raise first."""
    program = """
import jax.numpy as jnp
from capsnet_jax import UsageError
from capsnet_jax.routing import ROUTINGS, get_routing
for name in ROUTINGS:
    routing = get_routing(name)
    for votes, activations in ((5, 6), 5), ((11, 5, 6), 10):
        try:
            routing(jnp.zeros(votes), jnp.zeros(activations), poses=jnp.zeros((11, 4)))
        except UsageError as error:
            print(error)
try:
    get_routing("capsnet_jax.routing:ROUTINGS")
except UsageError as error:
    print(error)
"""
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    *lines, last = printed.splitlines()
    for name, of_votes, of_activations in zip(ROUTINGS, lines[::2], lines[1::2], strict=True):
        assert of_votes == f"Routing {name}: votes are (5, 6); expected three axes, [i o h], of one example."
        assert of_activations.startswith(f"Routing {name}: activations are (10,); expected (11,), one for each input")
    assert (
        last == "Routing 'capsnet_jax.routing:ROUTINGS' is of type dict; expected a function of votes and activations."
    )


@pytest.mark.parametrize("name", [name for name in ROUTINGS if get_routing(name).takes("num_iterations")])
def test_errors_about_iterations_name_the_routing(name):
    with pytest.raises(UsageError, match=f"Routing {name}: num_iterations is 0, and must be at least 1"):
        get_routing(f"{name},num_iterations=0")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("capsnet_torch", "'capsnet_torch' has no colon; expected package.module:function"),
        ("capsnet_torch.routing:nothing", "'capsnet_torch.routing:nothing' cannot be imported"),
        ("capsnet_torch.routing:ROUTINGS", "is dict; expected a function of votes"),
    ],
)
def test_a_torch_function_that_is_none_is_refused(name, words, capsys):
    pytest.importorskip("torch")
    assert main(["check-routing", "uniform", "--torch", name]) == 2
    assert words in capsys.readouterr().err


def test_the_comparison_with_torch_passes_for_the_twin(capsys):
    pytest.importorskip("torch")
    assert main(["check-routing", "self_routing", "--torch", "capsnet_torch.routing:self_routing"]) == 0
    *_, line, last = capsys.readouterr().out.splitlines()
    assert line.startswith("ok       agrees with torch It returns what the torch function returns")
    assert last == "self_routing passed all 14 checks."


def test_the_comparison_with_torch_fails_for_another_routing():
    torch_routing = pytest.importorskip("capsnet_verify.torch_routing")
    subject = Subject(get_routing("uniform"))
    check = torch_routing.torch_check(torch_routing.find_torch("capsnet_torch.routing:kmeans"))
    with pytest.raises(Finding, match="Compared with torch: poses are off by"):
        check(subject, draw_case(subject.routing, 0))


def test_a_torch_function_must_take_the_weights():
    torch_routing = pytest.importorskip("capsnet_verify.torch_routing")
    subject = Subject(get_routing("self_routing"))
    check = torch_routing.torch_check(torch_routing.find_torch("capsnet_torch.routing:uniform"))
    with pytest.raises(Finding, match="The torch function has no argument 'route_"):
        check(subject, draw_case(subject.routing, 0))
