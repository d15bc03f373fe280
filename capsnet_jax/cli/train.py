"""The command `capsnet train`."""

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from einops import rearrange, repeat
from jaxtyping import Int
from matplotlib.figure import Figure
from rich.console import Console

from capsnet_jax.cli.training_options import TrainingOptions, is_given, read_defaults
from capsnet_jax.data import Dataset, configured_dataset, with_absolute_paths
from capsnet_jax.data.augmentation import Augmentation
from capsnet_jax.errors import NonFiniteLossError, StoppedBySignalError, UsageError
from capsnet_jax.figures import reconstructions_figure
from capsnet_jax.nn.model import CapsNet
from capsnet_jax.ops import to_unit_range
from capsnet_jax.runs.folder import Run, SeedFolders, saved_runs
from capsnet_jax.runs.metrics import event_writer_class
from capsnet_jax.runs.origin import Source
from capsnet_jax.runs.session import train_runs
from capsnet_jax.train.evaluation import Evaluation, final_line
from capsnet_jax.train.inspection import reconstruct_each
from capsnet_jax.train.loop import Trainer
from capsnet_jax.train.sharding import connect, failing_together

PICTURED = 10  # test images in the picture of reconstructions


@dataclass(frozen=True)
class RunOptions:
    """Where the run is saved, and from how many seeds it is repeated."""

    run_dir: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="(default: runs/DATASET-DATE-TIME)")] = None
    """Folder for config, metrics, checkpoints, weights and picture."""
    resume: bool = False
    """Continue the run in --run-dir from its last checkpoint, or start it if there is none."""
    seeds: int = 1
    """Number of runs, from seeds --seed, --seed + 1 ...; they train side by side if memory allows."""
    tensorboard: bool = False
    """Also write TensorBoard events (pip install 'capsnet-jax[tensorboard]')."""


