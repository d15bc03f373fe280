"""Options of a run, as frozen dataclasses: the only place where defaults are defined."""

import dataclasses
import difflib
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
from tyro.conf import Suppress, arg  # Suppress hides what the command line takes from the data set
from tyro.constructors import PrimitiveConstructorSpec

from capsnet_jax.capsules import Routed
from capsnet_jax.errors import UsageError

_TEXT: PrimitiveConstructorSpec[Any] = PrimitiveConstructorSpec(
    nargs=1,
    metavar="STR",
    instance_from_str=lambda arguments: arguments[0],
    is_instance=lambda value: isinstance(value, str),
    str_from_instance=lambda value: [value],
)
"""Read a routing from the command line as text. Functions are accepted in Python only."""

# Options that configs, checkpoints and comparisons of earlier versions do not have; they are left out if they are off.
LATER = {"data": ("transpose",), "training": ("freeze",)}
MAX_SIZE = 1_000_000  # of anything: larger ones come from typing errors or damaged files
MAX_PIXELS = 100_000_000  # values of one image, 400 MB
MAX_SEED = 2**32 - 1  # JAX makes keys from 32 bits


def _check(config: Any, fits: bool, name: str, expected: str) -> None:
    if not fits:
        raise UsageError(f"{name} is {getattr(config, name)}, and must be {expected}.")


def _check_at_least(config: Any, smallest: int, *names: str) -> None:
    for name in names:
        _check(config, getattr(config, name) >= smallest, name, f"at least {smallest}")


def _check_at_most(config: Any, largest: int, *names: str) -> None:
    for name in names:
        _check(config, getattr(config, name) <= largest, name, f"at most {largest}")


def _check_types(config: Any) -> None:
    """Check the type of every field, as the values may come from a file or a user's program."""
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not _is_of(value, kind):
            raise UsageError(f"{name} is {value!r}; expected {_describe(kind)}.")


def _is_of(value: Any, kind: Any) -> bool:
    """Return whether a value is of an annotated type. Whole numbers count as floats; bools do not count as numbers."""
    choices = get_args(kind)
    if get_origin(kind) is UnionType:
        return any(_is_of(value, choice) for choice in choices)
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in choices
    if get_origin(kind) is Callable:
        return callable(value)
    if get_origin(kind) is tuple:
        kinds = choices[:1] * len(value) if isinstance(value, tuple) and choices[-1] is ... else choices
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_is_of, value, kinds))
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if kind is float:
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        return is_number and bool(-sys.float_info.max <= value <= sys.float_info.max)  # unlike isfinite, of any int
    return isinstance(value, kind)


