"""Import a routing of the user in PyTorch by name, and compare it with a routing in JAX."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor

from capsnet_jax.errors import UsageError
from capsnet_jax.routing import get_routing
from capsnet_jax.routing.properties import BATCH, Case, Check, Finding, Subject, compare, draw_case, to_float64
from capsnet_torch.capsules import Routed
from capsnet_verify.foreign_module import import_by_name

TOLERANCE = 1e-9  # of the largest value; registered routings and their twins differ by 1.5e-15


def find_routing(name: str) -> str | Callable[..., Any]:
    """Find a routing for `capsnet_torch.CapsNet`.

    Args:
        name: a registered name, with options after commas, or package.module:function. The user's function may return
            any sequence of poses, activations and couplings.

    Raises:
        UsageError: the name or an option is unknown, or the function cannot be imported.
    """
    if ":" not in name:
        get_routing(name)  # refuses unknown options
        return name
    function = find_torch(name)

    @functools.wraps(function)  # keeps the signature, from which a layer reads what the function needs
    def routing(votes: Tensor, *args: Any, **options: Any) -> Routed:
        found = function(votes, *args, **options)
        b, i, o, h = votes.shape
        expected = [(b, o, h), (b, o), (b, i, o)]
        parts = found if isinstance(found, tuple | list) else [found]
        got = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
        if got != expected:
            raise TypeError(f"it returns {got}; expected poses, activations and couplings, {expected}")
        return Routed(*parts)

    return routing


def find_torch(name: str) -> Callable[..., Any]:
    """Import the torch function that `package.module:function` names.

    Raises:
        UsageError: it cannot be imported, or is not a function.
    """
    function = import_by_name("function", name)
    if not callable(function):
        raise UsageError(f"The torch function {name!r} is {type(function).__name__}; expected a function of votes.")
    return function


def torch_check(function: Callable[..., Any]) -> Check:
    """Make the check of a routing against a torch function.

    Args:
        function: `(votes [b i o h], activations [b i]) -> (poses [b o h], activations [b o], couplings [b i o])`. It
            gets poses, options and weights, which all examples share, by name.
    """

    def agrees_with_torch(subject: Subject, case: Case) -> None:
        """It returns what the torch function returns, and has the same gradient of the votes, in float64."""
        inputs = draw_case(subject.routing, 1, batch=(BATCH,))
        with jax.enable_x64(True):
            inputs = to_float64(inputs._replace(weights=case.weights))
            routed = subject.route_batch(inputs)
            gradient = subject.gradients_batch(inputs).votes
        tensors = jax.tree.map(lambda array: torch.tensor(np.asarray(array)), inputs)
        votes = tensors.votes.requires_grad_()
        options = dict(subject.routing.options) | {"poses": tensors.poses} | tensors.weights
        known = inspect.signature(function).parameters
        if unknown := [name for name in tensors.weights if name not in known]:
            raise Finding(f"The torch function has no argument {unknown[0]!r}; expected one for each learned weight.")
        options = {name: value for name, value in options.items() if name in known}
        expected = Routed(*function(votes, tensors.activations, **options))
        outputs = torch.cat([expected.poses.flatten(1), expected.activations], dim=1)
        (outputs * torch.cos(torch.arange(outputs.shape[1], dtype=votes.dtype))).sum().backward()
        pairs = {name: (getattr(routed, name), getattr(expected, name).detach()) for name in Routed._fields}
        pairs["gradients of votes"] = (gradient, votes.grad)
        for name, (actual, wanted) in pairs.items():
            if actual.shape != tuple(wanted.shape):
                raise Finding(f"Compared with torch: {name} are {actual.shape}; by torch, {tuple(wanted.shape)}.")
            compare("Compared with torch", name, actual, wanted, TOLERANCE)

    return agrees_with_torch
