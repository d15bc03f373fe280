"""Folders of runs: config, metrics, checkpoints, weights and picture of a run, and several seeds in one folder."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
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

SEEDS = "seeds.json"  # in the folder of several runs: their seeds, and how many of them train side by side
BEST, CHECKPOINTS, PICTURE = "best.safetensors", "checkpoints", "reconstructions.png"
# Options that may change on resume, because training does not depend on them. Images are compared by their checksum.
MAY_CHANGE = {"data": ("dataset", "data_dir", "stream"), "training": ("save_minutes", "keep_checkpoints")}


class Run(NamedTuple):
    """A run: its folder, and all that its results depend on.

    Attributes:
        folder: folder of its files.
        config: its options.
        class_names: names of the classes, in order.
        labels_per_image: number of classes that each image shows.
        data_checksum: checksum of all images and labels; 0 if they are not known.
    """

    folder: Path
    config: Config
    class_names: tuple[str, ...]
    labels_per_image: int = 1
    data_checksum: int = 0

    @classmethod
    def of(cls, folder: Path, config: Config, dataset: Dataset) -> "Run":
        """Create a run on a data set, which sets image shape and number of classes."""
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
        """Create the model with the initial weights of a seed, by default the seed of the config.

        Raises:
            UsageError: the images are too small for the model, or its routing is unknown.
        """
        rngs = nnx.Rngs(self.config.training.seed if seed is None else seed)
        return CapsNet.from_config(self.config.model, rngs=rngs)

    def fields(self) -> dict[str, Any]:
        """Return the content of `config.json`."""
        return self.config.to_json() | {
            "class_names": list(self.class_names),
            "labels_per_image": self.labels_per_image,
            "data_checksum": self.data_checksum,
        }

    def depends_on(self) -> dict[str, Any]:
        """Return the part of `fields` that must not change on resume."""
        fields = self.fields()
        for section, names in MAY_CHANGE.items():
            for name in names:
                del fields[section][name]
        if self.config.training.schedule != "cosine":  # which depends on the last epoch
            del fields["training"]["epochs"]
        return fields

    def check_folder(self, *, resume: bool) -> None:
        """Check that the folder has no run yet or, if it may be resumed, has this one.

        Raises:
            UsageError: the folder has another run, cannot be read, or is a file.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"The run folder {self.folder} is a file; give another name.")
        if (self.folder / CONFIG).exists():
            if not resume:
                raise UsageError(f"The run folder {self.folder} already holds a run; give a new one, or --resume.")
            changes = differences(read_run(self.folder).depends_on(), self.depends_on())
            if changes:
                raise UsageError(
                    f"The run in {self.folder} cannot be resumed, as {'; '.join(changes)}; expected the options of "
                    "that run, which need not be repeated, or a new --run-dir."
                )

    def write_config(self) -> None:
        """Create the folder and write the config atomically.

        Raises:
            UsageError: the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(self.folder / CONFIG, json.dumps(self.fields(), indent=2) + "\n")
        except OSError as error:
            raise UsageError(f"The run folder {self.folder} cannot be written: {error.strerror}.") from error

    def save_weights(self, model: CapsNet, name: str = WEIGHTS) -> None:
        """Write the weights atomically: after a crash, the file is either the old or the new one."""
        partial = self.folder / f"{name}.partial"
        try:
            save_weights(partial, model)
            partial.replace(self.folder / name)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise UsageError(f"{partial} cannot be written; fix this, then --resume: {error}.") from error

    def save_picture(self, figure: Any) -> None:  # a matplotlib Figure, without importing matplotlib, which is slow
        """Save the picture of reconstructions."""
        figure.savefig(self.folder / PICTURE)


class SeedFolders:
    """Folders of runs from several seeds: `seed-0`, `seed-1` ... in one folder. A single seed uses that folder itself.

    Args:
        run: a run from any of the seeds; its folder contains the folders of all seeds.
        seeds: seeds of the runs.

    Attributes:
        seeds: seeds of the runs.
        at_once: number of seeds that train side by side; 0 if not known yet. Fixed once the runs have started, because
            these seeds share their checkpoints.
    """

    def __init__(self, run: Run, seeds: Sequence[int]):
        self._run, self.seeds = run, list(seeds)
        self.at_once = 1 if len(self.seeds) == 1 else 0

    def run(self, seed: int) -> Run:
        """Return the run of a seed."""
        if len(self.seeds) == 1:
            return self._run
        config = replace(self._run.config, training=replace(self._run.config.training, seed=seed))
        return self._run._replace(folder=self._run.folder / folder_of_seed(seed), config=config)

    def checkpoints(self, seeds: Sequence[int]) -> Path:
        """Return the folder of the checkpoints of seeds that train side by side."""
        folder = self._run.folder / CHECKPOINTS
        return folder if len(self.seeds) == 1 else folder / f"seeds-{seeds[0]}-{seeds[-1]}"

    def delete_checkpoints(self) -> None:
        """Delete the checkpoints of runs that have finished. Weights, configs and metrics stay."""
        shutil.rmtree(self._run.folder / CHECKPOINTS, ignore_errors=True)

    def check(self, *, resume: bool) -> None:
        """Check that the folder has no runs yet or, if they may be resumed, has these.

        Raises:
            UsageError: it has other runs, or cannot be read.
        """
        folder = self._run.folder
        parent = read_seeds(folder.parent)
        if parent is not None and folder.name in map(folder_of_seed, parent[0]):
            raise UsageError(f"{folder} is one of the runs in {folder.parent}; expected that as --run-dir.")
        before = read_seeds(folder)
        if before is None:
            if len(self.seeds) > 1 and (folder / CONFIG).exists():
                raise UsageError(f"The run folder {folder} holds a run from one seed; give a new one.")
        elif not resume:
            raise UsageError(f"The run folder {folder} already holds runs; give a new one, or --resume.")
        else:
            seeds, self.at_once = before
            if seeds != self.seeds:
                was, now = (", ".join(map(str, numbers)) for numbers in (seeds, self.seeds))
                raise UsageError(f"The runs in {folder} are from seeds {was}, and not {now}; give a new folder.")
        for run in map(self.run, self.seeds):
            run.check_folder(resume=resume)

    def create(self) -> None:
        """Create the folders and write configs where there are none.

        Raises:
            UsageError: they cannot be written.
        """
        if len(self.seeds) > 1 and not self.at_once:
            self.keep_together(0)
        for run in map(self.run, self.seeds):
            if not (run.folder / CONFIG).exists():
                run.write_config()

    def keep_together(self, at_once: int) -> None:
        """Save how many seeds train side by side; 0 if not known yet.

        Raises:
            UsageError: the folder cannot be written.
        """
        self.at_once = at_once
        if len(self.seeds) > 1:
            path = self._run.folder / SEEDS
            try:
                self._run.folder.mkdir(parents=True, exist_ok=True)
                replace_file(path, json.dumps({"seeds": self.seeds, "at_once": at_once}) + "\n")
            except OSError as error:
                raise UsageError(f"{path} cannot be written: {error.strerror}.") from error


def read_run(folder: Path) -> Run:
    """Read a run from its folder, without weights.

    Raises:
        UsageError: the folder is not a run folder.
    """
    try:
        fields = json.loads((folder / CONFIG).read_text())
    except FileNotFoundError as error:
        parts = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        hint = f"its folder {parts[0]} does" if parts else "expected the --run-dir of a training"
        missing = f"it has no {CONFIG}" if folder.exists() else "it does not exist"
        raise UsageError(f"{folder} is not the folder of a run: {missing}; {hint}.") from error
    except (OSError, ValueError) as error:
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
    """Load a run and its trained model.

    Args:
        folder: folder of the run.
        best: whether to load the weights that were best on validation images instead of the last ones.

    Raises:
        UsageError: the folder is not a run folder, or has no such weights.
    """
    run = read_run(folder)
    model = run.new_model()
    path = folder / (BEST if best else WEIGHTS)
    if not path.exists():
        no_validation = best and run.config.data.validation == 0
        why = "it was trained without --validation" if no_validation else "none were saved yet"
        raise UsageError(f"{folder} has no {path.name}: {why}.")
    load_weights(path, model)
    return run, model


def load(path: str | Path, *, best: bool = False) -> CapsNet:
    """Load a trained model.

    Args:
        path: a run folder, or a folder that `capsnet convert` wrote.
        best: whether to load the weights that were best on validation images instead of the last ones.

    Returns:
        The model, in evaluation mode.

    Raises:
        UsageError: there is no such folder, or it has no config or no weights.

    Examples:
        >>> import pathlib, tempfile
        >>> from capsnet_jax import ModelConfig, load
        >>> from capsnet_jax.config import Config
        >>> from capsnet_jax.runs.folder import Run
        >>> model = ModelConfig((8, 8, 1), 2, stem_kernel=3, stem_channels=4, primary_kernel=3, decoder_hidden=None)
        >>> run = Run(pathlib.Path(tempfile.mkdtemp()), Config(model), class_names=("cat", "dog"))
        >>> run.write_config()
        >>> run.save_weights(run.new_model())  # `capsnet train` does all of this
        >>> load(run.folder).config.num_classes
        2
        >>> load("no/such/folder")
        Traceback (most recent call last):
            ...
        capsnet_jax.errors.UsageError: no/such/folder does not exist; expected the folder of a run or of a converted \
model, with config.json and model.safetensors in it.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UsageError(
            f"{folder} {'is a file' if folder.exists() else 'does not exist'}; expected the folder of a run or of a "
            f"converted model, with {CONFIG} and {BEST if best else WEIGHTS} in it."
        )
    return load_run(folder, best=best)[1]


def folder_of_seed(seed: int) -> str:
    return f"seed-{seed}"


def read_seeds(folder: Path) -> tuple[list[int], int] | None:
    """Read the seeds of the runs in a folder, and how many train side by side; None if it is not a folder of several.

    Raises:
        UsageError: the file cannot be read.
    """
    path = folder / SEEDS
    if not path.exists():
        return None
    try:
        fields = json.loads(path.read_text())
        return list(fields["seeds"]), int(fields["at_once"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} cannot be read: {error!r}.") from error


def saved_options(folder: Path) -> tuple[Config, int] | None:
    """Read config and number of seeds of the run or runs in a folder; None if there are none.

    Raises:
        UsageError: they cannot be read.
    """
    before = read_seeds(folder)
    if before is not None:
        seeds, _ = before
        return read_run(folder / folder_of_seed(seeds[0])).config, len(seeds)
    return (read_run(folder).config, 1) if (folder / CONFIG).exists() else None
