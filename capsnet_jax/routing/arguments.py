"""The arguments of a routing: which of them are learned weights, and a check of the others' shapes."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from jaxtyping import Array, Float

from capsnet_jax.capsules import Routed
from capsnet_jax.errors import UsageError

GIVEN = ("poses", "softmax", "num_iterations")  # by the layer, to a routing that has them

Function = TypeVar("Function", bound=Callable[..., Routed])


def learns(**axes: str) -> Callable[[Function], Function]:
    """Declare which keyword arguments of a routing are weights that a layer learns.

        @learns(gain="i o", bias="")
        def my_routing(votes, activations, *, gain=1.0, bias=0.0): ...

    The function stays as it is, with its defaults. A layer makes one array for each weight, full of the default, and
    passes the learned values by name. A weight whose default is None is learned only if the user gives a number to
    start from, as an option.

    Args:
        axes: for each weight the axes of its array, letters with spaces between: i (input capsules), o (output
            capsules), d (input pose size), h (output pose size). An empty string is a single number.

    Raises:
        UsageError: the function has no such keyword argument with a default, or an axis is unknown. Arguments that the
            layer passes, such as `poses`, cannot be weights.
    """

    def declare(function: Function) -> Function:
        parameters = inspect.signature(function).parameters.values()
        defaults = [parameter.name for parameter in parameters if parameter.default is not inspect.Parameter.empty]
        possible = [name for name in defaults if name not in GIVEN]
        for name, letters in axes.items():
            weight = f"Routing {function.__name__}: the learned weight {name!r}"
            if name not in possible:
                raise UsageError(
                    f"{weight} is not a keyword argument with a default to start from; expected one of "
                    f"{', '.join(possible) or '(none)'}."
                )
            if not {*letters.split()} <= {"i", "o", "d", "h"}:
                raise UsageError(f"{weight} has the axes {letters!r}; expected i, o, d or h, with spaces between.")
        declared = {name: tuple(letters.split()) for name, letters in axes.items()}
        function.__dict__["learned_axes"] = learned_axes(function) | declared
        return function

    return declare


def learned_axes(function: Callable[..., Any]) -> dict[str, tuple[str, ...]]:
    """The axes of each weight that a routing declared by `learns`."""
    return getattr(function, "learned_axes", {})


def check_arguments(
    routing: str,
    votes: Float[Array, "..."],
    activations: Float[Array, "..."],
    *,
    num_iterations: int = 1,
    positions: int = 0,
) -> None:
    """Refuses votes and activations that are not of one example, and a number of iterations below 1.

    Args:
        routing: name of the algorithm, for the message.
        votes: expected to be `[i o h]`.
        activations: expected to be `[i]`.
        num_iterations: expected to be at least 1.
        positions: number of axes that may come before these.

    Raises:
        UsageError: names the routing, the argument, what was got and what was expected.
    """
    if not 3 <= votes.ndim <= 3 + positions:
        raise UsageError(f"Routing {routing}: votes are {votes.shape}; expected three axes, [i o h], of one example.")
    if activations.shape != votes.shape[:-2]:
        raise UsageError(
            f"Routing {routing}: activations are {activations.shape}; expected {votes.shape[:-2]}, one for each input "
            f"capsule of votes of shape {votes.shape}."
        )
    if num_iterations < 1:
        raise UsageError(f"Routing {routing}: num_iterations is {num_iterations}, and must be at least 1.")