def _describe(kind: Any) -> str:
    """Describe an annotated type as in JSON, for error messages."""
    choices = get_args(kind)
    if get_origin(kind) is UnionType:
        return " or ".join(map(_describe, choices))
    if get_origin(kind) is Literal:
        return ", ".join(choices)
    if get_origin(kind) is tuple:
        return f"[{', '.join('...' if choice is ... else _describe(choice) for choice in choices)}]"
    return {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}.get(kind, "a path")


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of the network. The defaults are the reference model.

    Raises:
        UsageError: a size is less than 1, or a value is not one of the choices.

    Examples:
        >>> from capsnet_jax import ModelConfig
        >>> config = ModelConfig(image_shape=(28, 28, 1), num_classes=10, routing="em", num_iterations=2)
        >>> config.primary_grid  # positions of the primary capsules
        (6, 6)
        >>> ModelConfig(class_dim=0)
        Traceback (most recent call last):
            ...
        capsnet_jax.errors.UsageError: class_dim is 0, and must be at least 1.
    """

    image_shape: Suppress[tuple[int, int, int]] = (28, 28, 1)
    """Height, width and number of channels of the images."""
    num_classes: Suppress[int] = 10
    """Number of classes; each has one capsule."""
    routing: Annotated[str | Callable[..., Routed], _TEXT] = "dynamic"
    """Routing algorithm (see the table below) or your own, as package.module:function."""
    num_iterations: int = 3
    """Number of routing iterations."""
    stem_below: tuple[tuple[int, int], ...] = ()
    """Channels and kernel size of each stem convolution before the last one; their stride is 1."""
    stem_channels: int = 256
    """Channels of the last convolution of the stem."""
    stem_kernel: int = 9
    """Kernel size of the last convolution of the stem."""
    stem_stride: int = 1
    """Stride of the last convolution of the stem."""
    batch_norm: bool = False
    """Batch normalization after each convolution of the stem."""
    primary_groups: int = 32
    """Number of primary capsules at each position."""
    primary_dim: int = 8
    """Pose size of the primary capsules."""
    primary_kernel: int = 9
    """Kernel size of the primary capsules."""
    primary_stride: int = 2
    """Stride of the primary capsules."""
    primary_scale: float = 0.01
    """Factor that multiplies the primary poses. Routing has almost no effect on very short poses."""
    primary_depthwise: bool = False
    """Depthwise convolution for the primary capsules; needs groups x pose size = stem channels."""
    primary_squash: Literal["none", "squash", "exponential"] = "none"
    """Squashing function of the primary poses, applied after scale and bias."""
    primary_activation: Literal["norm", "sigmoid"] = "norm"
    """Activation of a primary capsule: the norm of its pose, or the sigmoid of an extra channel."""
    conv_capsules: tuple[tuple[int, int, int, int], ...] = ()
    """Convolutional capsule layers: groups, pose size, kernel size and stride of each."""
    hidden_capsules: tuple[tuple[int, int], ...] = ()
    """Capsule layers below the class capsules: number of capsules and pose size of each."""
    matrix_poses: bool = False
    """Use square matrices as poses above the primary capsules, for example 4 x 4 for pose size 16."""
    class_dim: int = 16
    """Pose size of the class capsules."""
    shared_class_transform: bool = False
    """Share the class transformation between all positions, and add coordinates to the votes."""
    decoder_hidden: tuple[int, int] | None = (512, 1024)
    """Widths of the two hidden layers of the decoder; None for no decoder."""
    decoder_bias: bool = False
    """Add a bias to the first and the last layer of the decoder."""
    initial_weights: Literal["torch", "official"] = "torch"
    """Distributions of the initial weights: PyTorch's, or those of the authors of dynamic routing."""
    standardize_images: bool = False
    """Normalize each image to mean 0 and standard deviation 1. Reconstructions stay in [0, 1]."""
    routing_implementation: Literal["auto", "votes", "fused"] = "auto"
    """Dynamic routing from stored votes, or fused without them (less memory); auto picks the faster."""
    recompute_routing: bool = False
    """Recompute votes and routing in the backward pass: less memory, more time."""

    def __post_init__(self) -> None:
        _check_types(self)
        sizes = ["num_classes", "stem_channels", "stem_kernel", "stem_stride", "primary_groups", "primary_dim"]
        sizes += ["primary_kernel", "primary_stride", "class_dim", "num_iterations"]
        _check_at_least(self, 1, *sizes)
        _check_at_most(self, MAX_SIZE, *sizes)
        for name in ("image_shape", "stem_below", "conv_capsules", "hidden_capsules", "decoder_hidden"):
            numbers = np.ravel(getattr(self, name) or ())
            fits = bool(((numbers >= 1) & (numbers <= MAX_SIZE)).all())
            _check(self, fits, name, f"of sizes of at least 1 and at most {MAX_SIZE}")
        pixels = math.prod(self.image_shape)
        _check(self, pixels <= MAX_PIXELS, "image_shape", f"of at most {MAX_PIXELS} values")

    @classmethod
    def of(cls, *sizes: Any, **fields: Any) -> "ModelConfig":
        """Create a config from keyword arguments; lists, as in JSON, become tuples.

        Args:
            sizes: `image_shape` and `num_classes`, which may also be given by name.
            fields: any fields, by name.

        Raises:
            UsageError: there is no such field, or a value is wrong.
        """
        given = dict(zip(("image_shape", "num_classes"), sizes, strict=False))
        if len(sizes) > len(given) or given.keys() & fields.keys():
            raise UsageError(
                f"The model got {sizes} by position and {', '.join(fields) or 'nothing'} by name; expected image_shape "
                "and num_classes, each once, and all other fields by name."
            )
        fields |= given
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
                raise UsageError(f"The model has no field {name!r}; the nearest is {nearest!r}.")
        return cls(**{name: _as_tuples(value) for name, value in fields.items()})

    @property
    def stem_convolutions(self) -> tuple[tuple[int, int, int], ...]:
        """Number of channels, kernel size and stride of each convolution of the stem."""
        last = (self.stem_channels, self.stem_kernel, self.stem_stride)
        return (*((channels, kernel, 1) for channels, kernel in self.stem_below), last)

    @property
    def primary_grid(self) -> tuple[int, int]:
        """Number of positions of the primary capsules, along height and width.

        Raises:
            UsageError: the images are too small for the convolutions.
        """
        below = [(kernel, stride) for _, kernel, stride in self.stem_convolutions]
        below.append((self.primary_kernel, self.primary_stride))
        kernels = below + [(kernel, stride) for _, _, kernel, stride in self.conv_capsules]
        smallest = 1
        for kernel, stride in reversed(kernels):
            smallest = (smallest - 1) * stride + kernel
        height, width, _ = self.image_shape
        if min(height, width) < smallest:
            raise UsageError(
                f"Images of {height} x {width} are too small: the convolutions of this model, of kernel sizes "
                f"{', '.join(str(kernel) for kernel, _ in kernels)}, need at least {smallest} x {smallest}."
            )
        for kernel, stride in below:
            height, width = (height - kernel) // stride + 1, (width - kernel) // stride + 1
        return height, width


