"""The command `capsnet convert`: convert files of weights."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from flax import nnx

from capsnet_jax.errors import UsageError
from capsnet_jax.files import replace_file
from capsnet_jax.interchange.architecture import infer_architecture
from capsnet_jax.interchange.model_card import model_card
from capsnet_jax.interchange.state_files import (
    CONFIG,
    WEIGHTS,
    check_paths,
    find_pretrained,
    is_folder,
    named,
    read_state,
    write_state,
)
from capsnet_jax.interchange.weights import StateDict, from_torch, weight_table
from capsnet_jax.presets import get_preset
from capsnet_jax.runs.folder import Run, read_run
from capsnet_jax.runs.metrics import read_metrics

CARD = "README.md"


@dataclass(frozen=True)
class Convert:
    """Convert weights between PyTorch and JAX: a run, safetensors, or a state_dict.

    Weights keep every bit, unless --dtype is given, and have the names of the PyTorch model.
    They are checked against the model before anything is written. Details: docs/interchange.md."""

    source: tyro.conf.Positional[tuple[Path, ...]]
    """Folder of a run, or name of a pretrained model; one file, .safetensors or .pt with a state_dict; or two files:
    encoder and decoder of the reference model. Code in a .pt file is not executed."""
    to: tuple[Path, ...]
    """What to write: a new .safetensors or .pt file; two files for encoder and decoder;
    or, by any other name, a new folder with weights, config.json and a model card."""
    preset: str | None = None
    """Preset for what weights do not determine: strides, scale, squash, routing.
    Default: the config.json beside the source, or else readable, the reference model."""
    image_shape: tuple[int, int, int] | None = None
    """Height, width and channels of the images; needed for weights without decoder and config.json."""
    dtype: Literal["float16", "float32", "float64"] | None = None
    """Type of the weights to write; by default that of the source. float16 halves the files."""
    trust_code: bool = False
    """Import the routing that the run names, if it is not of this package. That runs code."""

    def run(self) -> None:
        check_paths(self.source)
        check_paths(self.to)
        for path in self.to:
            _check_free(path)
        target = self.to[0] if is_folder(self.to[0]) else None
        state = read_state(self.source)
        run, preset = self._find_run(state)
        with _naming(self.source):
            model = nnx.eval_shape(run.new_model)  # shapes only
            from_torch(model, state)
        if preset is not None:
            config = run.config.model
            print(
                f"Scale {config.primary_scale:g}, {config.primary_squash!r} as squash and routing {config.routing} are "
                f"taken from preset {preset}, as the weights do not determine them.",
                file=sys.stderr,
            )
        state = {row.name: state[row.name] for row in weight_table(model)}
        if self.dtype is not None:
            with _naming(self.source):
                state = _as_dtype(state, self.dtype)
        num_weights, dtype = _count(state)
        for path, part in write_state(state, self.to).items():
            print(f"{path}: {len(part)} entries, {_count(part)[0]:,} weights in {dtype}")
        if target is not None:
            run = run._replace(folder=target)
            card = model_card(
                target.absolute().name,
                run.config,
                image_shape=run.image_shape,
                class_names=run.class_names,
                known_data=run.data_checksum != 0,
                num_weights=num_weights,
                dtype=dtype,
                epochs=self._epochs(),
                started_from="" if run.origin is None else run.origin.sentence(),
            )
            replace_file(target / CARD, card)
            print(f"{target / CARD}: model card")
            run.write_config()  # last, because a folder with a config is the folder of a run
            print(f"{target / CONFIG}: options")

    @property
    def _folder(self) -> Path:
        source = find_pretrained(self.source[0])
        return source if source.is_dir() else source.parent

    def _find_run(self, state: StateDict) -> tuple[Run, str | None]:
        """Read the config beside the source, or infer one from weights and a preset, whose name is returned, too."""
        folder = self._folder
        if self.preset is None and (folder == self.source[0] or (folder / CONFIG).exists()):
            run = read_run(folder, trust_code=self.trust_code)
            if self.image_shape not in (None, run.image_shape):
                raise UsageError(
                    f"--image-shape is {self.image_shape}, and in {folder / CONFIG} it is {run.image_shape}; "
                    "expected the same, or --preset to do without that file."
                )
            return run, None
        preset = self.preset or "readable"
        config = get_preset(preset)
        with _naming(self.source):
            model = infer_architecture(state, config.model, image_shape=self.image_shape)
        class_names = tuple(map(str, range(model.num_classes)))
        return Run(folder, replace(config, model=model), class_names), preset

    def _epochs(self) -> list[dict[str, Any]]:
        """Read the metrics of the epochs, if these weights are the last ones of a run."""
        is_last = self.source[0] in (self._folder, self._folder / WEIGHTS)
        return read_metrics(self._folder, "epoch") if is_last else []


@contextmanager
def _naming(source: tuple[Path, ...]) -> Iterator[None]:
    """Begin the message of a UsageError with the names of the files."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{named(source)}: {error}") from error


def _as_dtype(state: StateDict, dtype: str) -> StateDict:
    """Round weights to another type.

    Raises:
        UsageError: a value is too large for it.
    """
    with np.errstate(over="ignore"):
        rounded = {name: array.astype(dtype) for name, array in state.items()}
    for name, array in rounded.items():
        if not np.isfinite(array).all():
            raise UsageError(f"The entry {name} has values that are too large for {dtype}; expected another --dtype.")
    return rounded


def _count(state: StateDict) -> tuple[int, str]:
    """Return the number of weights, and their common dtype."""
    return sum(array.size for array in state.values()), str(next(iter(state.values())).dtype)


def _check_free(path: Path) -> None:
    if not is_folder(path):
        if path.exists():
            raise UsageError(f"{path} exists already; expected the name of a new file.")
        return
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; expected the name of a folder, or one that ends in .safetensors or .pt.")
    taken = [name for name in (CONFIG, WEIGHTS, CARD) if (path / name).exists()]
    if taken:
        raise UsageError(f"{path} has a {taken[0]} already; expected a folder without, to write one into.")
