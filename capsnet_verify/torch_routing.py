"""A routing in PyTorch by its name: a registered one with options, or the user's own."""

import functools
from collections.abc import Callable
from typing import Any

from capsnet_jax.check_routing import find_torch
from capsnet_jax.errors import UsageError
from capsnet_torch.capsules import Routed
from capsnet_torch.routing import ROUTINGS


def find_routing(name: str) -> str | Callable[..., Any]:
    """What the twin takes as its routing.

    Args:
        name: a registered name, with options after commas, or package.module:function. A function of the user's may
            return any sequence of poses, activations and couplings.

    Raises:
        UsageError: the name is unknown, or the function cannot be imported.
    """
    if ":" not in name:
        if name.split(",")[0] not in ROUTINGS:
            known = ", ".join(ROUTINGS)
            raise UsageError(f"Unknown routing {name!r}; expected {known} or your own as package.module:function.")
        return name
    function = find_torch(name)

    @functools.wraps(function)  # whose arguments say what it needs
    def routing(*args: Any, **options: Any) -> Routed:
        return Routed(*function(*args, **options))

    return routing
