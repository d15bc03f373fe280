"""Routing algorithms, each a pure function of one example; layers `jax.vmap` them, so no example can see another.

A routing is any callable `(votes [i o h], activations [i]) -> Routed(poses [o h], activations [o], couplings [i o])`.
"""

import functools
import importlib
import inspect
from collections.abc import Callable

from jaxtyping import Array, Float

from capsnet_jax.capsules import Routed
from capsnet_jax.errors import UsageError
from capsnet_jax.routing.dynamic import dynamic

__all__ = ["ROUTINGS", "Routing", "dynamic", "get_routing"]

Routing = Callable[[Float[Array, "i o h"], Float[Array, " i"]], Routed]

ROUTINGS: dict[str, Callable[..., Routed]] = {"dynamic": dynamic}


def get_routing(routing: str | Callable[..., Routed], *, num_iterations: int) -> Routing:
    """The routing of a name, with its number of iterations bound.

    Args:
        routing: a name in `ROUTINGS`, the user's own as `package.module:function`, or the function itself.
        num_iterations: passed to functions that take an argument of this name.

    Raises:
        UsageError: the name is unknown, or cannot be imported.
    """
    function = _find(routing) if isinstance(routing, str) else routing
    if "num_iterations" in inspect.signature(function).parameters:
        return functools.partial(function, num_iterations=num_iterations)
    return function


def _find(name: str) -> Callable[..., Routed]:
    if name in ROUTINGS:
        return ROUTINGS[name]
    module, _, function = name.partition(":")
    if not function:
        raise UsageError(
            f"Unknown routing {name!r}; expected {', '.join(ROUTINGS)} or your own as package.module:function."
        )
    try:
        found: Callable[..., Routed] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"Routing {name!r} cannot be imported: {error}.") from error
    return found