@dataclass(frozen=True)
class DataConfig:
    """Data set and augmentation."""

    dataset: str = "digits"
    """Name or path of the data set, one of:
    digits (part of scikit-learn); mnist, fashion_mnist, kmnist;
    the prefix of other idx files, such as emnist-letters;
    multi_mnist, affine_mnist (made from mnist);
    any other image data set of tensorflow-datasets;
    a folder with one folder of images for each class;
    an .npz file with x_train, y_train, x_test, y_test."""
    data_dir: Path | None = None
    """Folder with the idx files of the data set, or with tensorflow-datasets."""
    augment: tuple[str, ...] = ("shift=0.1",)
    """Augmentations of the training images (see the table below); without a value, none."""
    validation: float = 0.0
    """Fraction of the training images held out for validation. The weights that are best on them are saved."""
    image_size: tuple[int, int] | None = None
    """Resize the images of a folder to this height and width."""
    transpose: bool = False
    """Swap rows and columns of all images, because those of EMNIST are published that way."""
    train_limit: int | None = None
    """Use only this many training images, from the start of the set."""
    stream: Annotated[bool | None, arg(help_behavior_hint="(default: if they need half of the device's memory)")] = None
    """Send training images to the device chunk by chunk instead of all at once."""

    def __post_init__(self) -> None:
        _check_types(self)
        size = self.image_size or (1, 1)
        _check(self, self.dataset != "", "dataset", "the name or path of a data set")
        _check(self, 0 <= self.validation < 1, "validation", "at least 0 and less than 1")
        _check(self, self.train_limit is None or self.train_limit >= 1, "train_limit", "at least 1")
        _check(self, min(size) >= 1, "image_size", "at least 1")
        _check(self, math.prod(size) <= MAX_PIXELS, "image_size", f"of at most {MAX_PIXELS} pixels")


