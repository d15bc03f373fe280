"""From the name of a routing to what a layer calls: options bound, weights known, results checked, errors named."""

import functools
import importlib
import inspect
import math
import traceback
import typing
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

ROUTINGS: dict[str, Callable[..., Routed]] = {
    "dynamic": dynamic,
    "em": em,
    "variational": variational,
    "self_attention": self_attention,
    "inverted_attention": inverted_attention,
    "self_routing": self_routing,
    "kmeans": kmeans,
    "uniform": uniform,
    "random": random,
}
OPTION_TYPES = (bool, int, float, str)


class Weight(NamedTuple):
    """A weight that a routing learns: its axes, as letters i, o, d and h, and the constant it starts from."""

    axes: tuple[str, ...]
    initial: float


@dataclass(frozen=True)
class Routing:
    """A routing algorithm as a layer calls it, for one example. Equal routings are equal, and hash alike.

    A layer gives a routing the votes and activations, and what else it has an argument for:

    - `poses`: those of the input capsules, `[i d]`;
    - `num_iterations`;
    - the weights that it declares by `learns`;
    - `softmax`: the softmax over all parents of an input capsule, from `[positions i o]` to the same. A convolutional
      layer calls a routing with this argument once, with votes `[positions i o h]`; one without, for each position.

    All other keyword arguments are options, which the user may set.

    Attributes:
        name: that of the algorithm, without options, for messages.
        function: the algorithm.
        options: keyword arguments that are bound.
    """

    name: str
    function: Callable[..., Routed]
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(
        self, votes: Float[Array, "*positions i o h"], activations: Float[Array, "*positions i"], **given: Any
    ) -> Routed:
        """The output capsules of one example.

        Args:
            votes: what each input capsule predicts for each output capsule.
            activations: those of the input capsules.
            given: weights, and poses and softmax, which are passed on if the routing has an argument for them.

        Raises:
            UsageError: the function raises an error, which is the cause of this one; or the result is not a `Routed`
                of the right shapes.
        """
        given = {name: value for name, value in given.items() if self.takes(name)}
        try:
            routed = self.function(votes, activations, **(dict(self.options) | given))
        except (UsageError, jax.errors.JaxRuntimeError, Warning):
            raise  # in words already; an error of the device, such as too little memory; or a warning made an error
        except Exception as error:  # the user's function may raise anything
            place = _place(self.function, error)
            raise UsageError(f"Routing {self.name} raises {in_words(error)}{place}.") from error
        if not isinstance(routed, Routed):
            raise UsageError(
                f"Routing {self.name} returned {type(routed).__name__}; expected Routed(poses, activations, couplings)."
            )
        *positions, inputs, outputs, size = votes.shape
        expected = {
            "poses": (*positions, outputs, size),
            "activations": (*positions, outputs),
            "couplings": (*positions, inputs, outputs),
        }
        for field, shape in expected.items():
            array = getattr(routed, field)
            if not isinstance(array, jax.Array) or array.shape != shape:
                got = array.shape if isinstance(array, jax.Array) else f"of type {type(array).__name__}"
                raise UsageError(
                    f"Routing {self.name}: {field} are {got}; expected {shape} from votes of shape {votes.shape}."
                )
        return routed

    def takes(self, argument: str) -> bool:
        """Whether the function has an argument of this name."""
        return argument in _parameters(self.function)

    @property
    def weights(self) -> dict[str, Weight]:
        """The weights to be learned; those that start from None are not there."""
        defaults = {name: parameter.default for name, parameter in _parameters(self.function).items()}
        initial = defaults | dict(self.options)
        axes = learned_axes(self.function)
        return {name: Weight(axes[name], initial[name]) for name in axes if initial[name] is not None}


