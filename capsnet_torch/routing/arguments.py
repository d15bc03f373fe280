"""The arguments of a routing that are learned weights."""

from collections.abc import Callable
from typing import TypeVar

from capsnet_torch.capsules import Routed

Function = TypeVar("Function", bound=Callable[..., Routed])


def learns(**axes: str) -> Callable[[Function], Function]:
    """Declare which keyword arguments are learned weights, and the axes of each; see `capsnet_jax.routing.learns`."""

    def declare(function: Function) -> Function:
        function.__dict__["learned_axes"] = {name: tuple(letters.split()) for name, letters in axes.items()}
        return function

    return declare
