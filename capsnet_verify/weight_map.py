"""Which weight, output and intermediate of another model is which of ours: a table in TOML, without guesses."""

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import einops
from einops.parsing import ParsedExpression

from capsnet_jax.errors import UsageError

TABLES = ("labels", "weights", "outputs", "values")
OUTPUTS = ("poses", "activations", "reconstructions")
LABELS = ("indices", "one-hot")


@dataclass(frozen=True)
class Axes:
    """How axes of theirs become those of ours.

    Attributes:
        pattern: of einops, theirs -> ours; None if they are the same.
        sizes: of axes in the pattern that shapes do not tell.
    """

    pattern: str | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        sizes = f" with {', '.join(f'{name} = {size}' for name, size in self.sizes.items())}" if self.sizes else ""
        return f'"{self.pattern}"{sizes}'

    def to_ours(self, name: str, array: Any, shape: tuple[int, ...]) -> Any:
        """An array or tensor of theirs, arranged as ours are.

        Args:
            name: of theirs, for the message.
            array: what it is.
            shape: of ours.

        Raises:
            UsageError: it cannot be arranged into this shape.
        """
        if self.pattern is None:
            arranged = array
        else:
            _, _, ours = self.pattern.partition("->")
            parsed = zip(ParsedExpression(ours).composition, shape, strict=False)
            sizes = {axes[0]: size for axes, size in parsed if len(axes) == 1} | dict(self.sizes)
            try:
                arranged = einops.rearrange(array, self.pattern, **sizes)
            except einops.EinopsError as error:
                raise UsageError(
                    f"{name} is {tuple(array.shape)}, which {self} does not make {shape}, the shape of ours."
                ) from error
        if tuple(arranged.shape) != shape:
            given = f", arranged by {self}" if self.pattern else ""
            raise UsageError(f"{name} is {tuple(arranged.shape)}{given}; ours is {shape}.")
        return arranged


@dataclass(frozen=True)
class Counterpart:
    """What of ours a weight or submodule of theirs is.

    Attributes:
        name: of ours.
        axes: of theirs -> ours.
        relu: whether a ReLU follows before it is what ours is.
    """

    name: str
    axes: Axes = field(default_factory=Axes)
    relu: bool = False


@dataclass(frozen=True)
class Output:
    """Where in the output of their model one of ours is.

    Attributes:
        source: index of a tuple, key of a dict or name of an attribute; None if the output is that tensor itself.
        axes: of theirs -> ours.
    """

    source: int | str | None = None
    axes: Axes = field(default_factory=Axes)


@dataclass(frozen=True)
class WeightMap:
    """All of the table; whatever is ours is named and shaped as in the twin, channels first.

    Attributes:
        path: of the file.
        weights: of each parameter or buffer in their state_dict that is compared, what it is of ours.
        outputs: of poses [b o h], activations [b o] and reconstructions [b c h w], where they are.
        values: of each submodule whose output is compared, what it is of ours; names are those of a verification.
        labels: how labels are passed to their forward, after the images: "indices" or "one-hot"; None if they are not.
    """

    path: Path
    weights: Mapping[str, Counterpart]
    outputs: Mapping[str, Output]
    values: Mapping[str, Counterpart] = field(default_factory=dict)
    labels: str | None = None


def read_map(path: Path) -> WeightMap:
    """The table in a file, which docs/parity.md describes.

    Raises:
        UsageError: the file cannot be read, or something in it is not as it should be; the message names it.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist; expected a map of weights.") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path} is not a TOML file that can be read: {error}.") from error
    _check_keys(str(path), tables, TABLES)
    labels = tables.get("labels")
    if labels is not None and labels not in LABELS:
        raise UsageError(f"{path}: labels is {labels!r}; expected {' or '.join(map(repr, LABELS))}.")
    table = {name: _table(f"{path}: [{name}]", tables.get(name, {})) for name in TABLES[1:]}
    _check_keys(f"{path}: [outputs]", table["outputs"], OUTPUTS)
    if not table["weights"]:
        raise UsageError(f"{path} has no [weights]; expected a line for each weight of ours.")
    if not table["outputs"].keys() & {"poses", "activations"}:
        raise UsageError(f"{path}: [outputs] has neither poses nor activations; expected at least one of them.")
    return WeightMap(
        path,
        _counterparts(f"{path}: [weights]", table["weights"], ("name", "axes", "sizes")),
        {name: _output(f'{path}: [outputs] "{name}"', value) for name, value in table["outputs"].items()},
        _counterparts(f"{path}: [values]", table["values"], ("name", "axes", "sizes", "relu")),
        labels,
    )


def _counterparts(where: str, table: dict[str, Any], keys: Collection[str]) -> dict[str, Counterpart]:
    found = {theirs: _counterpart(f'{where} "{theirs}"', value, keys) for theirs, value in table.items()}
    theirs_of: dict[str, str] = {}
    for theirs, counterpart in found.items():
        if counterpart.name in theirs_of:
            both = f'"{theirs_of[counterpart.name]}" and "{theirs}"'
            raise UsageError(f'{where} has "{counterpart.name}" of ours twice, for {both}; expected it once.')
        theirs_of[counterpart.name] = theirs
    return found


def _counterpart(where: str, value: Any, keys: Collection[str]) -> Counterpart:
    if isinstance(value, str):
        return Counterpart(value)
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise UsageError(f"{where} is {value!r}; expected a name of ours, or a table with a name.")
    _check_keys(where, value, keys)
    relu = value.get("relu", False)
    if not isinstance(relu, bool):
        raise UsageError(f"{where}: relu is {relu!r}; expected true or false.")
    return Counterpart(value["name"], _axes(where, value), relu)


def _output(where: str, value: Any) -> Output:
    fields = value if isinstance(value, dict) else {"from": value}
    _check_keys(where, fields, ("from", "axes", "sizes"))
    source = fields.get("from")
    if not isinstance(source, int | str | None) or isinstance(source, bool):
        raise UsageError(f"{where} is {source!r}; expected the index in a tuple, the key of a dict or an attribute.")
    return Output(source, _axes(where, fields))


def _axes(where: str, fields: dict[str, Any]) -> Axes:
    pattern, sizes = fields.get("axes"), _table(f"{where}: sizes", fields.get("sizes", {}))
    if pattern is None:
        if sizes:
            raise UsageError(f"{where} has sizes and no axes; expected both or neither.")
        return Axes()
    if not isinstance(pattern, str) or pattern.count("->") != 1:
        raise UsageError(f'{where}: axes are {pattern!r}; expected theirs and ours, as "a b -> b a".')
    try:
        theirs, ours = (ParsedExpression(side) for side in pattern.split("->"))
    except einops.EinopsError as error:
        raise UsageError(f'{where}: axes are "{pattern}", which einops cannot read: {error}.') from error
    if theirs.identifiers != ours.identifiers or any(
        side.has_ellipsis or side.has_non_unitary_anonymous_axes for side in (theirs, ours)
    ):
        raise UsageError(f'{where}: axes are "{pattern}"; expected the same names on both sides, and no number but 1.')
    for name, size in sizes.items():
        if name not in theirs.identifiers or not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UsageError(f'{where}: sizes has {name} = {size!r}; expected positive sizes of axes in "{pattern}".')
    return Axes(pattern, sizes)


def _table(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{where} is {value!r}; expected a table.")
    return value


def _check_keys(where: str, table: Collection[str], known: Collection[str]) -> None:
    unknown = [name for name in table if name not in known]
    if unknown:
        raise UsageError(f"{where} has the unknown entry {unknown[0]!r}; expected {', '.join(known)}.")
