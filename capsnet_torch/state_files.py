"""Read state_dicts from PyTorch files, without executing pickles, and write them."""

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Shaped
from numpy import ndarray
from torch import Tensor

State = dict[str, Shaped[ndarray, "..."]]


def read_state(path: Path) -> State:
    """Read a state_dict that `torch.save` wrote, in its order; only tensors and plain containers are unpickled.

    Raises:
        ValueError: the file is not a state_dict, or an entry has a type that NumPy lacks; the message names it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns about some pickles, which are refused anyway
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError("It is not a file of tensors only, and was not unpickled; expected a state_dict") from error
    except Exception as error:  # files of another format, or truncated ones, raise many kinds of errors
        reason = (str(error).strip().splitlines() or [""])[0].partition(". ")[0].rstrip(".")
        raise ValueError(f"It cannot be read by torch: {type(error).__name__} {reason}".rstrip()) from error
    if not isinstance(state, Mapping):
        raise ValueError(f"It holds a {type(state).__name__}; expected a state_dict, a tensor for each name")
    return {_name(name): _array(name, value) for name, value in state.items()}


def write_state(path: Path, state: Mapping[str, Shaped[ndarray, "..."]]) -> None:
    """Write arrays as a state_dict, for `load_state_dict(torch.load(path, weights_only=True))`."""
    torch.save({name: torch.tensor(array) for name, array in state.items()}, path)


def _name(name: object) -> str:
    if not isinstance(name, str):
        raise ValueError(f"It has an entry named {name!r}; expected a state_dict, a tensor for each name")
    return name


def _array(name: str, value: object) -> Shaped[ndarray, "..."]:
    if not isinstance(value, Tensor):
        raise ValueError(f"The entry {name} is a {type(value).__name__}; expected a tensor")
    try:
        return value.detach().numpy()
    except TypeError as error:  # for example bfloat16, or a sparse tensor
        kind = f"{value.dtype}".removeprefix("torch.") if value.layout == torch.strided else "sparse"
        raise ValueError(f"The entry {name} is {kind}; expected float16, float32 or float64") from error
