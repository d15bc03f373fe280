"""Arguments of routing algorithms: the declaration of learned weights, and the check of votes and activations."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from jaxtyping import Array, Float

from capsnet_jax.capsules import Routed
from capsnet_jax.errors import UsageError

GIVEN = ("poses", "softmax", "num_iterations")  # passed by the layer to functions that accept them

Function = TypeVar("Function", bound=Callable[..., Routed])


def learns(**axes: str) -> Callable[[Function], Function]:
    """Declare keyword arguments of a routing algorithm as learned weights.

        @learns(gain="i o", bias="")
        def my_routing(votes, activations, *, gain=1.0, bias=0.0): ...

    The decorator returns the function itself. A layer creates one parameter per weight, filled with the default, and
    passes the learned values by name. A weight whose default is None is learned only if the user sets an initial value
    as an option.

    Args:
        axes: axes of each weight, as letters separated by spaces: i (input capsules), o (output capsules), d (input
            pose size), h (output pose size). An empty string declares a scalar.

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
    """The axes of each weight that was declared with `learns`."""
    return getattr(function, "learned_axes", {})


def check_arguments(
    routing: str,
    votes: Float[Array, "..."],
    activations: Float[Array, "..."],
    *,
    num_iterations: int = 1,
    positions: int = 0,
) -> None:
    """Check the shapes of votes and activations of one example, and the number of iterations.

    Args:
        routing: name of the algorithm, for the message.
        votes: expected to be `[i o h]`.
        activations: expected to be `[i]`.
        num_iterations: expected to be at least 1.
        positions: number of leading axes that are allowed.

    Raises:
        UsageError: an argument is wrong.
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
