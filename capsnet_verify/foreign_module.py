"""Run any PyTorch module on the weights of a JAX model, and return its values under the names of `capsnet_torch`."""

import importlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from capsnet_jax.errors import UsageError, in_words
from capsnet_jax.interchange.weights import StateDict, to_torch
from capsnet_torch.ops import is_label
from capsnet_verify.pair import Pair
from capsnet_verify.proposal import tensors_in
from capsnet_verify.weight_map import OUTPUTS, Part, Shape, WeightMap, members, to_toml

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
LISTED = 8  # largest number of names in a message


def load_module(spec: str) -> nn.Module:
    """Build the module that `package.module:build` names; random weights are the same in every call.

    Args:
        spec: name of a function without arguments, of a class, or of a module itself.

    Raises:
        UsageError: it cannot be imported, raises, or is not a module.
    """
    with torch.random.fork_rng(), WithoutCuda():
        torch.manual_seed(0)
        module = import_by_name("model", spec)
        if not isinstance(module, nn.Module):
            try:
                module = module()
            except (Exception, SystemExit) as error:  # the user's code may raise anything
                raise UsageError(
                    f"{spec}() raises {in_words(error)}; expected a function without arguments that builds a module."
                ) from error
    if not isinstance(module, nn.Module):
        raise UsageError(f"{spec}() returns {type(module).__name__}; expected a torch module.")
    lazy = [name for name, param in module.named_parameters() if is_lazy(param)]
    if lazy:
        raise UsageError(f"{spec}: the weight {lazy[0]} has no shape yet; expected a module that was run once.")
    return module


def import_by_name(kind: str, spec: str) -> Any:
    """Import `package.module:attribute`; `kind` says what it should be, for the message.

    Raises:
        UsageError: the name has no colon or cannot be imported.
    """
    module, _, attribute = spec.partition(":")
    if not (module and attribute):
        raise UsageError(f"The torch {kind} {spec!r} has no colon; expected package.module:{kind}.")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # whatever the user's module does when it is imported
        raise UsageError(f"The torch {kind} {spec!r} cannot be imported: {in_words(error)}.") from error


class WithoutCuda(TorchFunctionMode):
    """Context in which `.cuda()` and the device "cuda" mean the CPU, because public models often name them."""

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function == Tensor.cuda:
            return args[0]
        named = {name: _on_cpu(value) for name, value in (kwargs or {}).items()}
        return function(*map(_on_cpu, args), **named)


