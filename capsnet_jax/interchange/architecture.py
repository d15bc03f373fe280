"""Infer a model config from the shapes of its weights."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
from jaxtyping import Shaped

from capsnet_jax.config import ModelConfig
from capsnet_jax.errors import UsageError
from capsnet_jax.interchange.state_files import CONFIG

Shapes = Mapping[str, tuple[int, ...]]
STEM, HIDDEN, CLASSES = "encoder.image2primary_capsules", "encoder.hidden_capsules", "encoder.primary2digit_capsules"
FROM_CAPSULES, TO_PIXELS = "decoder.0.weight", "decoder.4.weight"
ACTIVATIONS: tuple[Literal["norm", "sigmoid"], ...] = ("norm", "sigmoid")


def infer_architecture(
    state: Mapping[str, Shaped[np.ndarray, "..."]],
    config: ModelConfig,
    *,
    image_shape: tuple[int, int, int] | None = None,
) -> ModelConfig:
    """Infer the config of a model with dense capsule layers from the shapes of its weights.

    Shapes determine the sizes of all layers, the number of classes and, with a decoder, the shape of the images. The
    number of primary capsules then determines their stride, and whether they have a channel for the activation. Strides
    of the stem, scale, squash and routing are taken from the given config.

    Args:
        state: an array for each name of the PyTorch model's state_dict.
        config: source of what shapes do not determine, such as the config of a preset.
        image_shape: height, width and number of channels of the images, for weights without a decoder.

    Raises:
        UsageError: the shapes are not sufficient, or contradict each other.
    """
    shapes = {name: array.shape for name, array in state.items()}
    if not any(name.startswith("encoder.") for name in shapes):
        raise UsageError(
            f"The weights have no entry that begins with 'encoder.', but {next(iter(shapes), 'none at all')}; expected "
            "the names of the PyTorch model, or two files, encoder and decoder."
        )
    *below, (stem_channels, _, stem_kernel), (primary_channels, seen, primary_kernel) = _convolutions(shapes)
    layers = _capsule_layers(shapes)
    first, last = layers[0], layers[-1]
    has_decoder = any(name.startswith("decoder.") for name in shapes)
    model = replace(
        config,
        image_shape=_image_shape(shapes, has_decoder, image_shape),
        num_classes=last[2],
        stem_below=tuple((outputs, kernel) for outputs, _, kernel in below),
        stem_channels=stem_channels,
        stem_kernel=stem_kernel,
        batch_norm=any(name.startswith(STEM) and name.endswith(".running_mean") for name in shapes),
        primary_dim=first[1],
        primary_kernel=primary_kernel,
        # A depthwise kernel sees one channel; if there is only one, both kinds are the same.
        primary_depthwise=seen < stem_channels or (stem_channels == 1 and config.primary_depthwise),
        conv_capsules=(),
        matrix_poses=False,
        hidden_capsules=tuple((outputs, size) for _, _, outputs, size in layers[:-1]),
        class_dim=last[3],
        shared_class_transform=False,
        decoder_hidden=(_shape(shapes, FROM_CAPSULES, 3)[-1], _shape(shapes, TO_PIXELS, 4)[0]) if has_decoder else None,
        decoder_bias="decoder.0.bias" in shapes if has_decoder else config.decoder_bias,
    )
    return _with_primary_capsules(model, primary_channels, first[0])


def _convolutions(shapes: Shapes) -> list[tuple[int, int, int]]:
    """Output channels, input channels and kernel size of each convolution, up to that of the primary capsules."""
    names = [f"{STEM}.{number}.weight" for number in _numbers(STEM, shapes)]
    names = [name for name in names if len(shapes.get(name, ())) != 1]  # weights of batch normalization have one axis
    if len(names) < 2:
        names = [f"{STEM}.{number}.weight" for number in (0, 2)]  # the least that a model has, to name what is missing
    convolutions = []
    for name in names:
        outputs, inputs, height, width = _shape(shapes, name, 4)
        if height != width:
            raise UsageError(f"The weight {name} has a kernel of {height} x {width}; expected a square one.")
        convolutions.append((outputs, inputs, height))
    return convolutions


def _capsule_layers(shapes: Shapes) -> list[tuple[int, ...]]:
    """Number and pose size of the input and of the output capsules of each layer, up to the class capsules."""
    names = [*(f"{HIDDEN}.{number}" for number in _numbers(HIDDEN, shapes)), CLASSES]
    for name in names:
        if f"{name}.weight" in shapes:
            raise UsageError(
                f"The weight {name}.weight is of convolutional capsules, whose sizes it does not determine; expected "
                f"a {CONFIG} beside them."
            )
    return [_shape(shapes, f"{name}.input_caps2U.weight", 4) for name in names]


def _image_shape(shapes: Shapes, has_decoder: bool, given: tuple[int, int, int] | None) -> tuple[int, int, int]:
    found = given
    if has_decoder:
        _, channels, height, width = _shape(shapes, TO_PIXELS, 4)
        found = (height, width, channels)
    if found is None:
        raise UsageError(
            "The weights have no decoder, which would determine the shape of the images; expected --image-shape HEIGHT "
            f"WIDTH CHANNELS, or a {CONFIG} beside them."
        )
    if given not in (None, found):
        raise UsageError(f"The weight {TO_PIXELS} is of images of shape {found}; --image-shape is {given}.")
    channels = _convolutions(shapes)[0][1]
    if channels != found[-1]:
        raise UsageError(f"The weight {STEM}.0.weight is of {channels} channels; the images are of shape {found}.")
    return found


def _with_primary_capsules(model: ModelConfig, channels: int, capsules: int) -> ModelConfig:
    """Find groups, activation and stride of the primary capsules from the numbers of capsules and of channels.

    Activation and stride of the given config are preferred.
    """
    for activation in sorted(ACTIVATIONS, key=lambda activation: activation != model.primary_activation):
        groups, rest = divmod(channels, model.primary_dim + (activation == "sigmoid"))
        grids = {
            stride: replace(model, primary_stride=stride).primary_grid
            for stride in (model.primary_stride, *range(1, max(model.image_shape[:2])))
        }
        strides = [stride for stride, grid in grids.items() if rest == 0 and math.prod(grid) * groups == capsules]
        if model.primary_stride in strides:
            strides = [model.primary_stride]
        if len(strides) > 1 and capsules > groups:  # at a single position, any stride is the same
            raise UsageError(
                f"The weights do not determine the stride of the primary capsules: {', '.join(map(str, strides))} make "
                f"{capsules} of images of shape {model.image_shape}; expected a {CONFIG} beside them."
            )
        if strides:
            return replace(model, primary_groups=groups, primary_activation=activation, primary_stride=strides[0])
    raise UsageError(
        f"The weights are of {capsules} primary capsules, which no stride makes of {channels} channels and images of "
        f"shape {model.image_shape}; expected another --preset, or a {CONFIG} beside them."
    )


def _numbers(prefix: str, shapes: Shapes) -> list[int]:
    """The numbers that follow a prefix in names."""
    parts = {name.removeprefix(f"{prefix}.").partition(".")[0] for name in shapes if name.startswith(f"{prefix}.")}
    return sorted(int(part) for part in parts if part.isdecimal())


def _shape(shapes: Shapes, name: str, axes: int) -> tuple[int, ...]:
    """The shape of an entry that must be there, with this number of axes."""
    if name not in shapes:
        raise UsageError(f"The weights lack {name}.")
    if len(shapes[name]) != axes or 0 in shapes[name]:
        raise UsageError(f"The weight {name} is {shapes[name]}; expected {axes} axes.")
    return shapes[name]
