"""The explorer as a folder for any web host: its page, the weights of one model, and a forward pass in JavaScript."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange
from jaxtyping import Float

from capsnet_jax.config import ModelConfig
from capsnet_jax.errors import UsageError
from capsnet_jax.explore.explorer import Explorer
from capsnet_jax.nn.model import CapsNet
from capsnet_jax.routing import get_routing
from capsnet_jax.routing.dynamic import dynamic

PAGE, SCRIPTS = Path(__file__).with_name("page"), Path(__file__).with_name("static")
BESIDE = "uniform"  # the other routing that the page can show; it is dynamic routing with one iteration
# What static/capsnet.js computes.
EXPECTED: dict[str, Any] = {
    "standardize_images": False,
    "primary_depthwise": False,
    "conv_capsules": (),
    "hidden_capsules": (),
    "matrix_poses": False,
    "shared_class_transform": False,
}


class Layer(NamedTuple):
    """A convolution, or a dense layer as one of a single position."""

    kernel: Float[np.ndarray, "rows columns channels features"]
    bias: Float[np.ndarray, " features"]
    stride: int = 1


def check_static(folder: Path, config: ModelConfig) -> None:
    """Check that a page can be written into a folder, and that it can compute a network.

    Raises:
        UsageError: the folder exists and is not empty, or the network has other parts than convolutions, one dense
            capsule layer with dynamic routing, and a decoder.
    """
    if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
        raise UsageError(f"{folder} exists already; expected the name of a new or empty folder.")
    routing = get_routing(config.routing)
    if routing.function is not dynamic or routing.weights or dict(routing.options).get("leaky"):
        raise UsageError(
            f"The routing is {config.routing}; expected dynamic, neither leaky nor with learned weights, as the "
            "page has to compute it in JavaScript."
        )
    for name, expected in EXPECTED.items():
        value = getattr(config, name)
        if value != expected:
            raise UsageError(
                f"{name} is {value}; expected {expected}, as the page has to compute the network in JavaScript."
            )


def write_static(folder: Path, explorer: Explorer, model: CapsNet) -> list[Path]:
    """Write a page that needs no server.

    Args:
        folder: where to write; created if it does not exist.
        explorer: shows only this model.
        model: a model that `check_static` accepts.

    Returns:
        The files.
    """
    description, images = explorer.describe({}), explorer.images({})
    if "message" in images:
        images = {"images": [], "message": "No test images come with this page."}
    (network,) = description["networks"]
    networks = [network, network | {"name": BESIDE, "routing": BESIDE, "iterations": [1]}]
    layout, weights = weights_of(model)
    contents = {path.name: path.read_bytes() for source in (PAGE, SCRIPTS) for path in sorted(source.iterdir())}
    contents["weights.bin"] = weights
    page = {
        "model": description | {"names": [each["name"] for each in networks]},
        "networks": networks,
        "images": images,
        "network": layout,
    }
    contents["model.json"] = json.dumps(page).encode()
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


def weights_of(model: CapsNet) -> tuple[dict[str, Any], bytes]:
    """Return the layout of the weights of a model, as static/capsnet.js reads it, and the weights.

    They are in half precision if that changes none of them.
    """
    convolutions, decoder = list(_convolutions(model)), list(_decoder(model))
    transform = np.asarray(model.capsule_layers[0].weight[...])
    arrays = [array for layer in convolutions for array in layer[:2]]
    arrays += [transform, *(array for layer in decoder for array in layer[:2])]
    weights = np.concatenate([array.ravel() for array in arrays]).astype("<f4")
    with np.errstate(over="ignore"):
        half = weights.astype("<f2")
    weights = half if np.array_equal(half, weights) else weights
    layout = {
        "type": weights.dtype.name,
        "image_size": model.config.image_shape[:2],
        "convolutions": [{"shape": layer.kernel.shape, "stride": layer.stride} for layer in convolutions],
        "transform": transform.shape,
        "decoder": [{"shape": layer.kernel.shape, "stride": layer.stride} for layer in decoder],
        "squash": model.config.primary_squash,
        "activation": model.config.primary_activation,
    }
    return layout, weights.tobytes()


def _convolutions(model: CapsNet) -> Iterator[Layer]:
    """Compute the convolutions of stem and primary capsules; each includes the batch normalization below it."""
    factor, shift = np.ones(1), np.zeros(1)  # of the channels, by the batch normalization below
    for number, convolution in enumerate(model.stem.convolutions):
        yield _normalized(convolution, factor, shift)
        if model.stem.norms:
            norm: Any = model.stem.norms[number]  # in Flax, scale and bias may be None
            mean, variance, scale, bias = (
                np.asarray(each[...], np.float64) for each in (norm.mean, norm.var, norm.scale, norm.bias)
            )
            factor = scale / np.sqrt(variance + norm.epsilon)
            shift = bias - factor * mean
    primary = model.primary_capsules
    kernel, bias, stride = _normalized(primary.convolution, factor, shift)
    own = np.asarray(primary.convolution.bias[...], np.float64)
    unscaled = 0 if primary.squash == "none" else (1 - primary.scale) * own  # with a squash, the bias is not scaled
    yield Layer(primary.scale * kernel, primary.scale * bias + unscaled, stride)


def _normalized(
    convolution: Any, factor: Float[np.ndarray, " channels"], shift: Float[np.ndarray, " channels"]
) -> Layer:
    """Compute a convolution that multiplies and shifts its input channels first."""
    kernel, bias = (np.asarray(each[...], np.float64) for each in (convolution.kernel, convolution.bias))
    shifted = (kernel * shift[:, None]).sum(axis=(0, 1, 2))
    return Layer(kernel * factor[:, None], bias + shifted, convolution.stride)


def _decoder(model: CapsNet) -> Iterator[Layer]:
    """Compute the dense layers of the decoder, if there is one."""
    decoder = model.decoder
    if decoder is None:
        return
    kernels = (
        rearrange(np.asarray(decoder.from_capsules[...]), "o h features -> 1 1 (o h) features"),
        rearrange(np.asarray(decoder.hidden_weight[...]), "inputs features -> 1 1 inputs features"),
        rearrange(np.asarray(decoder.to_pixels[...]), "inputs ... -> 1 1 inputs (...)"),
    )
    outer = (decoder.first_bias, decoder.pixel_bias) if decoder.outer_bias else (None, None)
    for kernel, bias in zip(kernels, (outer[0], decoder.hidden_bias, outer[1]), strict=True):
        yield Layer(kernel, np.zeros(kernel.shape[-1]) if bias is None else np.ravel(bias[...]))