def run(module: nn.Module, inputs: Sequence[Tensor], weights: Mapping[str, Tensor]) -> Any:
    """Call a module with other weights; tensors that `forward` creates get dtype and device of the images."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(inputs[0].dtype)
    try:
        with nullcontext() if inputs[0].is_cuda else WithoutCuda():
            return functional_call(module, dict(weights), tuple(inputs))
    finally:
        torch.set_default_dtype(before)


def named_inputs(images: Tensor, labels: Tensor, kind: str | None, num_classes: int) -> dict[str, Tensor]:
    """Return what `forward` takes: images and, if the kind is "indices" or "one-hot", labels."""
    if kind is None:
        return {"images": images}
    if kind == "one-hot":
        labels = is_label(labels, num_classes).to(images.dtype)
    return {"images": images, "labels": labels}


class ForeignModule:
    """A PyTorch module on one batch, with a map from its weights and outputs to those of a JAX model.

    Args:
        module: its dtype, device and mode are changed.
        weight_map: map of its weights and outputs.
        pair: the JAX model and the batch.
        values: shapes of the outputs and intermediate values of the JAX model, channels first.

    Raises:
        UsageError: the map does not fit the module or the JAX model.

    Attributes:
        labels: class indices.
        notes: sentences for the report: what was not compared, and in which mode the module ran.
    """

    def __init__(self, module: nn.Module, weight_map: WeightMap, pair: Pair, values: Mapping[str, Shape]):
        self.images, self.labels = pair.torch_batch
        self.config = pair.jax_model.config
        self.module, self.map, self.values = module.to(self.images), weight_map, values
        self.weights = weights = {name: array.shape for name, array in to_torch(pair.jax_model).items()}
        state = module.state_dict(keep_vars=True)
        self.entries = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
        self.members = {part.source: members(part.source, self.entries) for part in weight_map.weights}
        for part in weight_map.weights:
            tensors = [self.entries[name] for name in self.members[part.source]]
            if len({tensor.shape for tensor in tensors}) > 1:
                raise UsageError(f"{part.where} has weights of several shapes; expected one shape to stack.")
            if "*" in part.source and tensors:
                self.entries[part.source] = torch.stack(tensors)
        submodules = [name for name, _ in module.named_modules() if name]
        others = [name for name in values if name not in OUTPUTS]
        without = "" if "reconstructions" in values else " (without a decoder, as [outputs] lacks reconstructions)"
        for parts, entries, names in (
            (weight_map.weights, self.entries, weights),
            (weight_map.values, submodules, others),
        ):
            for part in parts:
                if part.source not in entries:
                    raise UsageError(f"{part.where} is not in the torch model; it has {listed(entries)}.")
                if part.name not in names:
                    has = f"the JAX model{without} has {listed(names)}"
                    raise UsageError(f"{part.where} is {part.name!r}; {has}.")
        mapped = {part.name for part in weight_map.weights}
        used = {*itertools.chain(*self.members.values(), self.members)}
        missing = [name for name in weights if name not in mapped]
        if missing:
            raise UsageError(
                f"{weight_map.path}: [weights] lacks {listed(missing)} of the JAX model; expected all of its weights."
            )
        unused = [name for name in self.entries if name not in used]
        self.notes = [f"Not in the map, and so not compared by themselves: {', '.join(unused)}."] if unused else []

    def state(self) -> StateDict:
        """Copy the weights of the module, under the names and with the axes of `capsnet_torch`."""
        return {
            part.name: np.array(part.to_twin(self.entries[part.source].numpy(force=True), self.weights[part.name]))
            for part in self.map.weights
        }

    def settle(self, weights: Mapping[str, Tensor]) -> None:
        """Set training mode without dropout; or evaluation mode, if outputs are still random.

        Raises:
            UsageError: they are random in evaluation mode, too.
        """
        self.module.train()
        dropouts = {name: part for name, part in self.module.named_modules() if isinstance(part, DROPOUTS)}
        for part in dropouts.values():
            part.eval()
        if dropouts:
            self.notes.append(f"The torch model ran in training mode, but for its dropout ({', '.join(dropouts)}).")
        if self._is_random(weights):
            self.module.eval()
            self.notes.append("The torch model ran in evaluation mode, as its outputs are random in training mode.")
            if self._is_random(weights):
                raise UsageError("The outputs of the torch model are random; expected the same for the same images.")

    def _is_random(self, weights: Mapping[str, Tensor]) -> bool:
        first, second = (self.call(weights) for _ in range(2))
        return not all(torch.allclose(first[name], second[name], equal_nan=True) for name in first)

    def call(self, weights: Mapping[str, Tensor], parts: Sequence[Part] | None = None) -> dict[str, Tensor]:
        """Call the module with weights of the JAX model, and return the outputs and intermediate values in the map.

        Args:
            weights: weights under the names of `capsnet_torch`.
            parts: entries for weights to use instead of those in the map.

        Raises:
            UsageError: the module raises, or does not return or call what is in the map.
        """
        sources: dict[str, Tensor] = {}
        for part in self.map.weights if parts is None else parts:
            entry = self.entries[part.source]
            weight = part.to_source(weights[part.name], tuple(entry.shape)).clone()  # running means change in place
            weight = weight if entry.requires_grad else weight.detach()
            sources |= dict(zip(self.members[part.source], weight if "*" in part.source else [weight], strict=True))
        inputs = named_inputs(self.images, self.labels, self.map.labels, self.config.num_classes)
        seen: dict[str, list[Any]] = {part.source: [] for part in self.map.values}
        with ExitStack() as hooks:
            for name, calls in seen.items():
                hooks.enter_context(self.module.get_submodule(name).register_forward_hook(partial(_record, calls)))
            try:
                returned = run(self.module, [*inputs.values()], sources)
            except (Exception, SystemExit) as error:  # the user's code may raise anything
                shown = " and ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.items())
                lacks = isinstance(error, TypeError) and "missing" in str(error) and self.map.labels is None
                hint = '; if that is the label, the map needs labels = "one-hot" or labels = "indices"' if lacks else ""
                raise UsageError(f"The torch model, called with {shown}, raises {in_words(error)}{hint}.") from error
        values = {}
        for part in self.map.outputs:
            values[part.name] = part.to_twin(pick(part, returned), self.values[part.name])
        for part in self.map.values:
            calls = seen[part.source]
            if len(calls) != 1 or not isinstance(calls[0], Tensor):
                got = f"returns {type(calls[0]).__name__}" if len(calls) == 1 else f"ran {len(calls)} times in one call"
                raise UsageError(f"{part.where} {got}; expected a submodule that runs once and returns a tensor.")
            value = part.to_twin(calls[0], self.values[part.name])
            values[part.name] = torch.relu(value) if part.relu else value
        return values


def pick(part: Part, returned: Any) -> Tensor:
    """Find an output of the map in what `forward` returned.

    Raises:
        UsageError: there is no tensor at this place.
    """
    found, source = returned, part.source
    if source is not None:
        by_item = isinstance(source, int) or isinstance(returned, Mapping)
        try:
            found = returned[source] if by_item else getattr(returned, source)
        except (IndexError, KeyError, TypeError, AttributeError):
            found = None
    if not isinstance(found, Tensor) or (found is not returned and isinstance(returned, Tensor)):
        places = " or ".join(to_toml({} if place is None else place) for place in tensors_in(returned)) or "a tensor"
        raise UsageError(f"{part.where} is {to_toml(source)}, where forward returns no tensor; expected {places}.")
    return found


def listed(names: Iterable[str]) -> str:
    """Join the first of these names."""
    names = list(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _on_cpu(value: Any) -> Any:
    return "cpu" if isinstance(value, str | torch.device) and re.fullmatch(r"cuda(:\d+)?", str(value)) else value


def _record(calls: list[Any], module: nn.Module, inputs: Any, output: Any) -> None:
    calls.append(output.clone() if isinstance(output, Tensor) else output)  # what follows may work in place
