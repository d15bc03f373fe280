"""Routing algorithms by name, with their options bound, their learned weights listed and their results checked."""

import ast
import functools
import importlib
import inspect
import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from capsnet_jax.capsules import Routed
from capsnet_jax.errors import UsageError, in_words
from capsnet_jax.routing.arguments import GIVEN, learned_axes
from capsnet_jax.routing.dynamic import dynamic
from capsnet_jax.routing.em import em
from capsnet_jax.routing.inverted_attention import inverted_attention
from capsnet_jax.routing.kmeans import kmeans
from capsnet_jax.routing.random import random
from capsnet_jax.routing.self_attention import self_attention
from capsnet_jax.routing.self_routing import self_routing
from capsnet_jax.routing.uniform import uniform
from capsnet_jax.routing.variational import variational

MAX_ITERATIONS = 100  # each is traced: many more take hours, and come from typing errors or damaged files

ROUTINGS: dict[str, Callable[..., Routed]] = {
    function.__name__: function
    for function in (
        dynamic,
        em,
        variational,
        self_attention,
        inverted_attention,
        self_routing,
        kmeans,
        uniform,
        random,
    )
}
"""The routing algorithms of this package, by name.

Each is a function `(votes [i o h], activations [i]) -> Routed` of one example. Layers take them by name.

Examples:
    >>> import jax.numpy as jnp
    >>> from capsnet_jax import ROUTINGS
    >>> sorted(ROUTINGS)[:3]
    ['dynamic', 'em', 'inverted_attention']
    >>> ROUTINGS["uniform"](jnp.ones((6, 3, 4)), jnp.ones(6)).poses.shape
    (3, 4)
"""


EXPECTED: dict[type, str] = {bool: "true or false", int: "int", float: "a finite number"}  # of an option, in messages


class Weight(NamedTuple):
    """A learned weight of a routing algorithm: its axes, as letters i, o, d and h, and its initial value."""

    axes: tuple[str, ...]
    initial: float


@dataclass(frozen=True)
class Routing:
    """A routing algorithm with its options bound, as layers call it. Hashable; equal if all attributes are.

    A layer passes votes and activations by position, and these keyword arguments to functions that accept them:

    - `poses`: poses of the input capsules, `[i d]`;
    - `num_iterations`;
    - the weights declared with `learns`;
    - `softmax`: the softmax over all parents of an input capsule, of logits `[positions i o]`. A convolutional layer
      calls a function with this argument once, with votes `[positions i o h]`, and any other once per position.

    All other keyword arguments are options of the user.

    Attributes:
        name: name of the algorithm without options, for messages.
        function: the algorithm.
        options: bound keyword arguments, sorted by name.
    """

    name: str
    function: Callable[..., Routed]
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(
        self, votes: Float[Array, "*positions i o h"], activations: Float[Array, "*positions i"], **given: Any
    ) -> Routed:
        """Route one example.

        Args:
            votes: vote of each input capsule for each output capsule.
            activations: activations of the input capsules.
            given: weights, poses and softmax; ignored if the function does not accept them.

        Raises:
            UsageError: the function raises an error, which becomes the cause of this one, or does not return a
                `Routed` of the right shapes.
        """
        given = {name: value for name, value in given.items() if self.takes(name)}
        try:
            routed = self.function(votes, activations, **(dict(self.options) | given))
        except (UsageError, jax.errors.JaxRuntimeError, Warning):
            raise  # already explained, an error of the device such as out of memory, or a warning turned into an error
        except (Exception, SystemExit) as error:  # the user's function may raise anything
            place = _place(self.function, error)
            raise UsageError(f"Routing {self.name} raises {in_words(error)}{place}.") from error
        if not isinstance(routed, Routed):
            raise UsageError(
                f"Routing {self.name} returned {type(routed).__name__}; expected Routed(poses, activations, couplings)."
            )
        *positions, inputs, outputs, size = votes.shape
        shapes = (*positions, outputs, size), (*positions, outputs), (*positions, inputs, outputs)
        for field, array, shape in zip(Routed._fields, routed, shapes, strict=True):
            got = array.shape if isinstance(array, jax.Array) else f"of type {type(array).__name__}"
            if got != shape:
                raise UsageError(
                    f"Routing {self.name}: {field} are {got}; expected {shape} from votes of shape {votes.shape}."
                )
        return routed

    def takes(self, argument: str) -> bool:
        """Return whether the function has an argument of this name."""
        return argument in _parameters(self.function)

    @property
    def weights(self) -> dict[str, Weight]:
        """The weights that a layer creates and learns: those declared with `learns` whose initial value is not None."""
        initial = {name: parameter.default for name, parameter in _parameters(self.function).items()}
        initial |= dict(self.options)
        axes = learned_axes(self.function)
        return {name: Weight(axes[name], initial[name]) for name in axes if initial[name] is not None}


