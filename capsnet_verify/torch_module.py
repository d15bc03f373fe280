"""PyTorch modules of any make: found by name, watched as they run, and what they return taken apart."""

import importlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from capsnet_jax.errors import UsageError, in_words

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
LISTED = 8  # names in a message, of those that may be as many as a model has


def load_module(spec: str) -> nn.Module:
    """A module by the name of what builds it; random weights are the same in every call.

    Args:
        spec: package.module:build, a function without arguments, a class or a module itself.

    Raises:
        UsageError: it cannot be imported or raises, or what it gives is no module.
    """
    where, colon, attribute = spec.partition(":")
    if not (where and colon and attribute):
        raise UsageError(f"The torch model {spec!r} is not a name that can be found; expected package.module:build.")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            found = getattr(importlib.import_module(where), attribute)
        except Exception as error:  # whatever the user's module does when it is imported
            raise UsageError(f"The torch model {spec!r} cannot be imported: {in_words(error)}.") from error
        if not isinstance(found, nn.Module):
            if not callable(found):
                raise UsageError(f"{spec} is {type(found).__name__}; expected a function that builds a torch module.")
            try:
                found = found()
            except Exception as error:
                raise UsageError(
                    f"{spec}() raises {in_words(error)}; expected a function without arguments."
                ) from error
    if not isinstance(found, nn.Module):
        raise UsageError(f"{spec}() returns {type(found).__name__}; expected a torch module.")
    lazy = [name for name, param in found.named_parameters() if is_lazy(param)]
    if lazy:
        raise UsageError(f"{spec}: the weight {lazy[0]} has no shape yet; expected a module that was run once.")
    return found


@contextmanager
def watched(module: nn.Module, names: Collection[str]) -> Iterator[dict[str, list[Any]]]:
    """What each of these submodules returns as often as it is called, for as long as the context lasts.

    Raises:
        KeyError: there is none of this name.
    """
    seen: dict[str, list[Any]] = {name: [] for name in names}
    parts = dict(module.named_modules())

    def hook_of(name: str) -> Callable[..., None]:
        def hook(part: nn.Module, inputs: Any, output: Any) -> None:
            # A copy, as what follows may be done in place.
            seen[name].append(output.clone() if isinstance(output, Tensor) else output)

        return hook

    handles = [parts[name].register_forward_hook(hook_of(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def train_without_dropout(module: nn.Module) -> list[str]:
    """Training mode, but for dropout, whose names are returned."""
    module.train()
    dropouts = {name: part for name, part in module.named_modules() if isinstance(part, DROPOUTS)}
    for part in dropouts.values():
        part.eval()
    return list(dropouts)


def pick(where: str, returned: Any, source: int | str | None) -> Tensor:
    """The tensor at this place of what forward returned.

    Raises:
        UsageError: there is none.
    """
    try:
        if source is None:
            found = returned
        elif isinstance(returned, Tensor):  # whose item 0 would be the first example
            found = None
        elif isinstance(source, int) or isinstance(returned, Mapping):
            found = returned[source]
        else:
            found = getattr(returned, source)
    except (IndexError, KeyError, TypeError, AttributeError):
        found = None
    if not isinstance(found, Tensor):
        place = "all of what forward returns" if source is None else f"at {source!r} of what forward returns"
        raise UsageError(f"{where} is {place}, which is {described(returned)}; expected a place where a tensor is.")
    return found


def described(returned: Any) -> str:
    """What forward returned, in words."""
    if isinstance(returned, Tensor):
        return "one tensor"
    if isinstance(returned, Mapping):
        return f"a dict of {', '.join(map(str, returned))}"
    if isinstance(returned, tuple | list):
        return f"a {type(returned).__name__} of {len(returned)}"
    return type(returned).__name__


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Tensors that a forward makes of its own, such as logits of zero, are of this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def listed(names: Iterable[str]) -> str:
    """The first of these names."""
    names = list(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
