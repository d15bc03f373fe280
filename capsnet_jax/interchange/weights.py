"""Weights under the names and shapes of the PyTorch model: one explicit table, without torch or pickle."""

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


class Transfer(NamedTuple):
    """Names, in the PyTorch model's state_dict, of weights that were taken from another model, and of all others.

    Attributes:
        taken: weights that were taken.
        anew: weights that fit none of the other model, and keep their values.
        unused: weights of the other model that fit none of this one.
    """

    taken: tuple[str, ...]
    anew: tuple[str, ...]
    unused: tuple[str, ...]


class Row(NamedTuple):
    """One weight: its name in the state_dict, its path in the JAX model, and the order of its axes in both."""

    name: str
    path: tuple[str | int, ...]
    torch_axes: str
    jax_axes: str


CONVOLUTION = ("outputs inputs height width", "height width inputs outputs")
BIAS = ("outputs", "outputs")
NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}  # PyTorch's names and Flax's
UNUSED = ".num_batches_tracked"  # PyTorch counts batches in every batch normalization, and does not use the count
FLOATS = "float16, float32 or float64"
LISTED = 4  # number of names in a message


def weight_table(model: CapsNet) -> list[Row]:
    """List a row for each parameter and running average of a model."""
    rows = []
    number = 0  # index in PyTorch's Sequential, where convolution, ReLU and batch normalization alternate
    for k in range(len(model.stem.convolutions)):
        rows += _convolution(f"encoder.image2primary_capsules.{number}", ("stem", "convolutions", k))
        number += 2
        if model.stem.norms:
            norm = f"encoder.image2primary_capsules.{number}"
            rows += [Row(f"{norm}.{name}", ("stem", "norms", k, flax), *BIAS) for name, flax in NORM.items()]
            number += 1
    rows += _convolution(f"encoder.image2primary_capsules.{number}", ("primary_capsules", "convolution"))
    names = [f"encoder.hidden_capsules.{k}" for k in range(len(model.capsule_layers) - 1)]
    for k, name in enumerate([*names, "encoder.primary2digit_capsules"]):
        rows += _capsule_layer(name, ("capsule_layers", k), model.capsule_layers[k])
    if model.decoder is not None:
        pixels = "channels height width", "height width channels"
        decoder = [
            ("0.weight", "from_capsules", "o h outputs", "o h outputs"),
            ("2.weight", "hidden_weight", "outputs inputs", "inputs outputs"),
            ("2.bias", "hidden_bias", *BIAS),
            ("4.weight", "to_pixels", *(f"inputs {axes}" for axes in pixels)),
        ]
        if model.decoder.outer_bias:
            decoder.insert(1, ("0.bias", "first_bias", "1 outputs", "outputs"))
            decoder.append(("4.bias", "pixel_bias", f"1 {pixels[0]}", pixels[1]))
        rows += [Row(f"decoder.{name}", ("decoder", path), *axes) for name, path, *axes in decoder]
    return rows


def _convolution(name: str, path: tuple[str | int, ...]) -> list[Row]:
    return [Row(f"{name}.weight", (*path, "kernel"), *CONVOLUTION), Row(f"{name}.bias", (*path, "bias"), *BIAS)]


def _capsule_layer(name: str, path: tuple[str | int, ...], layer: CapsuleLayer | ConvCapsules) -> list[Row]:
    dense = isinstance(layer, CapsuleLayer)
    suffix, axes = ("input_caps2U.weight", "i d o h") if dense else ("weight", "taps i inner o outer")
    rows = [Row(f"{name}.{suffix}", (*path, "weight"), axes, axes)]
    for weight, variable in layer.routing_weights.items():
        axes = " ".join(f"axis{number}" for number in range(variable.ndim))  # numbered: a letter may occur twice
        rows.append(Row(f"{name}.routing_weights.{weight}", (*path, "routing_weights", weight), axes, axes))
    return rows


def to_torch(model: CapsNet) -> StateDict:
    """Convert the weights of a model to a state_dict of the PyTorch model, as NumPy arrays.

    The entries whose names start with "encoder." and "decoder.", without these prefixes, are the two state_dicts of
    the reference model.

    Args:
        model: any model.

    Returns:
        An array for each name; `capsnet_torch.CapsNet.load_state_dict` accepts them as tensors.

    Examples:
        >>> from flax import nnx
        >>> from capsnet_jax import CapsNet, to_torch
        >>> state = to_torch(CapsNet.from_preset("digits", rngs=nnx.Rngs(0)))
        >>> state["encoder.primary2digit_capsules.input_caps2U.weight"].shape
        (72, 8, 10, 16)
    """
    values = dict(nnx.to_flat_state(nnx.state(model)))
    return {
        row.name: np.array(
            rearrange(np.asarray(values[row.path][...]), f"{row.jax_axes} -> {row.torch_axes}"), order="C"
        )
        for row in weight_table(model)
    }