@dataclass(frozen=True)
class TrainingConfig:
    """Optimization: epochs, batches, loss and Adam.

    Raises:
        UsageError: a value is out of its range, or not one of the choices.

    Examples:
        >>> from capsnet_jax import TrainingConfig
        >>> config = TrainingConfig(epochs=5, batch_size=128, schedule="cosine", clip_norm=1.0)
        >>> config.learning_rate
        0.001
        >>> TrainingConfig(batch_size=10, accumulate=3)
        Traceback (most recent call last):
            ...
        capsnet_jax.errors.UsageError: accumulate is 3, and must be a divisor of batch_size, which is 10.
    """

    epochs: int = 10
    """Number of passes over the training images."""
    batch_size: int = 64
    """Images per training step. The incomplete last batch of an epoch is skipped."""
    learning_rate: float = 1e-3
    """Learning rate of Adam."""
    seed: int = 0
    """Seed of the initial weights, the order of the images and the augmentation."""
    schedule: Literal["constant", "exponential", "cosine"] = "constant"
    """Learning rate schedule. Cosine decays to the floor over the whole run."""
    learning_rate_decay: float = 0.96
    """Factor of the exponential schedule."""
    learning_rate_decay_steps: int = 2000
    """Number of steps over which the exponential schedule applies its factor once."""
    learning_rate_floor: float = 0.0
    """Smallest learning rate of a schedule."""
    warmup_steps: int = 0
    """Number of first steps over which the learning rate rises linearly."""
    clip_norm: float | None = None
    """Largest global norm of the gradients; larger gradients are scaled down."""
    ema_decay: float = 0.0
    """Decay of a moving average of the weights, which is evaluated and saved; 0 for none."""
    loss: Literal["margin", "spread"] = "margin"
    """Loss of the class capsules."""
    freeze: tuple[str, ...] = ()
    """Layers whose weights stay fixed, such as stem primary_capsules; a wrong name lists all."""
    reconstruction_weight: float = 10.0
    """Weight of the reconstruction loss. The paper uses 0.0005 x sum = 0.392 x mean on MNIST."""
    reconstruction_error: Literal["mean", "sum"] = "mean"
    """Reduce the squared errors of the pixels by mean or by sum."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Dtype of convolutions and matrix products in training. All else is float32."""
    accumulate: int = 1
    """Number of micro-batches per step; their gradients are averaged. Saves memory."""
    steps_per_chunk: int = 0
    """Training steps per compiled program; 0 chooses 1 on CPU, and up to an epoch or 1,000 elsewhere."""
    save_minutes: float = 1.0
    """Minutes between checkpoints; 0 for one after every chunk of steps."""
    keep_checkpoints: int = 2
    """Number of latest checkpoints to keep, in addition to the one that is best on validation images."""

    def __post_init__(self) -> None:
        _check_types(self)
        _check_at_least(self, 1, "epochs", "batch_size", "accumulate", "learning_rate_decay_steps", "keep_checkpoints")
        _check_at_least(self, 0, "reconstruction_weight", "steps_per_chunk", "seed", "learning_rate_floor")
        _check_at_least(self, 0, "warmup_steps", "save_minutes")
        _check_at_most(self, MAX_SEED, "seed")
        floor_fits = self.learning_rate_floor <= self.learning_rate
        divides = self.batch_size % self.accumulate == 0
        _check(self, self.learning_rate > 0, "learning_rate", "more than 0")
        _check(self, self.clip_norm is None or self.clip_norm > 0, "clip_norm", "more than 0")
        _check(self, floor_fits, "learning_rate_floor", f"at most the learning_rate, {self.learning_rate}")
        _check(self, 0 < self.learning_rate_decay < 1, "learning_rate_decay", "more than 0 and less than 1")
        _check(self, 0 <= self.ema_decay < 1, "ema_decay", "at least 0 and less than 1")
        _check(self, divides, "accumulate", f"a divisor of batch_size, which is {self.batch_size}")


@dataclass(frozen=True)
class Config:
    """All options of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def with_sizes(self, image_shape: tuple[int, int, int], num_classes: int) -> "Config":
        """Return this config for images of another shape and another number of classes."""
        model = dataclasses.replace(self.model, image_shape=image_shape, num_classes=num_classes)
        return dataclasses.replace(self, model=model)

    def to_json(self) -> dict[str, Any]:
        """Convert to a dictionary that `json.dumps` accepts."""
        fields = dataclasses.asdict(self)
        fields["data"]["data_dir"] = None if self.data.data_dir is None else str(self.data.data_dir)
        for section, names in LATER.items():
            for name in names:
                if not fields[section][name]:
                    del fields[section][name]
        return fields

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Config":
        """Create a config from the result of `to_json`; options that are missing have their defaults.

        Raises:
            UsageError: a section is missing, or an option is unknown or has a wrong value.
        """
        sections = {}
        for section, kind in get_type_hints(cls).items():
            options = fields.get(section)
            if not isinstance(options, Mapping):
                raise UsageError(f"{section} is {options!r}; expected options by name.")
            options = {name: _as_tuples(value) for name, value in options.items()}
            unknown = options.keys() - {field.name for field in dataclasses.fields(kind)}
            if unknown:
                raise UsageError(f"{section} has the unknown option {min(unknown)!r}.")
            if isinstance(options.get("data_dir"), str):
                options["data_dir"] = Path(options["data_dir"])
            sections[section] = kind(**options)
        return cls(**sections)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List the fields of two JSON configs that differ, each as "name was ... and is ..."."""
    old, new = _flat(before), _flat(now)
    return [
        f"{name} was {old.get(name, 'not there')} and is {new.get(name, 'not there')}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, ...) != new.get(name, ...)
    ]


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    flattened: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(fields)).items():
        flattened |= value if isinstance(value, dict) else {name: value}
    return flattened
