"""Maps from the weights and outputs of a PyTorch module to the names and axes of `capsnet_torch`, in TOML."""

import itertools
import json
import math
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import einops
import numpy as np
from einops.parsing import ParsedExpression

from capsnet_jax.errors import UsageError

Shape = tuple[int, ...]
TABLES = {
    "weights": ("name", "axes", "sizes"),
    "outputs": ("from", "axes", "sizes"),
    "values": ("name", "axes", "sizes", "relu"),
}
"""The tables of a map, and the keys of an entry; a value alone, without braces, is that of the first key."""
OUTPUTS = ("poses", "activations", "reconstructions")
LABELS = ("indices", "one-hot")


@dataclass(frozen=True)
class Part:
    """A weight, output or intermediate value of a PyTorch module, and its name in `capsnet_torch`.

    Attributes:
        source: name of a weight in the module's state_dict, or of a submodule; a name with `*` for a number stands for
            all such weights, stacked along a new first axis. For an output, its index, key or attribute in what
            `forward` returns, or None if that is a single tensor.
        name: name in `capsnet_torch`.
        axes: einops pattern, "axes of the module -> axes of capsnet_torch"; empty if they are the same.
        sizes: sizes of axes in the pattern that cannot be inferred from the shapes.
        relu: apply ReLU to the value before it is compared.
        where: place in the map, for error messages.
    """

    source: Any
    name: str
    axes: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)
    relu: bool = False
    where: str = ""

    def to_twin(self, array: Any, shape: Shape) -> Any:
        """Rearrange an array or tensor of the module to the axes of `capsnet_torch`, where it has this shape.

        Raises:
            UsageError: the pattern does not give this shape.
        """
        return self._rearrange(array, self.axes, shape)

    def to_source(self, array: Any, shape: Shape) -> Any:
        """Invert `to_twin`; `shape` is the shape of the weight in the module."""
        return self._rearrange(array, " -> ".join(reversed(self.axes.split("->"))) if self.axes else "", shape)

    def fits(self, source: Shape, target: Shape) -> bool:
        """Return whether an array of the shape `source` in the module has the shape `target` in `capsnet_torch`."""
        try:
            self.to_twin(np.empty(source, bool), target)
        except UsageError:
            return False
        return True

    def _rearrange(self, array: Any, pattern: str, shape: Shape) -> Any:
        arranged, reason = array, ""
        if pattern:
            try:
                sides = [ParsedExpression(side).composition for side in pattern.split("->")]
                known = [*zip(sides[0], array.shape, strict=False), *zip(sides[1], shape, strict=False)]
                sizes = {axes[0]: size for axes, size in known if len(axes) == 1} | dict(self.sizes)
                arranged = einops.rearrange(array, pattern, **sizes)
            except einops.EinopsError as error:
                arranged, reason = None, f" ({str(error).splitlines()[-1].strip().rstrip('.')})"
        if arranged is None or tuple(arranged.shape) != shape:
            options = {"axes": self.axes} | ({"sizes": self.sizes} if self.sizes else {})
            through = f" with {to_toml(options)}" if self.axes else ""
            raise UsageError(
                f"{self.where} is {tuple(array.shape)}{through}; expected {shape}, as {self.name}{reason}."
            )
        return arranged


@dataclass(frozen=True)
class WeightMap:
    """A map from a PyTorch module to `capsnet_torch`, whose images have their channels first.

    Attributes:
        path: file of the map.
        weights: an entry for every weight of `capsnet_torch`.
        outputs: poses [b o h], activations [b o] and reconstructions [b channels height width], as far as the module
            returns them.
        values: outputs of submodules, under the names that `capsnet verify` prints.
        labels: how labels follow the images in `forward`, "indices" or "one-hot"; None if it takes no labels.
    """

    path: Path
    weights: Sequence[Part]
    outputs: Sequence[Part]
    values: Sequence[Part] = ()
    labels: str | None = None


def read_map(path: Path) -> WeightMap:
    """Read a map from a TOML file; docs/parity.md describes the format.

    Raises:
        UsageError: the file cannot be read or has a wrong entry; the message names it.
    """
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist; expected a map of weights.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not a TOML file that can be read: {error}.") from error
    _check_keys(str(path), entries, ("labels", *TABLES))
    labels = entries.get("labels")
    if labels is not None and labels not in LABELS:
        raise UsageError(f"{path}: labels is {labels!r}; expected {' or '.join(map(repr, LABELS))}.")
    tables = {name: _table(f"{path}: [{name}]", entries.get(name, {})) for name in TABLES}
    _check_keys(f"{path}: [outputs]", tables["outputs"], OUTPUTS)
    if not tables["weights"]:
        raise UsageError(f"{path} has no [weights]; expected a line for each weight of capsnet_torch.")
    if not tables["outputs"].keys() & {"poses", "activations"}:
        raise UsageError(f"{path}: [outputs] has neither poses nor activations; expected at least one of them.")
    parts = {table: [_part(path, table, *entry) for entry in tables[table].items()] for table in TABLES}
    for one, other in (pair for table in parts.values() for pair in itertools.combinations(table, 2)):
        if one.name == other.name:
            raise UsageError(f"{other.where} is {other.name!r}, as {one.source!r} is; expected each name once.")
    return WeightMap(path, **parts, labels=labels)


