"""A weight map proposed from names and shapes, to be looked through; what is a guess stays a comment."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped
from torch import Tensor, nn

from capsnet_jax.errors import in_words

Shape = tuple[int, ...]
KINDS = ("weight", "bias", "running_mean", "running_var")
LETTERS = "abcdefgh"
CAPSULES = ("input_caps2U.weight", "idoh")  # a weight of which each axis has a name
HEAD = """\
# Proposed from names and shapes. Look through every line; comments are guesses, or what has no partner.
# No shape tells in which order channels become capsules: axes and sizes can bring one order into the other.
# labels = "one-hot"  # or "indices": how labels follow the images, if forward takes them
"""


class Entry(NamedTuple):
    """A weight or an output.

    Attributes:
        name: in a state_dict, or where in the output.
        shape: of the array.
        known: whether its name and axes mean what they mean in ours, as in a layer of PyTorch's own.
    """

    name: str
    shape: Shape
    known: bool = True

    @property
    def sizes(self) -> Shape:
        """Without axes of size 1."""
        return tuple(size for size in self.shape if size != 1)

    @property
    def owner(self) -> str:
        """The layer that it belongs to."""
        return self.name.rpartition(".")[0]

    @property
    def kind(self) -> str:
        """What it is in that layer."""
        return self.name.rpartition(".")[2]


def propose_map(module: nn.Module, state_of_ours: Mapping[str, Shaped[np.ndarray, "..."]]) -> str:
    """The table [weights] of a map, in TOML.

    A line is written out only if one weight alone has its sizes, in one order of the axes alone, or if it belongs to
    the same layer of PyTorch's own as one of which that is true; anything else is a comment that says why.

    Args:
        module: theirs.
        state_of_ours: arrays under the names of the twin's state_dict.
    """
    ours = [Entry(name, tuple(array.shape)) for name, array in state_of_ours.items()]
    theirs = [
        Entry(name, tuple(tensor.shape), _is_known(module, name))
        for name, tensor in module.state_dict().items()
        if tensor.is_floating_point()
    ]
    lines: dict[str, str] = {}
    partners: dict[str, str] = {}  # of layers: ours, theirs

    def candidates(of: Entry) -> list[Entry]:
        return [entry for entry in theirs if _fit(entry, of, partners)]

    def settle(of: Entry, entry: Entry, why: str) -> None:
        lines[of.name] = _line(entry, of, why)
        ours.remove(of)
        theirs.remove(entry)
        if entry.known:
            partners[of.owner] = entry.owner

    names = [entry.name for entry in ours]
    while True:
        alone = [(of, found[0]) for of in ours if len(found := candidates(of)) == 1]
        mutual = [
            (of, entry)
            for of, entry in alone
            if sum(_fit(entry, other, partners) for other in ours) == 1 and _arrangements(entry, of, flattened=False)
        ]
        if not mutual:
            break
        settle(*mutual[0], _doubt(mutual[0][1], mutual[0][0]))
    while guesses := [(of, found) for of in ours if (found := candidates(of))]:
        of, (entry, *others) = guesses[0]
        alike = f"as well as {', '.join(other.name for other in others)}" if others else "by what is left"
        settle(of, entry, _doubt(entry, of) or f"a guess, by order and sizes, {alike}")
    for entry in ours:
        lines[entry.name] = f"# {json.dumps(entry.name)} of ours, {entry.shape}, has no partner"
    rest = [f"# {json.dumps(entry.name)} of theirs, {entry.shape}, has no partner" for entry in theirs]
    return "\n".join([HEAD + "[weights]  # theirs = ours", *(lines[name] for name in names), *rest, ""])


def propose_outputs(returned: Any, shapes: Mapping[str, Shape]) -> str:
    """The table [outputs] of a map, in TOML.

    Args:
        returned: what forward returned for a batch of images, or the exception that it raised.
        shapes: of our outputs for this batch.
    """
    lines = ["[outputs]  # ours = index of a tuple, key of a dict or attribute; {} for a single tensor"]
    if isinstance(returned, Exception):
        lines.append(f"# forward(images) raises {in_words(returned)}")
    places = {} if isinstance(returned, Exception) else _places(returned)
    for name, shape in shapes.items():
        of = Entry(name, shape)
        found = [(source, entry) for source, entry in places.items() if _arrangements(entry, of)]
        if not found:
            lines.append(f"# {name} = ?  # nothing is {shape}")
            continue
        source, entry = found[0]
        why = _doubt(entry, of)
        if len(found) > 1:
            why = f"a guess, as well as {', '.join(json.dumps(other) for other, _ in found[1:])}"
        fields = {} if source is None else {"from": source}
        axes = _arrangements(entry, of)[0]
        lines.append(_comment_if(why, f"{name} = {_value(fields, axes, 'from')}"))
    return "\n".join([*lines, ""])


def _is_known(module: nn.Module, name: str) -> bool:
    owner, _, kind = name.rpartition(".")
    return kind in KINDS and type(module.get_submodule(owner)).__module__.startswith("torch.nn.")


def _fit(entry: Entry, of: Entry, partners: Mapping[str, str]) -> bool:
    if entry.known:
        if entry.kind != of.kind:
            return False
        if (of.owner in partners or entry.owner in partners.values()) and partners.get(of.owner) != entry.owner:
            return False
    elif of.owner in partners:
        return False
    return bool(_arrangements(entry, of))


def _arrangements(entry: Entry, of: Entry, *, flattened: bool = True) -> list[str]:
    """Each pattern of einops that makes the one shape of the other, an empty one if they are the same.

    Args:
        entry: theirs.
        of: ours.
        flattened: look for axes of ours that are one of theirs, too, if there is nothing else.
    """
    if entry.shape == of.shape and entry.known:
        return [""]
    suffix, letters = CAPSULES
    names = letters if of.name.endswith(suffix) and len(of.sizes) == len(letters) else LETTERS
    axes = list(zip(names, of.sizes, strict=False))
    found = list(_patterns(entry, of, [[axis] for axis in axes]))
    if not found and flattened:
        for runs in _runs(axes):
            found += _patterns(entry, of, runs)
    return found


def _patterns(entry: Entry, of: Entry, runs: Sequence[Sequence[tuple[str, int]]]) -> Iterator[str]:
    """Patterns in which each axis of theirs is one of these runs of axes of ours."""
    names = iter("".join(name for run in runs for name, _ in run))
    ours = " ".join("1" if size == 1 else next(names) for size in of.shape)
    for order in itertools.permutations(runs):
        if tuple(int(np.prod([size for _, size in run])) for run in order) == entry.sizes:
            tokens = (" ".join(name for name, _ in run) for run in order)
            groups = iter([f"({token})" if " " in token else token for token in tokens])
            theirs = " ".join("1" if size == 1 else next(groups) for size in entry.shape)
            yield "" if theirs == ours else f"{theirs} -> {ours}"


def _runs(axes: Sequence[tuple[str, int]]) -> Iterator[list[Sequence[tuple[str, int]]]]:
    """Each way to cut the axes into runs of which one at least has several."""
    for number in range(1, len(axes)):
        for cuts in itertools.combinations(range(1, len(axes)), number - 1):
            yield [axes[start:end] for start, end in itertools.pairwise((0, *cuts, len(axes)))]


def _doubt(entry: Entry, of: Entry) -> str:
    """Why the axes are a guess; empty if they are not."""
    plain = _arrangements(entry, of, flattened=False)
    if not plain:
        return "a guess, as axes are flattened, perhaps in another order"
    return "a guess, as axes of one size may be transposed" if len(plain) > 1 else ""


def _line(entry: Entry, of: Entry, why: str) -> str:
    axes = _arrangements(entry, of)[0]
    return _comment_if(why, f"{json.dumps(entry.name)} = {_value({'name': of.name}, axes, 'name')}")


def _value(fields: Mapping[str, Any], axes: str, only: str) -> str:
    """A table in one line, or what is in it if that is one entry of this name."""
    given = dict(fields) | ({"axes": axes} if axes else {})
    if given.keys() == {only}:
        return json.dumps(given[only])
    inside = ", ".join(f"{name} = {json.dumps(value)}" for name, value in given.items())
    return f"{{ {inside} }}" if inside else "{}"


def _comment_if(why: str, line: str) -> str:
    return f"# {line}  # {why}" if why else line


def _places(returned: Any) -> dict[int | str | None, Entry]:
    """Where in the output there are tensors."""
    if isinstance(returned, Tensor):
        found: dict[Any, Any] = {None: returned}
    elif isinstance(returned, Mapping):
        found = dict(returned)
    elif isinstance(returned, tuple | list):
        found = dict(enumerate(returned))
    else:
        found = getattr(returned, "__dict__", {})
    return {
        source: Entry(str(source), tuple(value.shape)) for source, value in found.items() if isinstance(value, Tensor)
    }
