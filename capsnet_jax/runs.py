"""The folder of a run: its config, metrics, checkpoints, weights and picture."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx
from matplotlib.figure import Figure
from safetensors import SafetensorError

from capsnet_jax.config import Config, differences
from capsnet_jax.data import Dataset
from capsnet_jax.errors import UsageError
from capsnet_jax.model import CapsNet
from capsnet_jax.weights import load_weights, save_weights

CONFIG, WEIGHTS, BEST = "config.json", "model.safetensors", "best.safetensors"
CHECKPOINTS, PICTURE = "checkpoints", "reconstructions.png"
# What may be another when a run is gone on with: nothing that training depends on but the number of epochs.
MAY_CHANGE = {"data": ("data_dir", "stream"), "training": ("save_minutes", "keep_checkpoints")}


class Run(NamedTuple):
    """A run: where it is kept, and what it depends on.

    Attributes:
        folder: where its files are.
        config: its options.
        image_shape: height, width and number of channels of the images.
        class_names: of the classes, in order.
        labels_per_image: number of classes that an image shows.
    """

    folder: Path
    config: Config
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    labels_per_image: int = 1

    @classmethod
    def of(cls, folder: Path, config: Config, dataset: Dataset) -> "Run":
        """A run of this data set."""
        labels_per_image = dataset.train_labels.shape[1] if dataset.train_labels.ndim == 2 else 1
        return cls(folder, config, dataset.image_shape, dataset.class_names, labels_per_image)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def new_model(self, seed: int | None = None) -> CapsNet:
        """The model with its initial weights, by default of the seed of the config.

        Raises:
            UsageError: the images are too small for the model, or its routing is unknown.
        """
        rngs = nnx.Rngs(self.config.training.seed if seed is None else seed)
        return CapsNet(self.image_shape, self.num_classes, **vars(self.config.model), rngs=rngs)

    def fields(self) -> dict[str, Any]:
        """What `config.json` holds."""
        data = {"image_shape": list(self.image_shape), "class_names": list(self.class_names)}
        return self.config.to_json() | data | {"labels_per_image": self.labels_per_image}

    def depends_on(self) -> dict[str, Any]:
        """The part of these fields that must stay the same for a run to be gone on with."""
        fields = self.fields()
        for section, names in MAY_CHANGE.items():
            for name in names:
                del fields[section][name]
        if self.config.training.schedule != "cosine":  # which ends with the last epoch
            del fields["training"]["epochs"]
        return fields

    def open_folder(self) -> None:
        """Makes sure that a run in the folder is this one, or begins it there.

        Raises:
            UsageError: the folder holds a run of another config, or cannot be read or written.
        """
        if not (self.folder / CONFIG).exists():
            return self.create_folder()
        changes = differences(read_run(self.folder).depends_on(), self.depends_on())
        if changes:
            raise UsageError(f"The run in {self.folder} cannot be gone on with, as {'; '.join(changes)}.")
        self._write_config("w")  # the number of epochs may be another

    def create_folder(self) -> None:
        """Makes the folder and writes the config.

        Raises:
            UsageError: the folder holds a run already, or cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_config("x")
        except FileExistsError as error:
            raise UsageError(
                f"The run folder {self.folder} holds a run already, or is a file; give a new one, or --resume, too."
            ) from error
        except OSError as error:
            raise UsageError(f"The run folder {self.folder} cannot be written: {error.strerror}.") from error

    def save_weights(self, model: CapsNet, name: str = WEIGHTS) -> None:
        """Writes the weights, in place of those before; a crash leaves one or the other."""
        partial = self.folder / f"{name}.partial"
        try:
            save_weights(partial, model)
            partial.replace(self.folder / name)
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{partial} cannot be written; make room and go on with --resume: {error}.") from error

    def _write_config(self, mode: str) -> None:
        with (self.folder / CONFIG).open(mode) as file:
            file.write(json.dumps(self.fields(), indent=2) + "\n")

    def save_picture(self, figure: Figure) -> Path:
        """Writes the picture of reconstructions."""
        path = self.folder / PICTURE
        figure.savefig(path)
        return path


def read_run(folder: Path) -> Run:
    """A run, without its weights.

    Raises:
        UsageError: the folder is not that of a run.
    """
    try:
        fields = json.loads((folder / CONFIG).read_text())
    except FileNotFoundError as error:
        raise UsageError(f"{folder} is not the folder of a run: it has no {CONFIG}.") from error
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(f"{folder / CONFIG} cannot be read: {error}.") from error
    try:
        image_shape, class_names = tuple(fields.pop("image_shape")), tuple(fields.pop("class_names"))
        labels_per_image = fields.pop("labels_per_image")
    except (AttributeError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / CONFIG} lacks {error}.") from error
    return Run(folder, Config.from_json(fields), image_shape, class_names, labels_per_image)


def load_run(folder: Path, *, best: bool = False) -> tuple[Run, CapsNet]:
    """A run and its trained model.

    Args:
        folder: of the run.
        best: the weights that were best on validation images, and not the last ones.

    Raises:
        UsageError: the folder is not that of a run, or has no such weights.
    """
    run = read_run(folder)
    model = run.new_model()
    path = folder / (BEST if best else WEIGHTS)
    if not path.exists():
        why = "there was no --validation" if best else "none were saved yet"
        raise UsageError(f"{folder} has no {path.name}: {why}.")
    load_weights(path, model)
    return run, model
