"""Files of weights: safetensors, PyTorch's state_dict, the reference model's two of them, and folders of a run."""

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
from capsnet_jax.interchange.weights import FLOATS, UNUSED, StateDict, read_safetensors

CONFIG, WEIGHTS = "config.json", "model.safetensors"  # in the folder of a run
SAFETENSORS, TORCH = (".safetensors",), (".pt", ".pth")
PAIR = ("encoder.", "decoder.")  # what the two state_dicts of the reference model are in that of the whole model


def read_state(paths: Sequence[Path]) -> StateDict:
    """The weights in files, under the names of the PyTorch model's state_dict, in the dtype that they are in.

    Args:
        paths: one .safetensors, .pt or .pth file, or the folder of a run; or two files, the reference model's encoder
            and decoder, whose names get the prefixes "encoder." and "decoder.".

    Raises:
        UsageError: a file is of no such kind, cannot be read or is empty, or an entry is not an array of finite
            floating-point numbers in the dtype of all others; the message names file and entry. Nothing is ever
            unpickled.
    """
    check_paths(paths)
    if len(paths) == 1:
        state = _read_file(paths[0])
    else:
        state = {
            f"{prefix}{name}": array
            for prefix, path in zip(PAIR, paths, strict=True)
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


def write_state(state: Mapping[str, Shaped[np.ndarray, "..."]], paths: Sequence[Path]) -> dict[Path, StateDict]:
    """Writes weights into files of the kinds that `read_state` reads, which take their places when all are whole.

    Args:
        state: an array for each name of the PyTorch model's state_dict.
        paths: one file or folder, or two files for encoder and decoder.

    Returns:
        What was written into which file; of a folder, `model.safetensors` in it.

    Raises:
        UsageError: a file cannot be written, or two are wanted and the model has no decoder.
    """
    check_paths(paths)
    if len(paths) == 1:
        parts = [dict(state)]
    else:
        parts = [
            {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
            for prefix in PAIR
        ]
        if not parts[1]:
            raise UsageError(f"The model has no decoder to write into {paths[1]}; expected one file.")
    written = {path / WEIGHTS if is_folder(path) else path: part for path, part in zip(paths, parts, strict=True)}
    partials = {path: path.with_name(f"{path.name}.partial") for path in written}
    try:
        for path, part in written.items():
            _write_file(partials[path], path.suffix, part)
        for path, partial in partials.items():
            partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch's own writer raises the latter
        for partial in partials.values():
            with suppress(OSError):
                partial.unlink()
        raise UsageError(f"{path} cannot be written: {error}.") from error
    return written


def check_paths(paths: Sequence[Path]) -> None:
    """Makes sure that these can be names of weights: of one file or folder, or of two files.

    Raises:
        UsageError: they cannot.
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
    """These files, as messages name them."""
    return " and ".join(map(str, paths))


def is_folder(path: Path) -> bool:
    """Whether a name is that of a folder: it has not the ending of a file of weights."""
    return path.is_dir() or path.suffix not in SAFETENSORS + TORCH


def _read_file(path: Path) -> StateDict:
    if path.is_dir():
        if not (path / WEIGHTS).exists():
            raise UsageError(f"{path} has no {WEIGHTS}; expected the folder of a run, or a file of weights.")
        return _read_file(path / WEIGHTS)
    if not path.is_file():
        raise UsageError(f"{path} does not exist; expected a file or folder of weights.")
    if path.suffix in TORCH:
        try:
            state = _torch_files().read_state(path)
        except ValueError as error:
            raise UsageError(f"{path}: {error}.") from error
    elif path.suffix in SAFETENSORS:
        state = read_safetensors(path)
    else:
        raise UsageError(f"{path} ends in {path.suffix!r}; expected {', '.join(SAFETENSORS + TORCH)}.")
    state = {name: array for name, array in state.items() if not name.endswith(UNUSED)}
    if not state:
        raise UsageError(f"{path} is empty: it has no entry; expected an array for each weight.")
    for name, array in state.items():
        if not np.issubdtype(array.dtype, np.floating):
            raise UsageError(f"{path}: The entry {name} is {array.dtype}; expected {FLOATS}.")
        if not np.isfinite(array).all():
            raise UsageError(f"{path}: The entry {name} has values that are not finite; expected numbers only.")
    return state


def _write_file(path: Path, kind: str, state: Mapping[str, Shaped[np.ndarray, "..."]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind in TORCH:
        _torch_files().write_state(path, state)
    else:
        path.write_bytes(safetensors.numpy.save({name: np.asarray(state[name], order="C") for name in state}))


def _torch_files() -> Any:
    """The module that reads and writes files of PyTorch.

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
