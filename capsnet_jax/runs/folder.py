"""Folders of runs: config, metrics, checkpoints, weights and picture of a run, and several seeds in one folder."""

import json
import math
import operator
import shutil
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from safetensors import SafetensorError

from capsnet_jax.config import Config, differences
from capsnet_jax.data import Dataset
from capsnet_jax.errors import UsageError
from capsnet_jax.files import replace_file
from capsnet_jax.interchange.state_files import CONFIG, PRETRAINED, WEIGHTS, find_pretrained
from capsnet_jax.interchange.weights import load_weights, save_weights
from capsnet_jax.nn.model import CapsNet
from capsnet_jax.runs.origin import Origin
from capsnet_jax.train.memory import available_memory

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
        origin: where the initial weights come from; None if they are random.
    """

    folder: Path
    config: Config
    class_names: tuple[str, ...]
    labels_per_image: int = 1
    data_checksum: int = 0
    origin: Origin | None = None

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
            UsageError: the images are too small for the model, its routing is unknown, or its weights do not fit into
                memory.
        """
        self.abstract_model()
        return self._create(self.config.training.seed if seed is None else seed)

    def abstract_model(self) -> CapsNet:
        """Create the model with shapes instead of weights, for `load_weights`: initial weights take seconds to compile.

        Raises:
            UsageError: as in `new_model`.
        """
        model = nnx.eval_shape(partial(self._create, 0))
        weights = jax.tree.leaves(nnx.state(model, nnx.Param))
        needed, available = sum(4 * math.prod(weight.shape) for weight in weights), available_memory()
        if needed > available:  # of a damaged file, for example; to allocate them could kill the process
            raise UsageError(
                f"The weights of this model take {needed / 1e9:,.0f} GB, and the device has {available / 1e9:,.0f} GB; "
                "expected smaller sizes."
            )
        return model

    def _create(self, seed: int) -> CapsNet:
        return CapsNet.from_config(self.config.model, rngs=nnx.Rngs(seed))

    def fields(self) -> dict[str, Any]:
        """Return the content of `config.json`."""
        fields = self.config.to_json() | {
            "class_names": list(self.class_names),
            "labels_per_image": self.labels_per_image,
            "data_checksum": self.data_checksum,
        }
        return fields if self.origin is None else fields | {"origin": self.origin.to_json()}

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
            UsageError: the folder has another run, cannot be read, is a file, or its name is not text.
        """
        path = self.folder.absolute()
        try:
            str(path).encode()
        except UnicodeEncodeError as error:  # Orbax could not write the checkpoints
            raise UsageError(
                f"The run folder {str(path)!a} has a name that is not text in this locale; expected ASCII letters, "
                "or a UTF-8 locale, such as LC_ALL=C.UTF-8."
            ) from error
        # Orbax takes a name as a pattern when it reads a checkpoint, and a backslash as the separator of folders.
        if not all(fnmatchcase(name, name) and "\\" not in name for name in path.relative_to(path.anchor).parts):
            raise UsageError(
                f"The checkpoints in the run folder {path} could not be read again; expected names without \\ and "
                "without a pair of [ and ]."
            )
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"The run folder {self.folder} is a file; give another name.")
        if (self.folder / CONFIG).exists():
            if not resume:
                raise UsageError(f"The run folder {self.folder} already holds a run; give a new one, or --resume.")
            before = read_run(self.folder, trust_code=True)  # its routing is compared, and not imported
            changes = differences(before.depends_on(), self.depends_on())
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
        folder: folder of all runs.
        seeds: seeds of the runs.
        at_once: number of seeds that train side by side; 0 if not known yet. Fixed once the runs have started, because
            these seeds share their checkpoints.
    """

    def __init__(self, run: Run, seeds: Sequence[int]):
        self._run, self.folder, self.seeds = run, run.folder, list(seeds)
        self.at_once = 1 if len(self.seeds) == 1 else 0

    def run(self, seed: int) -> Run:
        """Return the run of a seed."""
        if len(self.seeds) == 1:
            return self._run
        config = replace(self._run.config, training=replace(self._run.config.training, seed=seed))
        return self._run._replace(folder=self.folder / folder_of_seed(seed), config=config)

    def checkpoints(self, seeds: Sequence[int]) -> Path:
        """Return the folder of the checkpoints of seeds that train side by side."""
        folder = self.folder / CHECKPOINTS
        return folder if len(self.seeds) == 1 else folder / f"seeds-{seeds[0]}-{seeds[-1]}"

    def delete_checkpoints(self) -> None:
        """Delete the checkpoints of runs that have finished. Weights, configs and metrics stay."""
        shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)

    def check(self, *, resume: bool) -> None:
        """Check that the folder has no runs yet or, if they may be resumed, has these.

        Raises:
            UsageError: it has other runs, or cannot be read.
        """
        folder = self.folder
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
            path = self.folder / SEEDS
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                replace_file(path, json.dumps({"seeds": self.seeds, "at_once": at_once}) + "\n")
            except OSError as error:
                raise UsageError(f"{path} cannot be written: {error.strerror}.") from error


