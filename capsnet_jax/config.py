"""Everything a run depends on, as frozen dataclasses, and presets of them; the one home of every default."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capsnet_jax.errors import UsageError


def _at_least(config: Any, smallest: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not value >= smallest:
            raise UsageError(f"{name} is {value}, and must be at least {smallest}.")


@dataclass(frozen=True)
class ModelConfig:
    """The network: the keyword arguments of `CapsNet`, with the same defaults, those of the reference model."""

    stem_channels: int = 256
    """Number of channels of the first convolution."""
    stem_kernel: int = 9
    """Kernel size of the first convolution, in pixels."""
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
    hidden_capsules: tuple[tuple[int, int], ...] = ()
    """Number and pose size of the capsules of each layer between primary and class capsules."""
    class_dim: int = 16
    """Pose size of the class capsules."""
    decoder_hidden: tuple[int, int] = (512, 1024)
    """Widths of the two hidden layers of the decoder."""
    routing: str = "dynamic"
    """Routing algorithm: dynamic, or your own as package.module:function."""
    num_iterations: int = 3
    """Number of routing iterations."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "stem_channels", "stem_kernel", "primary_groups", "primary_dim", "primary_kernel")
        _at_least(self, 1, "primary_stride", "class_dim", "num_iterations")
        for name in ("hidden_capsules", "decoder_hidden"):
            sizes = getattr(self, name)
            if any(size < 1 for group in sizes for size in (group if isinstance(group, tuple) else (group,))):
                raise UsageError(f"{name} is {sizes}, and every size in it must be at least 1.")


@dataclass(frozen=True)
class DataConfig:
    """The images."""

    dataset: str = "digits"
    """digits (comes with scikit-learn); or mnist, fashion_mnist, kmnist ... by their tensorflow-datasets name."""
    data_dir: Path | None = None
    """Folder of the four official idx files (.gz or not), or of prepared tensorflow-datasets; by default theirs."""
    shift: float = 0.1
    """Training images are shifted at random by up to this fraction of their size; 0 for none."""

    def __post_init__(self) -> None:
        if not 0 <= self.shift < 1:
            raise UsageError(f"shift is {self.shift}, and must be at least 0 and less than 1.")


@dataclass(frozen=True)
class TrainingConfig:
    """The optimisation."""

    epochs: int = 10
    """Number of times that all training images are seen."""
    batch_size: int = 64
    """Number of images in a training step; the few that do not fill the last batch of an epoch are left out of it."""
    learning_rate: float = 1e-3
    """Step size of Adam."""
    reconstruction_weight: float = 10.0
    """Weight of the mean squared error of the pixels; the paper's 0.0005 x sum over 784 pixels is 0.392."""
    steps_per_chunk: int = 0
    """Training steps run as one program between two looks at the losses; it must divide the steps of an epoch.
    0 is one step on CPU and an epoch elsewhere."""
    seed: int = 0
    """Seed of initial weights, order of images and augmentation."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "epochs", "batch_size")
        _at_least(self, 0, "reconstruction_weight", "steps_per_chunk", "seed")
        if not self.learning_rate > 0:
            raise UsageError(f"learning_rate is {self.learning_rate}, and must be more than 0.")


@dataclass(frozen=True)
class Config:
    """A run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

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
            model["hidden_capsules"] = tuple((count, dim) for count, dim in model["hidden_capsules"])
            model["decoder_hidden"] = tuple(model["decoder_hidden"])
            data["data_dir"] = None if data["data_dir"] is None else Path(data["data_dir"])
            return cls(ModelConfig(**model), DataConfig(**data), TrainingConfig(**fields["training"]))
        except (KeyError, TypeError) as error:
            raise UsageError(f"Not the config of a run: {error}.") from error


PRESETS: dict[str, Config] = {
    # The reference model, https://github.com/arogozhnikov/readable_capsnet, on images of 28 x 28.
    # capsnet train --preset readable --dataset mnist: 99.0 % after an epoch (docs/results.md).
    "readable": Config(),
    # Small and quick, for images of 8 x 8.
    # capsnet train: 98 % or more in a minute or two on 2 CPU cores (docs/results.md).
    "digits": Config(
        model=ModelConfig(
            stem_channels=64, stem_kernel=3, primary_groups=8, primary_kernel=4, primary_stride=1, primary_scale=1.0
        ),
        training=TrainingConfig(epochs=30, batch_size=32),
    ),
}
