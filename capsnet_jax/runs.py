"""The folder of a run: its config, metrics, weights and picture."""

import json
from pathlib import Path
from typing import NamedTuple

from flax import nnx
from matplotlib.figure import Figure

from capsnet_jax.config import Config
from capsnet_jax.errors import UsageError
from capsnet_jax.model import CapsNet
from capsnet_jax.training import Progress
from capsnet_jax.weights import load_weights, save_weights

CONFIG, METRICS, WEIGHTS, PICTURE = "config.json", "metrics.jsonl", "model.safetensors", "reconstructions.png"


class Run(NamedTuple):
    """A run: where it is kept, and what it depends on.

    Attributes:
        folder: where its files are.
        config: its options.
        image_shape: height, width and number of channels of the images.
        num_classes: number of classes.
    """

    folder: Path
    config: Config
    image_shape: tuple[int, int, int]
    num_classes: int

    def new_model(self) -> CapsNet:
        """The model with its initial weights.

        Raises:
            UsageError: the images are too small for the model, or its routing is unknown.
        """
        rngs = nnx.Rngs(self.config.training.seed)
        return CapsNet(self.image_shape, self.num_classes, **vars(self.config.model), rngs=rngs)

    def create_folder(self) -> None:
        """Makes the folder and writes the config.

        Raises:
            UsageError: the folder holds a run already, or cannot be written.
        """
        path = self.folder / CONFIG
        fields = self.config.to_json() | {"image_shape": self.image_shape, "num_classes": self.num_classes}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("x") as file:
                file.write(json.dumps(fields, indent=2) + "\n")
        except FileExistsError as error:
            raise UsageError(
                f"The run folder {self.folder} holds a run already, or is a file; give a new one."
            ) from error
        except OSError as error:
            raise UsageError(f"The run folder {self.folder} cannot be written: {error.strerror}.") from error

    def record(self, progress: Progress) -> None:
        """Adds the line of an epoch to the metrics."""
        losses = {f"train_{name}": value for name, value in progress.losses.items()}
        metrics = {"epoch": progress.epoch, "step": progress.step, **losses}
        if progress.test is not None:
            metrics["test_accuracy"] = progress.test.accuracy
        metrics["images_per_second"] = progress.images_per_second
        with (self.folder / METRICS).open("a") as file:
            file.write(json.dumps(metrics) + "\n")

    def save_weights(self, model: CapsNet) -> None:
        """Writes the weights, in place of those before; a crash leaves one or the other."""
        partial = self.folder / f"{WEIGHTS}.partial"
        save_weights(partial, model)
        partial.replace(self.folder / WEIGHTS)

    def save_picture(self, figure: Figure) -> Path:
        """Writes the picture of reconstructions."""
        path = self.folder / PICTURE
        figure.savefig(path)
        return path


def load_run(folder: Path) -> tuple[Run, CapsNet]:
    """A run and its trained model.

    Raises:
        UsageError: the folder is not that of a run, or has no weights yet.
    """
    try:
        fields = json.loads((folder / CONFIG).read_text())
    except FileNotFoundError as error:
        raise UsageError(f"{folder} is not the folder of a run: it has no {CONFIG}.") from error
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(f"{folder / CONFIG} cannot be read: {error}.") from error
    try:
        image_shape, num_classes = tuple(fields.pop("image_shape")), fields.pop("num_classes")
    except (AttributeError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / CONFIG} lacks {error}.") from error
    run = Run(folder, Config.from_json(fields), image_shape, num_classes)
    model = run.new_model()
    load_weights(folder / WEIGHTS, model)
    return run, model