def get_routing(routing: str | Callable[..., Routed] | Routing, *, num_iterations: int = 3) -> Routing:
    """The routing of a name, with its options bound.

    Args:
        routing: a name in `ROUTINGS`, the user's own as `package.module:function`, or the function itself. Options
            follow a name after commas: "dynamic,leaky=true,capsule_bias=0.1"; those of a function are bound by
            `functools.partial`.
        num_iterations: passed to functions that take an argument of this name, unless it is among the options.

    Raises:
        UsageError: the name is unknown, cannot be imported or is not callable, or has no such option.
    """
    if isinstance(routing, Routing):
        return routing
    options: dict[str, Any] = {}
    if isinstance(routing, str):
        name, *settings = routing.split(",")
        function = _find(name)
        options = _options(name, function, settings)
    else:
        function = routing
        if isinstance(routing, functools.partial):
            function, options = routing.func, dict(routing.keywords)
            unknown = [name for name in options if name not in _parameters(function)]
            if unknown or routing.args:
                raise UsageError(
                    f"Routing {routing} binds {[*routing.args, *unknown]}; expected keywords among "
                    f"{describe_options(function)}."
                )
        name = getattr(function, "__name__", str(function))
        _check_callable(name, function)
    parameters = _parameters(function)
    if "num_iterations" in parameters:
        options = {"num_iterations": num_iterations} | options
        if options["num_iterations"] < 1:
            raise UsageError(f"Routing {name}: num_iterations is {options['num_iterations']}, and must be at least 1.")
    return Routing(name, function, tuple(sorted(options.items())))


def describe_options(function: Callable[..., Routed]) -> str:
    """The options of a routing with types and defaults, for help and messages."""
    described = []
    for name, parameter in _parameters(function).items():
        if name not in GIVEN or name == "num_iterations":
            learned = ", learned" if name in learned_axes(function) else ""
            described.append(f"{name} ({_option_type(function, parameter).__name__}, {parameter.default}{learned})")
    return ", ".join(described) or "none"


def _find(name: str) -> Callable[..., Routed]:
    if name in ROUTINGS:
        return ROUTINGS[name]
    module, _, function = name.partition(":")
    if not function:
        raise UsageError(
            f"Unknown routing {name!r}; expected {', '.join(ROUTINGS)} or your own as package.module:function."
        )
    try:
        found = getattr(importlib.import_module(module), function)
    except UsageError:  # of `learns`, in words already
        raise
    except Exception as error:  # whatever the user's module does when it is imported
        raise UsageError(f"Routing {name!r} cannot be imported: {in_words(error)}.") from error
    _check_callable(name, found)
    return typing.cast(Callable[..., Routed], found)


def _check_callable(name: str, function: object) -> None:
    if not callable(function):
        kind = type(function).__name__
        raise UsageError(f"Routing {name!r} is of type {kind}; expected a function of votes and activations.")


def _options(name: str, function: Callable[..., Routed], settings: list[str]) -> dict[str, Any]:
    options = {}
    for setting in settings:
        option, _, text = (part.strip() for part in setting.partition("="))
        parameter = _parameters(function).get(option)
        if parameter is None or (option in GIVEN and option != "num_iterations"):
            raise UsageError(f"Routing {name} has no option {option!r}; expected {describe_options(function)}.")
        if option in options:
            raise UsageError(f"Routing {name}: {option} is given twice.")
        options[option] = _value(name, function, parameter, text)
    return options


def _value(
    name: str, function: Callable[..., Routed], parameter: inspect.Parameter, text: str
) -> bool | int | float | str:
    kind = _option_type(function, parameter)
    try:
        value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError
        return typing.cast(bool | int | float | str, value)
    except (KeyError, ValueError) as error:
        expected = "true or false" if kind is bool else "a finite number" if kind is float else kind.__name__
        raise UsageError(f"Routing {name}: {parameter.name} is {text!r}; expected {expected}.") from error


def _option_type(function: Callable[..., Routed], parameter: inspect.Parameter) -> type:
    """What an option is written as; a weight is written as the number that it starts from."""
    if parameter.name in learned_axes(function):
        return float
    for kind in (parameter.annotation, *typing.get_args(parameter.annotation)):  # int, and the int of int | None
        if kind in OPTION_TYPES:
            return typing.cast(type, kind)
    return type(parameter.default) if type(parameter.default) in OPTION_TYPES else str


@functools.cache
def _parameters(function: Callable[..., Routed]) -> dict[str, inspect.Parameter]:
    """The arguments after votes and activations, which come first whatever they are called."""
    try:
        _, _, *others = inspect.signature(function, eval_str=True).parameters.values()
    except Exception as error:  # too few arguments, a function in C, or annotations that only type checkers know
        raise UsageError(
            f"Routing {getattr(function, '__name__', function)}: its arguments cannot be told ({error}); expected "
            "votes, activations and keyword arguments, with annotations of what is imported."
        ) from error
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {parameter.name: parameter for parameter in others if parameter.kind not in kinds}


def _place(function: Callable[..., Routed], error: Exception) -> str:
    """The last line of the function's file that an error passed through, as " (file, line n)"; empty if none."""
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    file = code.co_filename if code else ""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" ({Path(file).name}, line {lines[-1]})" if lines else ""
