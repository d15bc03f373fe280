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


def infer_architecture(
    state: Mapping[str, Shaped[np.ndarray, "..."]],
    config: ModelConfig,
    *,
    image_shape: tuple[int, int, int] | None = None,
) -> ModelConfig:
    """Infer the config of a model from its weights: dense capsule layers above convolutions.

    The weights tell the sizes of all layers, the number of classes and, by the decoder, the shape of the images. The
    stride of the primary capsules, and whether they have a channel for the activation, follow from the number of
    capsules. What no weight tells is taken from the given config: strides of the stem, scale, squash and routing.

    Args:
        state: an array for each name of the PyTorch model's state_dict.
        config: that of a preset, say.
        image_shape: height, width and number of channels of the images, for weights without a decoder.

    Raises:
        UsageError: the weights do not tell enough, or contradict each other; the message names the entry.
    """
    shapes = {name: array.shape for name, array in state.items()}
    if not any(name.startswith("encoder.") for name in shapes):
        raise UsageError(
            f"The weights have no entry that begins with 'encoder.', but {next(iter(shapes), 'none at all')}; expected "
            "the names of the PyTorch model, or two files, encoder and decoder."
        )
    *stem, primary = _convolutions(shapes)
    layers = _capsule_layers(shapes)
    first_layer, (*_, num_classes, class_dim) = layers[0], layers[-1]
    image_shape = _image_shape(shapes, image_shape)
    model = replace(
        config,
        image_shape=image_shape,
        num_classes=num_classes,
        stem_below=tuple((outputs, kernel) for outputs, _, kernel in stem[:-1]),
        stem_channels=stem[-1][0],
        stem_kernel=stem[-1][2],
        batch_norm=any(name.startswith(STEM) and name.endswith(".running_mean") for name in shapes),
        primary_dim=first_layer[1],
        primary_kernel=primary[2],
        # With one channel there is no difference.
        primary_depthwise=primary[1] < stem[-1][0] or (stem[-1][0] == 1 and config.primary_depthwise),
        conv_capsules=(),
        matrix_poses=False,
        hidden_capsules=tuple((outputs, size) for _, _, outputs, size in layers[:-1]),
        class_dim=class_dim,
        shared_class_transform=False,
        decoder_hidden=None,
    )
    if _has_decoder(shapes):
        widths = _shape(shapes, FROM_CAPSULES, 3)[-1], _shape(shapes, TO_PIXELS, 4)[0]
        model = replace(model, decoder_hidden=widths, decoder_bias="decoder.0.bias" in shapes)
    return _with_primary_capsules(model, primary[0], first_layer[0])


def _convolutions(shapes: Shapes) -> list[tuple[int, int, int]]:
    """Outputs, inputs and kernel size of each convolution, up to the one of the primary capsules."""
    # Those of a batch normalisation have one axis.
    names = [f"{STEM}.{number}.weight" for number in _numbers(STEM, shapes)]
    names = [name for name in names if len(shapes.get(name, ())) != 1]
    if len(names) < 2:
        names = [f"{STEM}.{number}.weight" for number in (0, 2)]  # the fewest, of which one is told to be missing
    convolutions = []
    for name in names:
        outputs, inputs, height, width = _shape(shapes, name, 4)
        if height != width:
            raise UsageError(f"The weight {name} has a kernel of {height} x {width}; expected a square one.")
        convolutions.append((outputs, inputs, height))
    return convolutions


def _capsule_layers(shapes: Shapes) -> list[tuple[int, ...]]:
    """Input capsules, their pose size, output capsules and theirs, of each layer up to the class capsules."""
    names = [*(f"{HIDDEN}.{number}" for number in _numbers(HIDDEN, shapes)), CLASSES]
    for name in names:
        if f"{name}.weight" in shapes:
            raise UsageError(
                f"The weight {name}.weight is of convolutional capsules, of which weights do not tell enough; expected "
                f"a {CONFIG} beside them."
            )
    return [_shape(shapes, f"{name}.input_caps2U.weight", 4) for name in names]


def _image_shape(shapes: Shapes, given: tuple[int, int, int] | None) -> tuple[int, int, int]:
    told = given
    if _has_decoder(shapes):
        _, channels, height, width = _shape(shapes, TO_PIXELS, 4)
        told = (height, width, channels)
    if told is None:
        raise UsageError(
            "The weights have no decoder, and do not tell the shape of the images; expected --image-shape HEIGHT WIDTH "
            f"CHANNELS, or a {CONFIG} beside them."
        )
    if given not in (None, told):
        raise UsageError(f"The weight {TO_PIXELS} is of images of shape {told}; --image-shape is {given}.")
    channels = _convolutions(shapes)[0][1]
    if channels != told[-1]:
        raise UsageError(f"The weight {STEM}.0.weight is of {channels} channels; the images are of shape {told}.")
    return told


def _with_primary_capsules(model: ModelConfig, channels: int, capsules: int) -> ModelConfig:
    """The model with as many primary capsules, in groups that have so many channels together.

    What the config says of stride and activation is kept if it can be.
    """
    activations: list[Literal["norm", "sigmoid"]] = ["norm", "sigmoid"]
    activations.sort(key=lambda activation: activation != model.primary_activation)
    for activation in activations:
        groups, rest = divmod(channels, model.primary_dim + (activation == "sigmoid"))
        strides = []
        for stride in (model.primary_stride, *range(1, max(model.image_shape[:2]))):
            grid = replace(model, primary_stride=stride).primary_grid
            if rest == 0 and math.prod(grid) * groups == capsules:
                strides.append(stride)
        if strides and strides[0] != model.primary_stride and len(strides) > 1 and capsules > groups:
            raise UsageError(
                f"The weights do not tell the stride of the primary capsules: {', '.join(map(str, strides))} make "
                f"{capsules} of images of shape {model.image_shape}; expected a {CONFIG} beside them."
            )
        if strides:
            return replace(model, primary_groups=groups, primary_activation=activation, primary_stride=strides[0])
    raise UsageError(
        f"The weights are of {capsules} primary capsules, which no stride makes of {channels} channels and images of "
        f"shape {model.image_shape}; expected another --preset, or a {CONFIG} beside them."
    )


def _has_decoder(shapes: Shapes) -> bool:
    return any(name.startswith("decoder.") for name in shapes)


def _numbers(prefix: str, shapes: Shapes) -> list[int]:
    """The numbers that follow a prefix in names."""
    parts = {name.removeprefix(f"{prefix}.").partition(".")[0] for name in shapes if name.startswith(f"{prefix}.")}
    return sorted(int(part) for part in parts if part.isdecimal())


def _shape(shapes: Shapes, name: str, axes: int) -> tuple[int, ...]:
    """The shape of an entry that must be there, with so many axes."""
    if name not in shapes:
        raise UsageError(f"The weights lack {name}.")
    if len(shapes[name]) != axes or 0 in shapes[name]:
        raise UsageError(f"The weight {name} is {shapes[name]}; expected {axes} axes.")
    return shapes[name]