@dataclass(frozen=True)
class DeviceOptions:
    """Several processes or hosts. One process uses all of its devices by itself (docs/scaling.md)."""

    distributed: bool = False
    """This is one of several processes. All get the same options, except --process-id."""
    coordinator: str | None = None
    """HOST:PORT of process 0. Slurm provides this and the next two."""
    num_processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Index of this process, from 0."""


@dataclass(frozen=True)
class Train(TrainingOptions):
    """Train a capsule network. The last line printed is its test accuracy.

    Ctrl-C and SIGTERM save a checkpoint, from which --resume continues.
    Details: docs/training.md."""

    folder: Annotated[RunOptions, tyro.conf.arg(name="run")] = field(default_factory=RunOptions)
    devices: Annotated[DeviceOptions, tyro.conf.arg(name="device")] = field(default_factory=DeviceOptions)

    @classmethod
    def default(cls, argv: Sequence[str]) -> "Train":
        """Return the defaults of all options: those of the preset or, with --resume, of the run that is resumed.

        Raises:
            UsageError: there is no such preset, or the run cannot be read.
        """
        trust_code = is_given(argv, "--routing")  # then only the routing that is given can be imported
        config, resumed = read_defaults(argv, trust_code=trust_code)
        saved = None if resumed is None else saved_runs(resumed, trust_code=trust_code)
        if saved is None:
            return cls.of_config(config)
        return cls.of_config(saved[0].config, folder=RunOptions(seeds=saved[1]))

    def run(self) -> None:
        self._check()
        options = self.folder
        if self.devices.distributed:
            connect(self.devices.coordinator, self.devices.num_processes, self.devices.process_id)
        data = with_absolute_paths(self.data)
        config = replace(self.config, data=data)
        dataset = configured_dataset(data).cropped(Augmentation.parse(data.augment).crop)
        folder = options.run_dir or Path("runs") / f"{Path(data.dataset).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        source = self._source(folder)
        trainer, folders = prepare(Run.of(folder, config, dataset), dataset, options.seeds, source)
        with failing_together():
            folders.check(resume=options.resume)
            trainer.trace()
        with failing_together():
            if jax.process_index() == 0:
                if source is not None:
                    source.copy_to(folder)  # first, because a folder with a config is the folder of a run
                folders.create()
        console = Console(highlight=False, markup=False, emoji=False, quiet=jax.process_index() > 0)
        console.print(describe(trainer, dataset), f"Run folder: {folder}", sep="\n", soft_wrap=True)
        for line in describe_weights(trainer, folders):
            console.print(line, soft_wrap=True)
        for layer, choice in trainer.implementations().items():
            console.print(f"{layer}: {choice}", soft_wrap=True)

        tests: list[Evaluation] = []
        try:
            for trained, runs, evaluations in train_runs(
                trainer, folders, resume=options.resume, tensorboard=options.tensorboard, console=console
            ):
                tests += evaluations
                for run, model in zip(runs, trained.models(), strict=True):
                    if model.decoder is not None and not console.quiet:
                        run.save_picture(picture(model, dataset))
        except NonFiniteLossError as error:
            error.add_note(f"`capsnet check-routing {config.model.routing}` tests whether the routing is the cause.")
            error.add_note("The run folder keeps what was saved before.")
            raise
        except (StoppedBySignalError, KeyboardInterrupt) as error:
            named = str(config.model.routing)  # it must be given again if it is not of this package
            routing = f" --routing {shlex.quote(named)}" if ":" in named else ""
            error.add_note(f"To continue: capsnet train --resume --run-dir {shlex.quote(str(folder))}{routing}")
            raise
        if not console.quiet:
            print(lines_of_seeds(folders.seeds, tests) if options.seeds > 1 else final_line(tests[0]))

    def _source(self, folder: Path) -> Source | None:
        """Read the weights to start from: those of --from or, with --resume, those that the runs started from."""
        saved = saved_runs(folder, trust_code=True) if self.folder.resume else None  # nothing of it is imported
        origin = None if saved is None else saved[0].origin
        path = Path(origin.path) if self.from_ is None and origin is not None else self.from_
        return None if path is None else Source.read(path, started=None if origin is None else folder)

    def _check(self) -> None:
        if self.folder.seeds < 1:
            raise UsageError(f"seeds is {self.folder.seeds}, and must be at least 1.")
        if self.folder.resume and self.folder.run_dir is None:
            raise UsageError("--resume needs the folder of the run; expected --run-dir, too.")
        options = {name: value for name, value in vars(self.devices).items() if name != "distributed"}
        given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
        if given and not self.devices.distributed:
            raise UsageError(f"Got {', '.join(given)} for a run of one process; expected --distributed, too.")
        if self.folder.tensorboard:
            event_writer_class()  # raises before a run folder exists


def prepare(run: Run, dataset: Dataset, num_seeds: int, source: Source | None = None) -> tuple[Trainer, SeedFolders]:
    """Create the trainer of a run and the folders of its seeds. Nothing is compiled or written yet.

    Args:
        run: the run from the first seed, without an origin.
        dataset: its data set.
        num_seeds: number of seeds.
        source: weights to start from; None to start from random ones.

    Raises:
        UsageError: the model cannot be built, or config, data set and weights to start from do not fit each other.
    """
    first, data = run.config.training.seed, run.config.data
    seeds = range(first, first + num_seeds)
    new_model: Callable[[int], CapsNet] = run.new_model
    if source is not None:
        run = run._replace(origin=source.origin_of(run.new_model, freeze=run.config.training.freeze))
        new_model = source.starting(run.new_model)
    trainer = Trainer(
        new_model, dataset, run.config.training, augment=data.augment, stream=data.stream, seeds=seeds[:1]
    )
    return trainer, SeedFolders(run, seeds)


def describe(trainer: Trainer, dataset: Dataset) -> str:
    """Describe the sizes of model and data in one line."""
    counts = {"training": dataset.train_images, "validation": dataset.validation_images, "test": dataset.test_images}
    *others, last = [f"{len(images):,} {name}" for name, images in counts.items() if images is not None]
    return (
        f"CapsNet of {trainer.num_params:,} parameters; {', '.join(others)} and {last} images of "
        f"{' x '.join(map(str, dataset.image_shape))} in {dataset.num_classes} classes"
    )


def describe_weights(trainer: Trainer, folders: SeedFolders) -> list[str]:
    """Return lines about weights that are not random at first or that are not trained; none for an ordinary run."""
    origin, frozen = folders.run(folders.seeds[0]).origin, trainer.config.freeze
    lines = [] if origin is None else origin.describe()
    if frozen:
        lines.append(f"Frozen: {', '.join(frozen)}, {trainer.num_frozen:,} of {trainer.num_params:,} parameters")
    return lines


def lines_of_seeds(seeds: Sequence[int], tests: list[Evaluation]) -> str:
    """Return the result of each seed, then mean and sample standard deviation."""
    accuracies = np.array([test.accuracy for test in tests])
    mean, deviation = accuracies.mean(), accuracies.std(ddof=1)
    lines = [f"seed {seed}: {final_line(test)}" for seed, test in zip(seeds, tests, strict=True)]
    lines.append(
        f"test accuracy {mean:.4f} +- {deviation:.4f} from {len(seeds)} seeds on {tests[0].num_images} images (error "
        f"{100 * (1 - mean):.2f} +- {100 * deviation:.2f} %)"
    )
    return "\n".join(lines)


def picture(model: CapsNet, dataset: Dataset) -> Figure:
    """Draw the first test images above their reconstructions from the capsules of the predicted classes.

    An image with k labels is shown k times, each time with one of its k predicted classes.
    """
    labels = rearrange(dataset.test_labels[:PICTURED], "b ... -> b (...)")
    k = labels.shape[1]
    labels = labels[: max(PICTURED // k, 1)]
    images = dataset.test_images[: len(labels)]
    predictions, reconstructions = reconstruct_each(model, images, k)
    titles = np.concatenate([_matched(*both) for both in zip(labels, predictions, strict=True)])
    images = repeat(np.asarray(to_unit_range(jnp.asarray(images))), "b ... -> (b k) ...", k=k)
    reconstructions = rearrange(reconstructions, "b k ... -> (b k) ...")
    return reconstructions_figure(images, reconstructions, titles, predictions.ravel(), dataset.class_names)


def _matched(labels: Int[np.ndarray, " k"], predictions: Int[np.ndarray, " k"]) -> Int[np.ndarray, " k"]:
    """Return the labels in the order of the predictions: the same class if it is a label, else a missed label."""
    missed = iter(np.setdiff1d(labels, predictions))
    return np.array([prediction if prediction in labels else next(missed) for prediction in predictions])
