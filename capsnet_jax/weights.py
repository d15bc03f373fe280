"""Weights under the names and shapes of the PyTorch model: one explicit table, no guesses, no torch, no pickle."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from einops import rearrange
from flax import nnx
from jaxtyping import Shaped

from capsnet_jax.errors import UsageError
from capsnet_jax.model import CapsNet

StateDict = dict[str, Shaped[np.ndarray, "..."]]


class Row(NamedTuple):
    """One weight: its name in the state_dict, its path in the model, and the order of its axes on both sides."""

    name: str
    path: tuple[str | int, ...]
    torch_axes: str
    jax_axes: str


CONVOLUTION = ("outputs inputs height width", "height width inputs outputs")
BIAS = ("outputs", "outputs")
VOTES = ("i d o h", "i d o h")


def weight_table(num_capsule_layers: int) -> list[Row]:
    """A row for each weight of a model; capsule layers below the last are `encoder.hidden_capsules`."""
    stem, primary = ("encoder", "stem"), ("encoder", "primary_capsules", "convolution")
    hidden = range(num_capsule_layers - 1)
    return [
        Row("encoder.image2primary_capsules.0.weight", (*stem, "kernel"), *CONVOLUTION),
        Row("encoder.image2primary_capsules.0.bias", (*stem, "bias"), *BIAS),
        Row("encoder.image2primary_capsules.2.weight", (*primary, "kernel"), *CONVOLUTION),
        Row("encoder.image2primary_capsules.2.bias", (*primary, "bias"), *BIAS),
        *(
            Row(f"encoder.hidden_capsules.{k}.input_caps2U.weight", ("encoder", "capsule_layers", k, "weight"), *VOTES)
            for k in hidden
        ),
        Row(
            "encoder.primary2digit_capsules.input_caps2U.weight",
            ("encoder", "capsule_layers", len(hidden), "weight"),
            *VOTES,
        ),
        Row("decoder.0.weight", ("decoder", "from_capsules"), "o h outputs", "o h outputs"),
        Row("decoder.2.weight", ("decoder", "hidden_weight"), "outputs inputs", "inputs outputs"),
        Row("decoder.2.bias", ("decoder", "hidden_bias"), *BIAS),
        Row(
            "decoder.4.weight", ("decoder", "to_pixels"), "inputs channels height width", "inputs height width channels"
        ),
    ]


def to_torch(model: CapsNet) -> StateDict:
    """The weights as the PyTorch model names and shapes them.

    `capsnet_torch.CapsNet.load_state_dict` takes them as tensors; the entries that begin with "encoder." and with
    "decoder.", without that prefix, are the two state_dicts of the reference model.
    """
    params = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    return {
        row.name: np.array(
            rearrange(np.asarray(params[row.path][...]), f"{row.jax_axes} -> {row.torch_axes}"), order="C"
        )
        for row in weight_table(len(model.encoder.capsule_layers))
    }


def from_torch(model: CapsNet, state: Mapping[str, Shaped[np.ndarray, "..."]]) -> None:
    """Sets the weights of a model, all or none of them; they keep the dtype that the model has.

    Args:
        model: a model of the same sizes.
        state: an array for each name of the PyTorch model's state_dict.

    Raises:
        UsageError: an entry is missing, unknown, of another shape, not floating-point or not finite; the message
            names it.
    """
    params = nnx.state(model, nnx.Param)
    flat = dict(nnx.to_flat_state(params))
    table = weight_table(len(model.encoder.capsule_layers))
    missing = [row.name for row in table if row.name not in state]
    unknown = sorted(state.keys() - {row.name for row in table})
    if missing or unknown:
        raise UsageError(f"The weights lack {_listed(missing)}, and have unknown entries {_listed(unknown)}.")
    new: dict[Any, Any] = {}
    for row in table:
        array, param = np.asarray(state[row.name]), flat[row.path]
        expected = rearrange(np.empty(param.shape, bool), f"{row.jax_axes} -> {row.torch_axes}").shape
        if array.shape != expected:
            raise UsageError(f"The weight {row.name} is {array.shape}; this model expects {expected}.")
        if not np.issubdtype(array.dtype, np.floating):
            raise UsageError(f"The weight {row.name} is {array.dtype}; expected a floating-point type.")
        if not np.isfinite(array).all():
            raise UsageError(f"The weight {row.name} has values that are not finite.")
        value = jnp.asarray(rearrange(array, f"{row.torch_axes} -> {row.jax_axes}"), param.dtype)
        new[row.path] = param.replace(value)
    nnx.update(model, nnx.from_flat_state(new))


def save_weights(path: Path, model: CapsNet) -> None:
    """Writes a safetensors file, under the PyTorch model's names."""
    safetensors.numpy.save_file(to_torch(model), path)


def load_weights(path: Path, model: CapsNet) -> None:
    """Sets the weights of a model to those of a safetensors file.

    Raises:
        UsageError: the file does not exist or is no safetensors file, or its entries are not those of the model.
    """
    try:
        state = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UsageError(f"{path} is not a safetensors file that can be read: {error}.") from error
    try:
        from_torch(model, state)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _listed(names: list[str]) -> str:
    return ", ".join(names) if names else "none"
