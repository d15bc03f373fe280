"""The weights that a run starts from: a copy in its folder, so that it can be resumed, and a record in its config."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.numpy
from flax import nnx

from capsnet_jax.errors import UsageError
from capsnet_jax.files import replace_file
from capsnet_jax.interchange.state_files import find_pretrained, read_state
from capsnet_jax.interchange.weights import StateDict, take_weights, weight_table
from capsnet_jax.nn.model import CapsNet
from capsnet_jax.train.freezing import is_frozen

ORIGIN = "origin.safetensors"  # in the folder of a run or of several seeds


class Origin(NamedTuple):
    """What a config records of the weights that a run started from.

    Attributes:
        path: absolute path of the file or folder that they were read from.
        sha256: checksum of `origin.safetensors`, their copy.
        anew: names of the weights of the run that did not fit and started anew.
        unused: names of the weights of the source that were not used.
    """

    path: str
    sha256: str
    anew: tuple[str, ...]
    unused: tuple[str, ...]

    @classmethod
    def from_json(cls, fields: Any) -> "Origin":
        """Create a record from the result of `to_json`.

        Raises:
            UsageError: it is not one.
        """
        try:
            path, sha256, anew, unused = (fields[name] for name in ("from", "sha256", "anew", "unused"))
            origin = cls(str(path), str(sha256), tuple(map(str, anew)), tuple(map(str, unused)))
        except (KeyError, TypeError):
            origin = None
        if origin is None or origin.to_json() != fields or not " ".join(map(str, origin)).isprintable():
            raise UsageError(f"origin is {fields!r}; expected from, sha256, anew and unused.")
        return origin

    def to_json(self) -> dict[str, Any]:
        return {"from": self.path, "sha256": self.sha256, "anew": list(self.anew), "unused": list(self.unused)}

    def describe(self) -> list[str]:
        """Return lines about the weights: where they are from, which start anew, and which are not used."""
        lines = [f"Weights from {self.path}"]
        lines += [f"Weights that start anew: {', '.join(self.anew)}"] if self.anew else []
        return lines + ([f"Weights of the source that are not used: {', '.join(self.unused)}"] if self.unused else [])

    def sentence(self) -> str:
        """Describe the weights in a sentence for a model card, without the folders of this machine."""
        new = f", except {', '.join(f'`{name}`' for name in self.anew)}, which started anew" if self.anew else ""
        return f"It started from the weights of `{Path(self.path).name}` (SHA-256 `{self.sha256}`){new}."


class Source(NamedTuple):
    """Weights to start a run from.

    Attributes:
        path: absolute path of the file or folder that they were first read from.
        state: the weights.
        content: the weights as a safetensors file.
    """

    path: str
    state: StateDict
    content: bytes

    @classmethod
    def read(cls, path: Path, *, started: Path | None = None) -> "Source":
        """Read weights, or their copy if they have been copied.

        Args:
            path: a run folder, a converted folder, a file of weights, or the name of a pretrained model.
            started: folder of runs that have started from them.

        Raises:
            UsageError: they cannot be read, are not finite numbers, or the path cannot be recorded.
        """
        path = find_pretrained(path)
        if not str(path.absolute()).isprintable():
            raise UsageError(f"from is {str(path)!a}; expected a path of printable characters.")
        copy = None if started is None else started / ORIGIN
        state = read_state([path if copy is None or not copy.exists() else copy])
        return cls(str(path.absolute()), state, safetensors.numpy.save(state))

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def copy_to(self, folder: Path) -> None:
        """Write the copy, atomically.

        Raises:
            UsageError: it cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(folder / ORIGIN, self.content)
        except OSError as error:
            raise UsageError(f"{folder / ORIGIN} cannot be written: {error.strerror}.") from error

    def origin_of(self, new_model: Callable[[], CapsNet], *, freeze: Sequence[str] = ()) -> Origin:
        """Return the record of a run that starts from these weights, and keeps some layers frozen.

        Raises:
            UsageError: none of them fits its model, one is too large, or a frozen layer would stay random.
        """
        model = nnx.eval_shape(new_model)  # shapes only
        try:
            transfer = take_weights(model, self.state)
        except UsageError as error:
            raise UsageError(f"{self.path}: {error}") from error
        selects = is_frozen(freeze)
        for row in weight_table(model):
            if row.name in transfer.anew and selects(row.path, None):
                raise UsageError(
                    f"freeze is {' '.join(freeze)}, and {row.name} in it does not fit {self.path} and would stay as it "
                    "starts; expected only layers that fit."
                )
        return Origin(self.path, self.sha256, transfer.anew, transfer.unused)

    def starting(self, new_model: Callable[[int], CapsNet]) -> Callable[[int], CapsNet]:
        """Make a function of a seed that returns a model with these weights, where they fit."""

        def started(seed: int) -> CapsNet:
            model = new_model(seed)
            take_weights(model, self.state)
            return model

        return started
