"""Ways to make a wrong function of a right one: other functions in it, other arguments, another result, or an edit."""

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from capsnet_jax.capsules import Routed

Function = Callable[..., Any]
Mistake = Callable[[Function], Function]
"""Makes the wrong function, with the signature of the right one."""


def copied(function: Function, names: Mapping[str, Any] | None = None) -> Function:
    """The function from a second copy of its module, in which these names stand for something else.

    Args:
        function: of the top level of a module.
        names: what the copy has in place of what it defines or imports under a name; "jax.nn.softmax" is that of its
            `jax` alone.
    """
    # Found by its file, and so without the type checks that tests put into an imported module: to them, classes of the
    # copy would be those of the module.
    spec = importlib.util.spec_from_file_location(function.__module__, sys.modules[function.__module__].__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in (names or {}).items():
        _set(module, name.split("."), value)
    found: Function = getattr(module, function.__name__)
    return found


def replaced(names: Mapping[str, Any]) -> Mistake:
    """Other functions in the place of those that the right one calls by these names; see `copied`."""
    return lambda function: copied(function, names)


def given(**arguments: Any) -> Mistake:
    """The right function, which always gets these arguments, whatever it is called with."""

    def make(function: Function) -> Function:
        @functools.wraps(function)
        def wrong(*args: Any, **options: Any) -> Any:
            return function(*args, **options | arguments)

        return wrong

    return make


def without_activations(function: Function) -> Function:
    """A routing to which all input capsules are as active as can be."""

    @functools.wraps(function)
    def wrong(votes: jax.Array, activations: jax.Array, **options: Any) -> Any:
        return function(votes, jnp.ones_like(activations), **options)

    return wrong


def returning(change: Callable[[Routed, jax.Array, jax.Array], Routed]) -> Mistake:
    """What is made of the right result, the votes and the activations."""

    def make(function: Function) -> Function:
        @functools.wraps(function)
        def wrong(votes: jax.Array, activations: jax.Array, **options: Any) -> Routed:
            return change(function(votes, activations, **options), votes, activations)

        return wrong

    return make


def edited(right: str, wrong: str) -> Mistake:
    """The function of another source.

    For what nothing else reaches: one term of a sum, one of several uses of a name, or a line of a loop.

    Args:
        right: what the function's module says; it must, or there is nothing to edit.
        wrong: what to write instead, wherever it does.
    """

    def make(function: Function) -> Function:
        name, source = function.__name__, inspect.getsource(sys.modules[function.__module__])
        assert right in source, f"The source of {name} has no {right!r} any more; edit another place for this mistake."
        namespace: dict[str, Any] = {"__name__": f"mutant of {name}"}
        exec(source.replace(right, wrong), namespace)
        found: Function = namespace[name]
        return found

    return make


def _set(module: ModuleType, path: list[str], value: Any) -> None:
    name, *rest = path
    assert hasattr(module, name), f"{module.__name__} has no {name} any more; replace another function."
    if rest:
        other = ModuleType(f"mutant of {name}")
        vars(other).update(vars(getattr(module, name)))
        _set(other, rest, value)
        value = other
    setattr(module, name, value)
