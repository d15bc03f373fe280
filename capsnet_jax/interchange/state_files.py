"""Files of weights: safetensors, state_dicts, the two files of the reference model, run folders, pretrained models."""

import importlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from jaxtyping import Shaped

from capsnet_jax.errors import UsageError
from capsnet_jax.interchange.weights import (
    UNUSED,
    StateDict,
    Transfer,
    check_values,
    read_safetensors,
    take_weights,
)
from capsnet_jax.nn.model import CapsNet

CONFIG, WEIGHTS = "config.json", "model.safetensors"  # in the folder of a run
SAFETENSORS, TORCH = (".safetensors",), (".pt", ".pth")
PAIR = ("encoder.", "decoder.")  # prefixes that the entries of the reference model's two files get
# Folders of the trained models that ship with the package, by name.
PRETRAINED = {
    path.parent.name: path.parent for path in sorted(Path(__file__).parents[1].glob(f"pretrained/*/{CONFIG}"))
}


def find_pretrained(path: Path) -> Path:
    """Return the folder of a pretrained model, if a path is its name and nothing of that name exists; else the path."""
    return path if path.exists() else PRETRAINED.get(str(path), path)


def read_state(paths: Sequence[Path]) -> StateDict:
    """Read weights, under the names of the PyTorch model's state_dict and in the dtype of the file.

    Nothing is ever unpickled.

    Args:
        paths: one .safetensors, .pt or .pth file, the folder of a run, or the name of a pretrained model; or two files,
            encoder and decoder of the reference model, whose entries get the prefixes "encoder." and "decoder.".

    Raises:
        UsageError: a file cannot be read, is empty or of another kind, or an entry is not an array of finite
            floating-point numbers in the dtype of all others.
    """
    check_paths(paths)
    prefixes = PAIR if len(paths) == 2 else [""]
    state = {
        f"{prefix}{name}": array
        for prefix, path in zip(prefixes, paths, strict=True)
        for name, array in _read_file(path).items()
    }
    (dtype, count), *others = Counter(array.dtype for array in state.values()).most_common()
    if others:
        odd = next(name for name, array in state.items() if array.dtype != dtype)
        raise UsageError(
            f"{named(paths)}: The entry {odd} is {state[odd].dtype}, and {count} of {len(state)} are "
            f"{dtype}; expected one type for all."
        )
    return state


def start_from(model: CapsNet, source: str | Path) -> Transfer:
    """Set the weights of a model that fit those of a trained one by name and shape, to train it further.

    With other classes, images of another size or another routing, the layers that depend on them keep their values. If
    the shapes of one weight of a layer differ, none of that layer is taken.

    Args:
        model: any model, changed in place.
        source: a run folder, a folder that `capsnet convert` wrote, the name of a pretrained model, or a .safetensors,
            .pt or .pth file. Only weights are read; no code is executed.

    Returns:
        The names of the weights that were taken, that start anew, and that are not used, as in the state_dict of the
        PyTorch model.

    Raises:
        UsageError: the source cannot be read, no weight fits, or a value is not finite; then the model is unchanged.

    Examples:
        >>> import pathlib, tempfile
        >>> from flax import nnx
        >>> from capsnet_jax import CapsNet, start_from
        >>> from capsnet_jax.interchange.weights import save_weights
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "digits.safetensors"
        >>> save_weights(path, CapsNet.from_preset("digits", rngs=nnx.Rngs(0)))  # `capsnet train` does this
        >>> model = CapsNet.from_preset("digits", num_classes=26, rngs=nnx.Rngs(1))
        >>> taken, anew, unused = start_from(model, path)
        >>> anew
        ('encoder.primary2digit_capsules.input_caps2U.weight', 'decoder.0.weight')
    """
    state = read_state([Path(source)])
    try:
        return take_weights(model, state)
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from error


