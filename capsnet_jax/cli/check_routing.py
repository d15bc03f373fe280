"""The command `capsnet check-routing`: the property suite on a routing, told in plain words."""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro

from capsnet_jax.capsules import Routed
from capsnet_jax.errors import UsageError, in_words
from capsnet_jax.routing import Routing, get_routing
from capsnet_jax.routing.properties import (
    BATCH,
    CHECKS,
    IN_SIZE,
    INPUTS,
    OUT_SIZE,
    OUTPUTS,
    Case,
    Check,
    Finding,
    Subject,
    compare,
    compiled,
    draw_case,
    result,
    to_float64,
)

TORCH_TOLERANCE = 1e-9  # of the largest value; registered routings and their twins differ by 1.5e-15


class Outcome(NamedTuple):
    """What came of a check.

    Attributes:
        name: of the check.
        promise: what was checked.
        status: "ok", "FAILED" or "not run".
        finding: what failed, or why the check was not run; empty if all is well.
    """

    name: str
    promise: str
    status: str
    finding: str


def check_routing(
    routing: str | Callable[..., Routed] | Routing,
    *,
    num_iterations: int = 3,
    extra_checks: Sequence[Check] = (),
    seed: int = 0,
) -> list[Outcome]:
    """Runs all checks on a routing. A check that fails does not keep the others from running.

    Args:
        routing: as for `get_routing`.
        num_iterations: for routings that iterate.
        extra_checks: run after those in `CHECKS`.
        seed: of the random votes, activations, poses and weights.

    Returns:
        What came of each check. Where the routing cannot be called or compiled at all, the others are not run.

    Raises:
        UsageError: the routing is unknown or refuses its options.
    """
    subject = Subject(get_routing(routing, num_iterations=num_iterations))
    case = draw_case(subject.routing, seed)
    outcomes: list[Outcome] = []
    obstacle = ""
    for check in (*CHECKS, *extra_checks):
        status, finding = ("not run", obstacle) if obstacle else ("ok", "")
        if not obstacle:
            try:
                check(subject, case)
            except Finding as error:
                status, finding = "FAILED", str(error)
            except Exception as error:  # the user's function may raise anything
                status, finding = "FAILED", _told(error)
                if check in (result, compiled):
                    obstacle = f"The check '{name_of(check)}' must pass first."
        outcomes.append(Outcome(name_of(check), promise_of(check), status, finding))
    return outcomes


def name_of(check: Check) -> str:
    """The name of a check, as it is printed."""
    return check.__name__.replace("_", " ")


def promise_of(check: Check) -> str:
    """The first line of a check's docstring."""
    return (check.__doc__ or "").partition("\n")[0]


@dataclass(frozen=True)
class CheckRouting:
    """Checks that a routing keeps the promises that all parts of this package rest on, and says what it breaks."""

    routing: tyro.conf.Positional[str]
    """Your own routing as package.module:function, or a registered name; options follow after commas."""
    torch: str | None = None
    """The same routing in PyTorch, as package.module:function, for a batch of votes [b i o h]; compared in float64."""
    num_iterations: int = 3
    """For routings that iterate."""

    def run(self) -> int:
        """Prints a line for each check and a verdict; returns 0 if all passed and 1 if not.

        Raises:
            UsageError: a function cannot be found or called, or has no such option.
        """
        extra = [] if self.torch is None else [torch_check(find_torch(self.torch))]
        outcomes = check_routing(self.routing, num_iterations=self.num_iterations, extra_checks=extra)
        print(f"{self.routing}, from {INPUTS} capsules of pose size {IN_SIZE} to {OUTPUTS} of pose size {OUT_SIZE}:")
        for outcome in outcomes:
            print(f"{outcome.status:8} {outcome.name:17} {outcome.finding or outcome.promise}")
        print(verdict(self.routing, outcomes))
        return int(any(outcome.status != "ok" for outcome in outcomes))


def verdict(routing: str, outcomes: list[Outcome]) -> str:
    """The outcomes in one sentence."""
    failed = [outcome.name for outcome in outcomes if outcome.status == "FAILED"]
    skipped = sum(outcome.status == "not run" for outcome in outcomes)
    if not failed:
        return f"{routing} passed all {len(outcomes)} checks."
    rest = f"; {skipped} were not run" if skipped else ""
    return f"{routing} failed {len(failed)} of {len(outcomes)} checks ({', '.join(failed)}){rest}."


def find_torch(name: str) -> Callable[..., Any]:
    """The torch function of a name, written package.module:function.

    Raises:
        UsageError: torch is not installed, or there is no such function.
    """
    try:
        importlib.import_module("torch")
    except ImportError as error:
        raise UsageError("--torch needs PyTorch, which is not installed: pip install 'capsnet-jax[torch]'.") from error
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the user's module does when it is imported
        reason = (
            f"cannot be imported: {type(error).__name__}: {error}"
            if attribute
            else "has no colon; expected package.module:function"
        )
        raise UsageError(f"The torch function {name!r} {reason}.") from error
    if not callable(function):
        raise UsageError(f"The torch function {name!r} is {type(function).__name__}; expected a function of votes.")
    return function


def torch_check(function: Callable[..., Any]) -> Check:
    """The check against a function of torch, `(votes [b i o h], activations [b i]) -> (poses, activations, couplings)`.

    Poses, weights and options are passed to it by name; weights are shared by the batch.
    """

    def torch(subject: Subject, case: Case) -> None:
        """It returns what the torch function returns, and has the same gradient of the votes, in float64."""
        import torch  # only here: the package runs without

        inputs = draw_case(subject.routing, 1, batch=(BATCH,))
        with jax.enable_x64(True):
            inputs = to_float64(inputs._replace(weights=case.weights))
            routed = subject.route_batch(inputs)
            gradient = subject.gradients_batch(inputs).votes
        tensors = jax.tree.map(lambda array: torch.tensor(np.asarray(array)), inputs)
        votes = tensors.votes.requires_grad_()
        given = dict(subject.routing.options) | {"poses": tensors.poses} | tensors.weights
        known = inspect.signature(function).parameters
        if unknown := [name for name in tensors.weights if name not in known]:
            raise Finding(f"The torch function has no argument {unknown[0]!r}; expected one for each learned weight.")
        theirs: Any = Routed(
            *function(votes, tensors.activations, **{name: given[name] for name in given if name in known})
        )
        outputs = torch.cat([theirs.poses.flatten(1), theirs.activations], dim=1)
        (outputs * torch.cos(torch.arange(outputs.shape[1], dtype=votes.dtype))).sum().backward()
        pairs = {name: (getattr(routed, name), getattr(theirs, name).detach()) for name in Routed._fields}
        pairs["gradients of votes"] = (gradient, votes.grad)
        for name, (ours, expected) in pairs.items():
            if ours.shape != tuple(expected.shape):
                raise Finding(f"Compared with torch: {name} are {ours.shape}; by torch, {tuple(expected.shape)}.")
            compare("Compared with torch", name, ours, expected, TORCH_TOLERANCE)

    return torch


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, UsageError) else f"It raises {in_words(error)}"