def patterns(shape: Shape, name: str, target: Shape, *, groups: int = 0) -> list[str]:
    """List the einops patterns that rearrange a weight or output of this shape to the target shape.

    Axes may be in any order and flattened in any way. The order of the target comes first, as "" if nothing changes.

    Args:
        shape: shape in the module.
        name: name in `capsnet_torch`.
        target: shape in `capsnet_torch`.
        groups: number of groups of input capsules, if their axis may be split as "(p g)", into positions and groups.
    """
    letters = "idoh" if name.endswith("input_caps2U.weight") else "abcdefgh"
    if groups:
        letters, target = "pgdoh", (target[0] // groups, groups, *target[1:])
    axes = ["1" if size == 1 else letter for letter, size in zip(letters, target, strict=False)]
    sizes = {axis: size for axis, size in zip(axes, target, strict=True) if axis != "1"}
    target_axes = " ".join(axes).replace("p g", "(p g)")
    found = []
    for order in itertools.permutations(sizes) if math.prod(shape) == math.prod(sizes.values()) else ():
        left, source_axes = list(order), []
        for size in shape:
            axes = []
            while left and math.prod(sizes[axis] for axis in axes) < size:
                axes.append(left.pop(0))
            if math.prod(sizes[axis] for axis in axes) != size:
                break
            source_axes.append(f"({' '.join(axes)})" if len(axes) > 1 else axes[0] if axes else "1")
        else:
            found.append("" if source_axes == target_axes.split() else f"{' '.join(source_axes)} -> {target_axes}")
    return found


def members(source: str, names: Iterable[str]) -> list[str]:
    """List the weights that the source of a line stands for, in the order of their numbers."""
    pattern = re.compile(re.escape(source).replace(r"\*", "([0-9]+)"))
    found = [(list(map(int, match.groups())), name) for name in names if (match := pattern.fullmatch(name))]
    return [name for _, name in sorted(found)]


def toml_line(key: str, **fields: Any) -> str:
    """Write an entry of a map; if only the first field is given, without braces."""
    first, *_ = fields
    given = {name: value for name, value in fields.items() if value not in (None, "", {})}
    return f"{json.dumps(key)} = {to_toml(given[first] if given.keys() == {first} else given)}"


def to_toml(value: Any) -> str:
    """Write a string, a number or an inline table in TOML."""
    if isinstance(value, Mapping):
        inside = ", ".join(f"{name} = {to_toml(each)}" for name, each in value.items())
        return f"{{ {inside} }}" if inside else "{}"
    return json.dumps(value)


def _part(path: Path, table: str, key: str, value: Any) -> Part:
    where, keys = f'{path}: [{table}] "{key}"', TABLES[table]
    fields = value if isinstance(value, dict) else {keys[0]: value}
    _check_keys(where, fields, keys)
    other, relu = fields.get(keys[0]), fields.get("relu", False)
    kinds = int | str | None if table == "outputs" else str
    if not isinstance(other, kinds) or isinstance(other, bool):
        expected = (
            "the index, key or attribute in what forward returns" if table == "outputs" else "a name in capsnet_torch"
        )
        raise UsageError(f"{where} is {value!r}; expected {expected}, alone or as `{keys[0]}` in a table.")
    if not isinstance(relu, bool):
        raise UsageError(f"{where}: relu is {relu!r}; expected true or false.")
    source, name = (other, key) if table == "outputs" else (key, str(other))
    return Part(source, name, *_axes(where, fields), relu, where)


def _axes(where: str, fields: Mapping[str, Any]) -> tuple[str, dict[str, int]]:
    pattern, sizes = fields.get("axes", ""), fields.get("sizes", {})
    if not isinstance(pattern, str) or pattern.count("->") != int("axes" in fields):
        raise UsageError(f'{where}: axes are {pattern!r}; expected an einops pattern such as "a b -> b a".')
    numbers = sizes.values() if isinstance(sizes, dict) and (pattern or not sizes) else [None]
    if not all(isinstance(size, int) and size > 0 for size in numbers):
        raise UsageError(f"{where}: sizes are {sizes!r}; expected positive sizes of axes in the pattern.")
    return pattern, sizes


def _table(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{where} is {value!r}; expected a table.")
    return value


def _check_keys(where: str, table: Collection[str], known: Collection[str]) -> None:
    unknown = [name for name in table if name not in known]
    if unknown:
        raise UsageError(f"{where} has the unknown entry {unknown[0]!r}; expected {', '.join(known)}.")
