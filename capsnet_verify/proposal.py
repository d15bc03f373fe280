"""Propose a map for a PyTorch module, from names and shapes; lines that are guesses are commented out."""

import json
import re
from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

from torch import Tensor, nn

from capsnet_jax.errors import in_words
from capsnet_verify.weight_map import LABELS, Shape, patterns, toml_line

KINDS = ("weight", "bias", "running_mean", "running_var")
ALONE = "has no partner"
HEAD = """\
# Proposed from names and shapes. Check every line; comments are guesses, or have no partner.
# Shapes do not show in which order channels become capsules: axes and sizes can change the order.
{labels}: how labels follow the images, if forward takes them
[weights]  # name in your module = name in capsnet_torch"""


class Entry(NamedTuple):
    """A weight or output: its name, its shape, and whether its axes are in the order of PyTorch's own layers."""

    name: str
    shape: Shape
    standard: bool = True

    @property
    def layer(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def kind(self) -> str:
        return self.name.rpartition(".")[2]

    def axes_to(self, target: "Entry") -> list[str]:
        """List the patterns that rearrange it to the axes of the target; "" if they are the same."""
        same = self.standard and self.shape == target.shape
        return [""] if same else patterns(self.shape, target.name, target.shape)


def propose_map(module: nn.Module, shapes: Mapping[str, Shape], labels: str | None = None) -> str:
    """Propose the table [weights] of a map.

    A line is certain if the two weights fit only each other, with one order of axes. Weights of PyTorch's own layers
    only fit weights of the same kind, such as biases, and all weights of a layer belong to the same layer.

    Args:
        module: module of the user.
        shapes: shapes of the weights in the state_dict of `capsnet_torch`.
        labels: how labels must follow the images, if they must.
    """
    targets = [Entry(*item) for item in shapes.items()]
    sources = [
        Entry(name, tuple(tensor.shape), _is_standard(module, name))
        for name, tensor in module.state_dict().items()
        if tensor.is_floating_point()
    ]
    layers: list[tuple[str, str]] = []  # pairs: layer of capsnet_torch, layer of the module
    lines: dict[str, str] = {}

    def axes(source: Entry, target: Entry) -> list[str]:
        pair = (target.layer, source.layer if source.standard else None)
        apart = any(other != pair and (other[0] == pair[0] or other[1] == pair[1]) for other in layers)
        return [] if apart or (source.standard and source.kind != target.kind) else source.axes_to(target)

    guessing = False
    while True:
        fitting = {target: [source for source in sources if axes(source, target)] for target in targets}
        sure = [
            (target, found)
            for target, found in fitting.items()
            if len(found) == 1 == len(axes(found[0], target)) == sum(found[0] in others for others in fitting.values())
        ]
        guessing = guessing or not sure  # what follows a guess depends on it
        choices = [(target, found) for target, found in fitting.items() if found] if guessing else sure
        if not choices:
            break
        target, (source, *others) = choices[0]
        orders, names = axes(source, target), [other.name for other in others]
        fields = {"name": target.name, "axes": orders[0]}
        lines[target.name] = _line(source.name, fields, len(orders), names, guessing=guessing)
        targets.remove(target)
        sources.remove(source)
        layers += [(target.layer, source.layer)] if source.standard else []
    # Such as a convolution for each component of a pose.
    alike: dict[tuple[str, Shape], list[Entry]] = {}
    for source in sources:
        alike.setdefault((re.sub(r"\b[0-9]+\b", "*", source.name), source.shape), []).append(source)
    for (name, shape), several in alike.items():
        stacked = (len(several) * prod(shape[:1]), *shape[1:])
        partner = next((target for target in targets if target.shape == stacked), None)
        if partner is not None and len(several) > 1:
            rest = " a b c d"[: 2 * len(shape[1:])]
            line = toml_line(name, name=partner.name, axes=f"d g{rest} -> (g d){rest}")
            lines[partner.name] = f'# {line}  # a guess: stacked; "g d{rest}" fits as well'
            targets.remove(partner)
            sources = [source for source in sources if source not in several]
    lines |= {name: f"# {json.dumps(name)} of capsnet_torch, {shape}, {ALONE}" for name, shape, _ in targets}
    left = [f"# {json.dumps(name)} of your module, {shape}, {ALONE}" for name, shape, _ in sources]
    kind = labels or "one-hot"
    entry = f'{"" if labels else "# "}labels = "{kind}"  # or "{LABELS[kind == LABELS[0]]}"'
    return "\n".join([HEAD.format(labels=entry), *(lines[name] for name in shapes), *left, ""])


def propose_outputs(returned: Any, shapes: Mapping[str, Shape]) -> str:
    """Propose the table [outputs] of a map.

    Args:
        returned: what `forward` returned for a batch of images, or the exception that it raised.
        shapes: shapes of the outputs of `capsnet_torch` for this batch.
    """
    lines = ["[outputs]  # output = index of a tuple, key of a dict or attribute; {} for a single tensor"]
    if isinstance(returned, BaseException):
        lines.append(f"# forward(images) raises {in_words(returned)}")
    for name, shape in shapes.items():
        found = {
            source: axes
            for source, tensor in tensors_in(returned).items()
            if (axes := Entry("", tuple(tensor.shape)).axes_to(Entry(name, shape)))
        }
        if found:
            (source, axes), *others = found.items()
            lines.append(_line(name, {"from": source, "axes": axes[0]}, len(axes), [other for other, _ in others]))
        else:
            lines.append(f"# {name} = ?  # nothing is {shape}")
    return "\n".join([*lines, ""])


def tensors_in(returned: Any) -> dict[Any, Tensor]:
    """Collect the tensors that `forward` returned, by index, key or attribute; by None for a single tensor."""
    if isinstance(returned, Tensor):
        found: Mapping[Any, Any] = {None: returned}
    elif isinstance(returned, Mapping):
        found = returned
    elif isinstance(returned, tuple | list):
        found = dict(enumerate(returned))
    else:
        found = getattr(returned, "__dict__", {})
    return {source: value for source, value in found.items() if isinstance(value, Tensor)}


def _is_standard(module: nn.Module, name: str) -> bool:
    layer, _, kind = name.rpartition(".")
    return kind in KINDS and type(module.get_submodule(layer)).__module__.startswith("torch.nn.")


def _line(key: str, fields: Mapping[str, Any], orders: int, others: list[Any], *, guessing: bool = False) -> str:
    """Write a line of the map. If other names or orders of axes fit, too, it is a comment with the reason."""
    doubts = [f"{', '.join(map(json.dumps, others))} {'fits' if len(others) == 1 else 'fit'} as well"] if others else []
    doubts += [f"{orders} orders of axes fit"] if orders > 1 else []
    line = toml_line(key, **fields)
    return f"# {line}  # a guess: {'; '.join(doubts) or 'by what is left'}" if doubts or guessing else line
