"""A routing in PyTorch by its name: a registered one with options, or the user's own."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from capsnet_jax.cli.check_routing import find_torch
from capsnet_jax.routing import get_routing
from capsnet_torch.capsules import Routed


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


def _described(parts: Sequence[Any]) -> str:
    return ", ".join(str(tuple(of.shape)) if isinstance(of, Tensor) else type(of).__name__ for of in parts)
