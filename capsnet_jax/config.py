"""Everything a run depends on, as frozen dataclasses; the one home of every default."""

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from tyro.conf import Suppress  # of what the command line takes from the data set
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
"""How the command line reads a routing: by its name; a function is for Python only."""


def _at_least(config: Any, smallest: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not value >= smallest:
            raise UsageError(f"{name} is {value}, and must be at least {smallest}.")


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value


def _among_choices(config: type, fields: Mapping[str, Any]) -> None:
    for name, kind in get_type_hints(config).items():
        if get_origin(kind) is Literal and name in fields and fields[name] not in get_args(kind):
            raise UsageError(f"{name} is {fields[name]!r}; expected {', '.join(get_args(kind))}.")


@dataclass(frozen=True)
class ModelConfig:
    """The network; the defaults are the reference model."""

    image_shape: Suppress[tuple[int, int, int]] = (28, 28, 1)
    """Height, width and number of channels of the images."""
    num_classes: Suppress[int] = 10
    """Number of classes, each with one capsule."""
    stem_below: tuple[tuple[int, int], ...] = ()
    """Number of channels and kernel size of each convolution, of stride 1, below the last one of the stem."""
    stem_channels: int = 256
    """Number of channels of the last convolution of the stem."""
    stem_kernel: int = 9
    """Kernel size of that convolution, in pixels."""
    stem_stride: int = 1
    """Stride of that convolution."""
    batch_norm: bool = False
    """Batch normalisation after each convolution of the stem."""
    primary_groups: int = 32
    """Number of primary capsules at each position."""
    primary_dim: int = 8
    """Pose size of the primary capsules."""
    primary_kernel: int = 9
    """Kernel size of the primary capsules."""
    primary_stride: int = 2
    """Stride of the primary capsules."""
    primary_scale: float = 0.01
    """Factor of the primary poses; routing has next to no effect while they are short."""
    primary_depthwise: bool = False
    """Each channel of the primary capsules sees only one channel of the stem; needs as many as there are."""
    primary_squash: Literal["none", "squash", "exponential"] = "none"
    """How primary poses are squashed, after scale and bias."""
    primary_activation: Literal["norm", "sigmoid"] = "norm"
    """Activation of primary capsules: the length of the pose, or the sigmoid of a channel of its own."""
    conv_capsules: tuple[tuple[int, int, int, int], ...] = ()
    """Groups, pose size, kernel size and stride of each layer of convolutional capsules above the primary ones."""
    matrix_poses: bool = False
    """Poses above the primary capsules are square matrices, 4 x 4 for a pose size of 16, and not vectors."""
    hidden_capsules: tuple[tuple[int, int], ...] = ()
    """Number and pose size of the capsules of each layer between these and the class capsules."""
    class_dim: int = 16
    """Pose size of the class capsules."""
    shared_class_transform: bool = False
    """A group of capsules votes for classes by one transformation at all positions, plus its coordinates."""
    decoder_hidden: tuple[int, int] | None = (512, 1024)
    """Widths of the two hidden layers of the decoder; None for no decoder."""
    decoder_bias: bool = False
    """A bias in the outer layers of the decoder, too."""
    initial_weights: Literal["torch", "official"] = "torch"
    """Distribution of the initial weights: PyTorch's, or that of the authors of dynamic routing."""
    routing: Annotated[str | Callable[..., Routed], _TEXT] = "dynamic"
    """Routing algorithm, or your own as package.module:function; options follow after commas. They are listed above."""
    num_iterations: int = 3
    """Number of routing iterations."""
    standardize_images: bool = False
    """Each image by itself is given mean 0 and deviation 1 before the first layer; reconstructions stay in [0, 1]."""
    routing_implementation: Literal["auto", "votes", "fused"] = "auto"
    """How dynamic routing is computed: from votes, without them in little memory, or as is best on this machine."""
    recompute_routing: bool = False
    """Votes and routing are computed again in the backward pass: less memory for more time."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "num_classes", "stem_channels", "stem_kernel", "stem_stride", "primary_groups")
        _at_least(self, 1, "primary_dim", "primary_kernel", "primary_stride", "class_dim", "num_iterations")
        for name in ("image_shape", "stem_below", "conv_capsules", "hidden_capsules", "decoder_hidden"):
            sizes = getattr(self, name) or ()
            if any(size < 1 for group in sizes for size in (group if isinstance(group, tuple) else (group,))):
                raise UsageError(f"{name} is {sizes}, and every size in it must be at least 1.")
        _among_choices(type(self), vars(self))

    @classmethod
    def of(cls, *sizes: Any, **fields: Any) -> "ModelConfig":
        """The config with these fields; `image_shape` and `num_classes` may be given by position, tuples as lists.

        Raises:
            UsageError: there is no such field, or a value is wrong.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        given = dict(zip(("image_shape", "num_classes"), sizes, strict=False))
        if len(sizes) > len(given) or given.keys() & fields.keys():
            raise UsageError(
                f"The model got {sizes} by position and {', '.join(fields) or 'nothing'} by name; expected image_shape "
                "and num_classes, each once, and all other fields by name."
            )
        fields |= given
        for name in fields:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
                raise UsageError(f"The model has no field {name!r}; the nearest is {nearest!r}.")
        _among_choices(cls, fields)
        if len(fields.get("image_shape", cls.image_shape)) != 3:
            raise UsageError(f"image_shape is {fields['image_shape']}; expected height, width and number of channels.")
        return cls(**{name: _as_tuples(value) for name, value in fields.items()})

    @property
    def stem_convolutions(self) -> tuple[tuple[int, int, int], ...]:
        """Number of channels, kernel size and stride of each convolution of the stem."""
        last = (self.stem_channels, self.stem_kernel, self.stem_stride)
        return (*((channels, kernel, 1) for channels, kernel in self.stem_below), last)

    @property
    def primary_grid(self) -> tuple[int, int]:
        """Height and width, in positions, of the primary capsules.

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
    """The images."""

    dataset: str = "digits"
    """digits (comes with scikit-learn); mnist, fashion_mnist, kmnist ... by their tensorflow-datasets name; multi_mnist
    or affine_mnist, made from mnist; or your own: a folder with a folder of images for each class, or an .npz file of
    x_train, y_train, x_test, y_test."""
    data_dir: Path | None = None
    """Folder of the four official idx files (.gz or not), or of prepared tensorflow-datasets; by default theirs."""
    image_size: tuple[int, int] | None = None
    """Height and width that the images of a folder are resized to; by default they must be of one size."""
    validation: float = 0.0
    """Share of the training images that is held out; the weights that do best on it are kept beside the last ones."""
    augment: tuple[str, ...] = ("shift=0.1",)
    """Random changes of training images, drawn anew in every epoch; none if empty. They are listed above."""
    train_limit: int | None = None
    """Only the first so many training images are used."""
    stream: bool | None = None
    """Whether batches come from the host's memory one after the other, and not the whole set to the device at once; by
    default only if the set would take more than half of the device's memory."""

    def __post_init__(self) -> None:
        if not 0 <= self.validation < 1:
            raise UsageError(f"validation is {self.validation}, and must be at least 0 and less than 1.")
        for name, value in (("train_limit", self.train_limit), ("image_size", self.image_size)):
            if value is not None and min(value if isinstance(value, tuple) else (value,)) < 1:
                raise UsageError(f"{name} is {value}, and must be at least 1.")


@dataclass(frozen=True)
class TrainingConfig:
    """The optimisation."""

    epochs: int = 10
    """Number of times that all training images are seen."""
    batch_size: int = 64
    """Number of images in a training step; the few that do not fill the last batch of an epoch are left out of it."""
    accumulate: int = 1
    """Parts that a batch is gone through in, one after the other, for memory; their gradients are averaged."""
    learning_rate: float = 1e-3
    """Step size of Adam."""
    schedule: Literal["constant", "exponential", "cosine"] = "constant"
    """How the step size falls: not at all, by a factor every so many steps, or as a cosine that would reach the
    floor after the last step."""
    learning_rate_decay: float = 0.96
    """That factor."""
    learning_rate_decay_steps: int = 2000
    """Number of training steps over which the step size falls by that factor."""
    learning_rate_floor: float = 0.0
    """The step size falls no further than this."""
    warmup_steps: int = 0
    """Training steps over which the step size first rises, in equal parts, of which the first step has one."""
    clip_norm: float | None = None
    """Gradients whose norm over all weights is larger are scaled down to it."""
    ema_decay: float = 0.0
    """Weights are averaged over training, each step counting by this factor less than the next; what is evaluated and
    kept is the average. 0 for none."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the operands of convolutions and matrix products in training; all else is float32, evaluation too."""
    loss: Literal["margin", "spread"] = "margin"
    """Loss of the class capsules."""
    reconstruction_weight: float = 10.0
    """Weight of the squared error of the pixels; the paper's 0.0005 x sum over 784 pixels is 0.392 x mean."""
    reconstruction_error: Literal["mean", "sum"] = "mean"
    """Whether that error is the mean over the pixels, or their sum."""
    steps_per_chunk: int = 0
    """Training steps run as one program between two looks at the losses; the last chunk of an epoch may have fewer.
    0 is one step on CPU, and an epoch elsewhere, but no more than 1,000 steps or, if streamed, 64 MB of images."""
    save_minutes: float = 1.0
    """Minutes between checkpoints, which --resume goes on from; 0 for one after every chunk. There is always one at the
    end, at a signal to stop, and for the best weights on validation."""
    keep_checkpoints: int = 2
    """Number of last checkpoints that are kept, besides the best."""
    seed: int = 0
    """Seed of initial weights, order of images and augmentation."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "epochs", "batch_size", "accumulate", "learning_rate_decay_steps", "keep_checkpoints")
        _at_least(self, 0, "reconstruction_weight", "steps_per_chunk", "seed", "learning_rate_floor")
        _at_least(self, 0, "warmup_steps", "save_minutes")
        if not self.learning_rate > 0:
            raise UsageError(f"learning_rate is {self.learning_rate}, and must be more than 0.")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UsageError(f"clip_norm is {self.clip_norm}, and must be more than 0.")
        if self.learning_rate_floor > self.learning_rate:
            raise UsageError(
                f"learning_rate_floor is {self.learning_rate_floor}, and must be at most the learning_rate, "
                f"{self.learning_rate}."
            )
        if not 0 < self.learning_rate_decay < 1:
            raise UsageError(
                f"learning_rate_decay is {self.learning_rate_decay}, and must be more than 0 and less than 1."
            )
        if not 0 <= self.ema_decay < 1:
            raise UsageError(f"ema_decay is {self.ema_decay}, and must be at least 0 and less than 1.")
        if self.batch_size % self.accumulate:
            raise UsageError(
                f"accumulate is {self.accumulate}, and must divide batch_size, which is {self.batch_size}."
            )
        _among_choices(type(self), vars(self))


@dataclass(frozen=True)
class Config:
    """A run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def with_sizes(self, image_shape: tuple[int, int, int], num_classes: int) -> "Config":
        """The same config for images of this shape in so many classes."""
        return dataclasses.replace(
            self, model=dataclasses.replace(self.model, image_shape=image_shape, num_classes=num_classes)
        )

    def to_json(self) -> dict[str, Any]:
        """The config in types that JSON has."""
        fields = dataclasses.asdict(self)
        fields["data"]["data_dir"] = None if self.data.data_dir is None else str(self.data.data_dir)
        return fields

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Config":
        """The config of what `to_json` gave.

        Raises:
            UsageError: a section or field is missing or unknown.
        """
        try:
            model, data = dict(fields["model"]), dict(fields["data"])
            data["data_dir"] = None if data["data_dir"] is None else Path(data["data_dir"])
            data["image_size"] = data["image_size"] and tuple(data["image_size"])
            data["augment"] = tuple(data["augment"])
            return cls(ModelConfig.of(**model), DataConfig(**data), TrainingConfig(**fields["training"]))
        except (KeyError, TypeError) as error:
            raise UsageError(f"Not the config of a run: {error}.") from error


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not the same in two configs, or other fields of sections, each as "name was ... and is ..."."""
    old, new = _flat(before), _flat(now)
    return [
        f"{name} was {old.get(name, 'not there')} and is {new.get(name, 'not there')}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, ...) != new.get(name, ...)
    ]


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of sections by name, as JSON has them."""
    flattened: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(fields)).items():
        flattened |= value if isinstance(value, dict) else {name: value}
    return flattened