def read_run(folder: Path, *, trust_code: bool = False) -> Run:
    """Read a run from its folder, without weights.

    Args:
        folder: folder of the run, or name of a pretrained model.
        trust_code: whether the config may name a routing of another package, `package.module:function`. Creating the
            model imports that module, which runs its code.

    Raises:
        UsageError: the folder is not a run folder, its config has a wrong value, or its routing is not to be trusted.
    """
    folder = find_pretrained(folder)
    path = folder / CONFIG
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        parts = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        expected = f"expected the --run-dir of a training, or the name of a pretrained model ({', '.join(PRETRAINED)})"
        hint = f"its folder {parts[0]} does" if parts else expected
        exists = f"it has no {CONFIG}" if folder.is_dir() else "it is a file"
        missing = exists if folder.exists() else "it does not exist"
        raise UsageError(f"{folder} is not the folder of a run: {missing}; {hint}.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {error}.") from error
    try:
        return _run_of_fields(folder, fields, trust_code=trust_code)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _run_of_fields(folder: Path, fields: Any, *, trust_code: bool) -> Run:
    if not isinstance(fields, dict):
        raise UsageError(f"It holds {type(fields).__name__}; expected the options of a run, by section.")
    if "device" in fields and "class_names" not in fields:  # written by `capsnet compare`
        raise UsageError("It is of a comparison; expected the folder of a run in it, such as dynamic/seed-0.")
    names, labels_per_image = fields.get("class_names"), fields.get("labels_per_image", 1)
    if not isinstance(names, list) or not all(isinstance(name, str) and name.isprintable() for name in names):
        raise UsageError(f"class_names is {names!r}; expected a list of printable names.")
    if "image_shape" in fields and isinstance(fields.get("model"), dict):  # where 0.1.0 wrote it
        fields["model"] = {"image_shape": fields["image_shape"], "num_classes": len(names)} | fields["model"]
    config = Config.from_json(fields)
    if len(names) != config.model.num_classes:
        raise UsageError(f"class_names has {len(names)} names; expected {config.model.num_classes}, as num_classes is.")
    if type(labels_per_image) is not int or not 1 <= labels_per_image <= len(names):
        raise UsageError(f"labels_per_image is {labels_per_image!r}; expected a whole number from 1 to {len(names)}.")
    checksum = fields.get("data_checksum", 0)
    if type(checksum) is not int:
        raise UsageError(f"data_checksum is {checksum!r}; expected a whole number.")
    routing, _, _ = str(config.model.routing).partition(",")
    module, colon, _ = routing.partition(":")
    if colon and not trust_code:
        raise UsageError(
            f"Its routing {routing} would import the module {module}, which runs the code in it; if you trust that, "
            "add --trust-code (trust_code=True in Python, and --routing with this name to resume a training)."
        )
    origin = Origin.from_json(fields["origin"]) if "origin" in fields else None
    return Run(folder, config, tuple(names), labels_per_image, checksum, origin)


def load_run(folder: Path, *, best: bool = False, trust_code: bool = False) -> tuple[Run, CapsNet]:
    """Load a run and its trained model.

    Args:
        folder: folder of the run, or name of a pretrained model.
        best: whether to load the weights that were best on validation images instead of the last ones.
        trust_code: whether the module of a routing of another package may be imported.

    Raises:
        UsageError: the folder is not a run folder, its routing is not to be trusted, or it has no such weights.
    """
    run = read_run(folder, trust_code=trust_code)
    model = run.abstract_model()
    path = run.folder / (BEST if best else WEIGHTS)
    if not path.exists():
        no_validation = best and run.config.data.validation == 0
        why = "it was trained without --validation" if no_validation else "none were saved yet"
        raise UsageError(f"{run.folder} has no {path.name}: {why}.")
    load_weights(path, model)
    return run, model


def load(path: str | Path, *, best: bool = False, trust_code: bool = False) -> CapsNet:
    """Load a trained model.

    Args:
        path: a run folder, a folder that `capsnet convert` wrote, or the name of a pretrained model in `PRETRAINED`. A
            folder is preferred to a pretrained model of its name.
        best: whether to load the weights that were best on validation images instead of the last ones.
        trust_code: whether a routing of another package, named in the folder's config, may be imported. That runs its
            code, so allow it only for folders and modules that you trust. Without it, a folder only holds numbers.

    Returns:
        The model, in evaluation mode.

    Raises:
        UsageError: there is no such folder, it has no config or no weights, or its routing is not to be trusted.

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
model, with config.json and model.safetensors in it, or the name of a pretrained model (mnist-dynamic, \
mnist-efficient).
    """
    folder = find_pretrained(Path(path))
    if not folder.is_dir():
        raise UsageError(
            f"{folder} {'is a file' if folder.exists() else 'does not exist'}; expected the folder of a run or of a "
            f"converted model, with {CONFIG} and {BEST if best else WEIGHTS} in it, or the name of a pretrained model "
            f"({', '.join(PRETRAINED)})."
        )
    return load_run(folder, best=best, trust_code=trust_code)[1]


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
        fields = json.loads(path.read_text(encoding="utf-8"))
        seeds, at_once = [operator.index(seed) for seed in fields["seeds"]], operator.index(fields["at_once"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} cannot be read: {error!r}.") from error
    if not seeds or min(seeds) < 0:
        raise UsageError(f"{path} has the seeds {seeds}; expected at least one, and none below 0.")
    return seeds, at_once


def saved_runs(folder: Path, *, trust_code: bool = False) -> tuple[Run, int] | None:
    """Read the first run in a folder and the number of its seeds; None if there are none.

    Raises:
        UsageError: they cannot be read, or their routing is not to be trusted.
    """
    before = read_seeds(folder)
    if before is not None:
        seeds, _ = before
        return read_run(folder / folder_of_seed(seeds[0]), trust_code=trust_code), len(seeds)
    return (read_run(folder, trust_code=trust_code), 1) if (folder / CONFIG).exists() else None