def write_state(state: Mapping[str, Shaped[np.ndarray, "..."]], paths: Sequence[Path]) -> dict[Path, StateDict]:
    """Write weights to files of the kinds that `read_state` reads; existing files are replaced only if all succeed.

    Args:
        state: an array for each name of the PyTorch model's state_dict.
        paths: one file or folder, or two files for encoder and decoder.

    Returns:
        The entries of each file written; for a folder, of its `model.safetensors`.

    Raises:
        UsageError: a file cannot be written, or there are two paths and the model has no decoder.
    """
    check_paths(paths)
    prefixes = PAIR if len(paths) == 2 else [""]
    parts = [{name.removeprefix(of): state[name] for name in state if name.startswith(of)} for of in prefixes]
    if len(paths) == 2 and not parts[1]:
        raise UsageError(f"The model has no decoder to write into {paths[1]}; expected one file.")
    written = {path / WEIGHTS if is_folder(path) else path: part for path, part in zip(paths, parts, strict=True)}
    partials = {path: path.with_name(f"{path.name}.partial") for path in written}
    try:
        for path, part in written.items():
            partials[path].parent.mkdir(parents=True, exist_ok=True)
            if path.suffix in TORCH:
                _torch_files().write_state(partials[path], part)
            else:
                arrays = {name: np.asarray(array, order="C") for name, array in part.items()}
                partials[path].write_bytes(safetensors.numpy.save(arrays))
        for path, partial in partials.items():
            partial.replace(path)
    except (OSError, RuntimeError) as error:  # PyTorch raises a RuntimeError
        for partial in partials.values():
            with suppress(OSError):
                partial.unlink()
        raise UsageError(f"{path} cannot be written: {error}.") from error
    return written


def check_paths(paths: Sequence[Path]) -> None:
    """Check that paths are one file or folder, or two different files.

    Raises:
        UsageError: they are not.
    """
    if len(paths) not in (1, 2):
        raise UsageError(
            f"Got {len(paths)} names of weights; expected one file or folder, or two files: encoder and decoder."
        )
    if len(set(paths)) < len(paths):
        raise UsageError(f"{paths[0]} is given twice; expected one file for the encoder and one for the decoder.")
    folders = [path for path in paths if is_folder(path)]
    if folders and len(paths) == 2:
        raise UsageError(
            f"{folders[0]} is one of two names; expected files that end in {', '.join(SAFETENSORS + TORCH)}."
        )


def named(paths: Sequence[Path]) -> str:
    """Join paths for a message."""
    return " and ".join(map(str, paths))


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder: it exists as one, or does not end like a file of weights."""
    return path.is_dir() or path.suffix not in SAFETENSORS + TORCH


def _read_file(path: Path) -> StateDict:
    path = find_pretrained(path)
    if path.is_dir():
        if not (path / WEIGHTS).exists():
            seeds = sorted(part.parent.name for part in path.glob(f"*/{WEIGHTS}"))
            hint = f"its folder {seeds[0]} does" if seeds else "expected the folder of a run, or a file of weights"
            raise UsageError(f"{path} has no {WEIGHTS}; {hint}.")
        path = path / WEIGHTS
    if not path.is_file():
        raise UsageError(f"{path} does not exist; expected a file or folder of weights.")
    if path.suffix not in SAFETENSORS + TORCH:
        raise UsageError(f"{path} ends in {path.suffix!r}; expected {', '.join(SAFETENSORS + TORCH)}.")
    try:
        state = _torch_files().read_state(path) if path.suffix in TORCH else read_safetensors(path)
    except UsageError:
        raise
    except ValueError as error:  # of `capsnet_torch.state_files`
        raise UsageError(f"{path}: {error}.") from error
    state = {name: array for name, array in state.items() if not name.endswith(UNUSED)}
    if not state:
        raise UsageError(f"{path} is empty: it has no entry; expected an array for each weight.")
    try:
        check_values(state)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    return state


def _torch_files() -> Any:
    """Import the module that reads and writes files of PyTorch.

    Raises:
        UsageError: torch is not installed.
    """
    try:
        return importlib.import_module("capsnet_torch.state_files")
    except ImportError as error:
        raise UsageError(
            f"Files that end in {' or '.join(TORCH)} need PyTorch, which is not installed: "
            "pip install 'capsnet-jax[torch]'."
        ) from error
