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
from capsnet_jax.nn.conv_capsules import ConvCapsules
from capsnet_jax.nn.layers import CapsuleLayer
from capsnet_jax.nn.model import CapsNet

StateDict = dict[str, Shaped[np.ndarray, "..."]]


class Row(NamedTuple):
    """One weight: its name in the state_dict, its path in the model, and the order of its axes on both sides."""

    name: str
    path: tuple[str | int, ...]
    torch_axes: str
    jax_axes: str


CONVOLUTION = ("outputs inputs height width", "height width inputs outputs")
BIAS = ("outputs", "outputs")
# PyTorch's names of the variables of a batch normalisation, and Flax'. PyTorch also counts batches, for nothing.
NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
UNUSED = ".num_batches_tracked"
FLOATS = "float16, float32 or float64"
LISTED = 4  # names in a message, of those that may be as many as a model has


def weight_table(model: CapsNet) -> list[Row]:
    """A row for each weight of a model, and each running mean; capsule layers below the last are `hidden_capsules`."""
    decoder = model.decoder
    rows = []
    number = 0  # in the Sequential of convolution, ReLU and normalisation, over and over
    for k in range(len(model.stem.convolutions)):
        rows += _convolution(f"encoder.image2primary_capsules.{number}", ("stem", "convolutions", k))
        number += 2
        if model.stem.norms:
            rows += [
                Row(f"encoder.image2primary_capsules.{number}.{name}", ("stem", "norms", k, ours), *BIAS)
                for name, ours in NORM.items()
            ]
            number += 1
    rows += _convolution(f"encoder.image2primary_capsules.{number}", ("primary_capsules", "convolution"))
    for k, layer in enumerate(model.capsule_layers):
        last = k == len(model.capsule_layers) - 1
        name = "encoder.primary2digit_capsules" if last else f"encoder.hidden_capsules.{k}"
        rows += _capsule_layer(name, ("capsule_layers", k), layer)
    if decoder is not None:
        rows.append(Row("decoder.0.weight", ("decoder", "from_capsules"), "o h outputs", "o h outputs"))
        if decoder.outer_bias:
            rows.append(Row("decoder.0.bias", ("decoder", "first_bias"), "1 outputs", "outputs"))
        rows.append(Row("decoder.2.weight", ("decoder", "hidden_weight"), "outputs inputs", "inputs outputs"))
        rows.append(Row("decoder.2.bias", ("decoder", "hidden_bias"), *BIAS))
        torch_axes, jax_axes = "channels height width", "height width channels"
        rows.append(Row("decoder.4.weight", ("decoder", "to_pixels"), f"inputs {torch_axes}", f"inputs {jax_axes}"))
        if decoder.outer_bias:
            rows.append(Row("decoder.4.bias", ("decoder", "pixel_bias"), f"1 {torch_axes}", jax_axes))
    return rows


def _convolution(name: str, path: tuple[str | int, ...]) -> list[Row]:
    return [Row(f"{name}.weight", (*path, "kernel"), *CONVOLUTION), Row(f"{name}.bias", (*path, "bias"), *BIAS)]


def _capsule_layer(name: str, path: tuple[str | int, ...], layer: CapsuleLayer | ConvCapsules) -> list[Row]:
    if isinstance(layer, CapsuleLayer):
        rows = [Row(f"{name}.input_caps2U.weight", (*path, "weight"), "i d o h", "i d o h")]
    else:
        axes = "taps i inner o outer"
        rows = [Row(f"{name}.weight", (*path, "weight"), axes, axes)]
    for weight in layer.routing_weights:
        # By number, as a weight may have an axis twice.
        axes = " ".join(f"axis{number}" for number in range(layer.routing_weights[weight].ndim))
        rows.append(Row(f"{name}.routing_weights.{weight}", (*path, "routing_weights", weight), axes, axes))
    return rows


def to_torch(model: CapsNet) -> StateDict:
    """The weights as the PyTorch model names and shapes them.

    `capsnet_torch.CapsNet.load_state_dict` takes them as tensors; the entries that begin with "encoder." and with
    "decoder.", without that prefix, are the two state_dicts of the reference model.
    """
    values = dict(nnx.to_flat_state(nnx.state(model)))
    return {
        row.name: np.array(
            rearrange(np.asarray(values[row.path][...]), f"{row.jax_axes} -> {row.torch_axes}"), order="C"
        )
        for row in weight_table(model)
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
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    table = weight_table(model)
    state = {name: array for name, array in state.items() if not name.endswith(UNUSED)}
    shapes = {
        row.name: rearrange(np.empty(flat[row.path].shape, bool), f"{row.jax_axes} -> {row.torch_axes}").shape
        for row in table
    }
    _check_names(state, shapes)
    new: dict[Any, Any] = {}
    for row in table:
        array, variable = np.asarray(state[row.name]), flat[row.path]
        if array.shape != shapes[row.name]:
            raise UsageError(f"The weight {row.name} is {array.shape}; this model expects {shapes[row.name]}.")
        if not np.issubdtype(array.dtype, np.floating):
            raise UsageError(f"The weight {row.name} is {array.dtype}; expected a floating-point type.")
        if not np.isfinite(array).all():
            raise UsageError(f"The weight {row.name} has values that are not finite.")
        value = jnp.asarray(rearrange(array, f"{row.torch_axes} -> {row.jax_axes}"), variable.dtype)
        new[row.path] = variable.replace(value)
    nnx.update(model, nnx.from_flat_state(new))


def save_weights(path: Path, model: CapsNet) -> None:
    """Writes a safetensors file, under the PyTorch model's names."""
    path.write_bytes(safetensors.numpy.save(to_torch(model)))  # readable by those who may read its folder


def load_weights(path: Path, model: CapsNet) -> None:
    """Sets the weights of a model to those of a safetensors file.

    Raises:
        UsageError: the file does not exist or is no safetensors file, or its entries are not those of the model.
    """
    state = read_safetensors(path)
    try:
        from_torch(model, state)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def read_safetensors(path: Path) -> StateDict:
    """The entries of a safetensors file, whatever they are of.

    Raises:
        UsageError: the file does not exist or is no safetensors file, or an entry is of a type that NumPy lacks.
    """
    state = {}
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118  it is no mapping
                try:
                    state[name] = file.get_tensor(name)
                except AttributeError as error:  # NumPy has no float8, say
                    kind = file.get_slice(name).get_dtype()
                    raise UsageError(f"{path}: The entry {name} is {kind}; expected {FLOATS}.") from error
    except (OSError, safetensors.SafetensorError) as error:
        raise UsageError(f"{path} is not a safetensors file that can be read: {error}.") from error
    return state


def _check_names(state: Mapping[str, Shaped[np.ndarray, "..."]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    missing = [name for name in shapes if name not in state]
    unknown = sorted(state.keys() - shapes.keys())
    wrong = [f"lack {_listed(missing)}"] if missing else []
    wrong += [f"have unknown entries {_listed(unknown)}"] if unknown else []
    hint = ""
    if len(missing) == len(unknown) == 1 and np.shape(state[unknown[0]]) == shapes[missing[0]]:
        hint = "; both are of one shape, and may be the same weight renamed"
    if wrong:
        raise UsageError(f"The weights {' and '.join(wrong)}{hint}.")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