def get_routing(routing: str | Callable[..., Routed] | Routing, *, num_iterations: int = 3) -> Routing:
    """Look up a routing algorithm and bind its options.

    Args:
        routing: a name in `ROUTINGS`, your own function as `package.module:function`, or the function itself. Options
            follow a name after commas, as in "dynamic,leaky=true,capsule_bias=0.1". Bind the options of a function with
            `functools.partial`.
        num_iterations: number of iterations, 1 to 100, for functions with this argument; an option of this name
            overrides it.

    Raises:
        UsageError: the name is unknown, cannot be imported or is not callable, it has no such option, or the number of
            iterations is out of range.
    """
    if isinstance(routing, Routing):
        return routing
    name, *settings = routing.split(",") if isinstance(routing, str) else [str(routing)]
    found = _find(name) if isinstance(routing, str) else routing
    if not callable(found):
        kind = type(found).__name__
        raise UsageError(f"Routing {name!r} is of type {kind}; expected a function of votes and activations.")
    bound = functools.partial(found)  # a partial of a partial has the function and keywords of the inner one
    function, options = bound.func, bound.keywords
    if not isinstance(routing, str):
        name = getattr(function, "__name__", name)
    unknown = [*bound.args, *(option for option in options if option not in _parameters(function))]
    if unknown:
        raise UsageError(f"Routing {routing} binds {unknown}; expected keywords among {describe_options(function)}.")
    options |= _parse_options(name, function, settings)
    if "num_iterations" in _parameters(function):
        options = {"num_iterations": num_iterations} | options
        number = options["num_iterations"]
        if not 1 <= number <= MAX_ITERATIONS:
            raise UsageError(
                f"Routing {name}: num_iterations is {number}, and must be at least 1 and at most {MAX_ITERATIONS}."
            )
    return Routing(name, function, tuple(sorted(options.items())))


def describe_options(function: Callable[..., Routed]) -> str:
    """List the options of a routing with their types and defaults, for help texts and error messages."""
    learned = learned_axes(function)
    described = [
        f"{name} ({kind.__name__}, {_parameters(function)[name].default}{', learned' if name in learned else ''})"
        for name, kind in _option_types(function).items()
    ]
    return ", ".join(described) or "none"


def _find(name: str) -> Any:
    if name in ROUTINGS:
        return ROUTINGS[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        raise UsageError(
            f"Unknown routing {name!r}; expected {', '.join(ROUTINGS)} or your own as package.module:function."
        )
    try:
        return getattr(importlib.import_module(module), attribute)
    except UsageError:  # raised by `learns`
        raise
    except (Exception, SystemExit) as error:  # importing the user's module may raise anything
        raise UsageError(f"Routing {name!r} cannot be imported: {in_words(error)}.") from error


def _parse_options(name: str, function: Callable[..., Routed], settings: list[str]) -> dict[str, Any]:
    types = _option_types(function)
    options: dict[str, Any] = {}
    for setting in settings:
        option, _, text = (part.strip() for part in setting.partition("="))
        if option not in types:
            raise UsageError(f"Routing {name} has no option {option!r}; expected {describe_options(function)}.")
        if option in options:
            raise UsageError(f"Routing {name}: {option} is given twice.")
        value = options[option] = _parse(text, types[option])
        expected = EXPECTED.get(types[option])
        if expected is not None and (type(value) is not types[option] or value in (math.inf, -math.inf)):
            raise UsageError(f"Routing {name}: {option} is {text!r}; expected {expected}.")
    return options


def _parse(text: str, kind: type) -> Any:
    """Parse a number, true or false, or else return the text itself."""
    if kind is str:
        return text
    try:
        value = ast.literal_eval(text.capitalize())
    except (SyntaxError, ValueError):
        return text
    return float(value) if kind is float and type(value) is int else value


def _option_types(function: Callable[..., Routed]) -> dict[str, type]:
    """The type of each option: the type of its default, or float for the initial value of a learned weight."""
    return {
        name: float if name in learned_axes(function) else type(parameter.default)
        for name, parameter in _parameters(function).items()
        if name not in GIVEN or name == "num_iterations"
    }


@functools.cache
def _parameters(function: Callable[..., Routed]) -> dict[str, inspect.Parameter]:
    """The arguments after votes and activations, which are the first two arguments under any names."""
    try:
        _, _, *others = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:  # too few arguments, or a function in C
        raise UsageError(
            f"Routing {getattr(function, '__name__', function)}: its arguments cannot be read ({error}); expected "
            "votes, activations and keyword arguments."
        ) from error
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {parameter.name: parameter for parameter in others if parameter.kind not in kinds}


def _place(function: Callable[..., Routed], error: BaseException) -> str:
    """Find the last line of the function's file in the traceback of an error, as " (file, line n)"; empty if none."""
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    file = code.co_filename if code else ""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" ({Path(file).name}, line {lines[-1]})" if lines else ""
