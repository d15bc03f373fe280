"""The arguments of a routing; see `capsnet_jax.routing.arguments`."""

from collections.abc import Callable
from typing import TypeVar

from capsnet_torch.capsules import Routed

Function = TypeVar("Function", bound=Callable[..., Routed])


def learns(**axes: str) -> Callable[[Function], Function]:
    """Declare which keyword arguments are learned weights, and the axes of each: i, o, d or h."""

    def declare(function: Function) -> Function:
        function.__dict__["learned_axes"] = {name: tuple(letters.split()) for name, letters in axes.items()}
        return function

    return declare


def check_arguments(routing: str, *, num_iterations: int) -> None:
    """Refuse a number of iterations below 1."""
    if num_iterations < 1:
        raise ValueError(f"Routing {routing}: num_iterations is {num_iterations}, and must be at least 1.")
