"""Routings in PyTorch: found by name, a registered one or the user's own, and compared with one in JAX."""

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor

from capsnet_jax.errors import UsageError, in_words
from capsnet_jax.routing import get_routing
from capsnet_jax.routing.properties import BATCH, Case, Check, Finding, Subject, compare, draw_case, to_float64
from capsnet_torch.capsules import Routed

TOLERANCE = 1e-9  # of the largest value; registered routings and their twins differ by 1.5e-15


def find_routing(name: str) -> str | Callable[..., Any]:
    """What the twin takes as its routing.

    Args:
        name: a registered name, with options after commas, or package.module:function. A function of the user's may
            return any sequence of poses, activations and couplings.

    Raises:
        UsageError: the name or an option is unknown, or the function cannot be imported.
    """
    if ":" not in name:
        get_routing(name)  # whose options are those of its twin
        return name
    function = find_torch(name)

    @functools.wraps(function)  # whose arguments say what it needs
    def routing(votes: Tensor, *args: Any, **options: Any) -> Routed:
        found = function(votes, *args, **options)
        b, i, o, h = votes.shape
        shapes = ((b, o, h), (b, o), (b, i, o))
        parts = found if isinstance(found, tuple | list) else [found]
        if not all(isinstance(part, Tensor) for part in parts) or [part.shape for part in parts] != [*shapes]:
            raise TypeError(f"it returns {_described(parts)}; expected poses, activations and couplings, {shapes}")
        return Routed(*found)

    return routing


def find_torch(name: str) -> Callable[..., Any]:
    """The torch function of a name, written package.module:function.

    Raises:
        UsageError: there is no such function.
    """
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the user's module does when it is imported
        reason = (
            f"cannot be imported: {in_words(error)}" if attribute else "has no colon; expected package.module:function"
        )
        raise UsageError(f"The torch function {name!r} {reason}.") from error
    if not callable(function):
        raise UsageError(f"The torch function {name!r} is {type(function).__name__}; expected a function of votes.")
    return function


def torch_check(function: Callable[..., Any]) -> Check:
    """The check against a function of torch, `(votes [b i o h], activations [b i]) -> (poses, activations, couplings)`.

    Poses, weights and options are passed to it by name; weights are shared by the batch.
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
            compare("Compared with torch", name, ours, expected, TOLERANCE)

    return agrees_with_torch


def _described(parts: Sequence[Any]) -> str:
    return ", ".join(str(tuple(of.shape)) if isinstance(of, Tensor) else type(of).__name__ for of in parts)
