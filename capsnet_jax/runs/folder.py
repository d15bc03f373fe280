"""The folder of a run: its config, metrics, checkpoints, weights and picture."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx
from safetensors import SafetensorError

from capsnet_jax.config import Config, differences
from capsnet_jax.data import Dataset
from capsnet_jax.errors import UsageError
from capsnet_jax.files import replace_file
from capsnet_jax.interchange.state_files import CONFIG, WEIGHTS
from capsnet_jax.interchange.weights import load_weights, save_weights
from capsnet_jax.nn.model import CapsNet

BEST, CHECKPOINTS, PICTURE = "best.safetensors", "checkpoints", "reconstructions.png"
# What may be another when a run is resumed: training does not depend on it. Images are known by their checksum.
MAY_CHANGE = {"data": ("dataset", "data_dir", "stream"), "training": ("save_minutes", "keep_checkpoints")}


class Run(NamedTuple):
    """A run: where it is kept, and what it depends on.

    Attributes:
        folder: where its files are.
        config: its options.
        class_names: of the classes, in order.
        labels_per_image: number of classes that an image shows.
        data_checksum: of the images and labels, all of them.
    """

    folder: Path
    config: Config
    class_names: tuple[str, ...]
    labels_per_image: int = 1
    data_checksum: int = 0

    @classmethod
    def of(cls, folder: Path, config: Config, dataset: Dataset) -> "Run":
        """A run of this data set."""
        labels_per_image = dataset.train_labels.shape[1] if dataset.train_labels.ndim == 2 else 1
        config = config.with_sizes(dataset.image_shape, dataset.num_classes)
        return cls(folder, config, dataset.class_names, labels_per_image, dataset.checksum())

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and number of channels of the images."""
        return self.config.model.image_shape

    @property
    def num_classes(self) -> int:
        return self.config.model.num_classes

    def new_model(self, seed: int | None = None) -> CapsNet:
        """The model with its initial weights, by default of the seed of the config.

        Raises:
            UsageError: the images are too small for the model, or its routing is unknown.
        """
        rngs = nnx.Rngs(self.config.training.seed if seed is None else seed)
        return CapsNet.from_config(self.config.model, rngs=rngs)

    def fields(self) -> dict[str, Any]:
        """What `config.json` holds."""
        return self.config.to_json() | {
            "class_names": list(self.class_names),
            "labels_per_image": self.labels_per_image,
            "data_checksum": self.data_checksum,
        }

    def depends_on(self) -> dict[str, Any]:
        """The part of these fields that must stay the same for a run to be resumed."""
        fields = self.fields()
        for section, names in MAY_CHANGE.items():
            for name in names:
                del fields[section][name]
        if self.config.training.schedule != "cosine":  # which ends with the last epoch
            del fields["training"]["epochs"]
        return fields

    def check_folder(self, *, resume: bool) -> None:
        """Makes sure that the folder is free for this run or, if it may be resumed, holds this very one.

        Raises:
            UsageError: the folder holds another run, cannot be read, or is a file.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"The run folder {self.folder} is a file; give another name.")
        if (self.folder / CONFIG).exists():
            if not resume:
                raise UsageError(f"The run folder {self.folder} holds a run already; give a new one, or --resume, too.")
            changes = differences(read_run(self.folder).depends_on(), self.depends_on())
            if changes:
                raise UsageError(f"The run in {self.folder} cannot be resumed, as {'; '.join(changes)}.")

    def write_config(self) -> None:
        """Makes the folder and writes the config, in place of one before; a crash leaves one or the other.

        Raises:
            UsageError: the folder cannot be written.
        """
        path = self.folder / CONFIG
        text = json.dumps(self.fields(), indent=2) + "\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, text)
        except OSError as error:
            raise UsageError(f"The run folder {self.folder} cannot be written: {error.strerror}.") from error

    def save_weights(self, model: CapsNet, name: str = WEIGHTS) -> None:
        """Writes the weights, in place of those before; a crash leaves one or the other."""
        partial = self.folder / f"{name}.partial"
        try:
            save_weights(partial, model)
            partial.replace(self.folder / name)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise UsageError(f"{partial} cannot be written; --resume when that is mended: {error}.") from error

    def save_picture(self, figure: Any) -> Path:  # a Figure; to import matplotlib takes half as long as to import JAX
        """Writes the picture of reconstructions, a matplotlib Figure."""
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
        parts = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        hint = f"; its folder {parts[0]} does" if parts else ""
        raise UsageError(f"{folder} is not the folder of a run: it has no {CONFIG}{hint}.") from error
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(f"{folder / CONFIG} cannot be read: {error}.") from error
    try:
        class_names = tuple(fields.pop("class_names"))
        known = fields.pop("labels_per_image"), fields.pop("data_checksum")
        if "image_shape" in fields:  # where 0.1.0 wrote it
            fields["model"] |= {"image_shape": fields.pop("image_shape"), "num_classes": len(class_names)}
    except (AttributeError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / CONFIG} is not the config of a run: {error!r}.") from error
    return Run(folder, Config.from_json(fields), class_names, *known)


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
        no_validation = best and run.config.data.validation == 0
        why = "there was no --validation" if no_validation else "none were saved yet"
        raise UsageError(f"{folder} has no {path.name}: {why}.")
    load_weights(path, model)
    return run, model


def load(path: str | Path, *, best: bool = False) -> CapsNet:
    """Loads a trained model.

    Args:
        path: of a run folder, or of a folder that `capsnet convert` wrote.
        best: the weights that were best on validation images, and not the last ones.

    Returns:
        The model, in evaluation mode.

    Raises:
        UsageError: there is no such folder, or it has no config or no weights; says what was looked for.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UsageError(
            f"{folder} {'is a file' if folder.exists() else 'does not exist'}; expected the folder of a run or of a "
            f"converted model, with {CONFIG} and {BEST if best else WEIGHTS} in it."
        )
    return load_run(folder, best=best)[1]