def from_torch(model: CapsNet, state: Mapping[str, Shaped[np.ndarray, "..."]]) -> None:
    """Set all weights of a model from a state_dict of the PyTorch model; if an entry is wrong, none is set.

    Args:
        model: a model of the same sizes, changed in place. Its weights keep their dtype.
        state: an array for each name of the PyTorch model's state_dict.

    Raises:
        UsageError: an entry is missing, unknown, not floating-point or not finite, or has another shape.

    Examples:
        >>> from flax import nnx
        >>> from capsnet_jax import CapsNet, from_torch, to_torch
        >>> trained, model = (CapsNet.from_preset("digits", rngs=nnx.Rngs(seed)) for seed in (0, 1))
        >>> from_torch(model, to_torch(trained))
        >>> bool((model.capsule_layers[0].weight[...] == trained.capsule_layers[0].weight[...]).all())
        True
    """
    state = {name: np.asarray(array) for name, array in state.items() if not name.endswith(UNUSED)}
    shapes = _shapes(model)
    _check_names(state, shapes)
    for name, array in state.items():
        if array.shape != shapes[name]:
            raise UsageError(f"The weight {name} is {array.shape}; this model expects {shapes[name]}.")
    check_values(state)
    _set_weights(model, state)


def take_weights(model: CapsNet, state: Mapping[str, Shaped[np.ndarray, "..."]]) -> Transfer:
    """Set the weights of a model that fit those of another one by name and shape; all others keep their values.

    Names are numbered by layer. So if the shapes of one weight of a layer differ, none of that layer is taken.

    Args:
        model: any model, changed in place. Its weights keep their dtype.
        state: an array for each name of the other model's state_dict.

    Raises:
        UsageError: no weight fits, or one is not floating-point or not finite; then none is set.
    """
    check_values(state)
    shapes = _shapes(model)
    both = {name: shapes[name] == state[name].shape for name in shapes if name in state}
    other_layers = {_layer(name) for name, fits in both.items() if not fits}
    taken = tuple(name for name in both if _layer(name) not in other_layers)
    if not taken:
        raise UsageError(
            f"None of the {len(state)} weights fits this model in name and shape; expected weights of a model that has "
            "at least one layer of the same sizes."
        )
    _set_weights(model, {name: state[name] for name in taken})
    return Transfer(taken, *(tuple(name for name in names if name not in taken) for names in (shapes, state)))


def save_weights(path: Path, model: CapsNet) -> None:
    """Write the weights of a model to a safetensors file, under the names of the PyTorch model."""
    path.write_bytes(safetensors.numpy.save(to_torch(model)))  # unlike `save_file`, with the permissions of the folder


def load_weights(path: Path, model: CapsNet) -> None:
    """Set the weights of a model from a safetensors file.

    Raises:
        UsageError: the file does not exist or is not a safetensors file, or its entries do not fit the model.
    """
    state = read_safetensors(path)
    try:
        from_torch(model, state)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def read_safetensors(path: Path) -> StateDict:
    """Read the entries of a safetensors file.

    Raises:
        UsageError: the file does not exist or is not a safetensors file, or an entry has a type that NumPy lacks.
    """
    state = {}
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118  not a mapping
                try:
                    state[name] = file.get_tensor(name)
                except AttributeError as error:  # NumPy has no float8, for example
                    kind = file.get_slice(name).get_dtype()
                    raise UsageError(f"{path}: The entry {name} is {kind}; expected {FLOATS}.") from error
    except (OSError, safetensors.SafetensorError) as error:
        raise UsageError(f"{path} is not a safetensors file that can be read: {error}.") from error
    return state


def check_values(state: Mapping[str, Shaped[np.ndarray, "..."]]) -> None:
    """Check that all entries are finite floating-point numbers.

    Raises:
        UsageError: an entry is not.
    """
    for name, array in state.items():
        if not np.issubdtype(array.dtype, np.floating):
            raise UsageError(f"The entry {name} is {array.dtype}; expected {FLOATS}.")
        if not np.isfinite(array).all():
            raise UsageError(f"The entry {name} has values that are not finite; expected numbers only.")


def _shapes(model: CapsNet) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight in the state_dict of the PyTorch model."""
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    return {
        row.name: rearrange(np.empty(flat[row.path].shape, bool), f"{row.jax_axes} -> {row.torch_axes}").shape
        for row in weight_table(model)
    }


def _set_weights(model: CapsNet, state: Mapping[str, Shaped[np.ndarray, "..."]]) -> None:
    """Set weights, which must fit, in the dtype of the model.

    Raises:
        UsageError: a value is too large for that dtype; then none is set.
    """
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    new: dict[Any, Any] = {}
    for row in weight_table(model):
        if row.name in state:
            dtype = flat[row.path].dtype
            with np.errstate(over="ignore"):
                value = np.asarray(rearrange(state[row.name], f"{row.torch_axes} -> {row.jax_axes}"), dtype)
            if not np.isfinite(value).all():
                raise UsageError(f"The entry {row.name} has values that are too large for {dtype}.")
            new[row.path] = flat[row.path].replace(jnp.asarray(value))
    nnx.update(model, nnx.from_flat_state(new))


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _check_names(state: Mapping[str, Shaped[np.ndarray, "..."]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    missing = [name for name in shapes if name not in state]
    unknown = sorted(state.keys() - shapes.keys())
    wrong = [f"lack {_listed(missing)}"] if missing else []
    wrong += [f"have unknown entries {_listed(unknown)}"] if unknown else []
    hint = ""
    if len(missing) == len(unknown) == 1 and state[unknown[0]].shape == shapes[missing[0]]:
        hint = "; both are of one shape, and may be the same weight renamed"
    if wrong:
        raise UsageError(f"The weights {' and '.join(wrong)}{hint}.")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
