"""The command `capsnet train`."""

import shlex
import time
from dataclasses import dataclass, replace
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

from capsnet_jax.config import Config
from capsnet_jax.data import Dataset, configured_dataset, with_absolute_paths
from capsnet_jax.data.augmentation import Augmentation
from capsnet_jax.errors import NonFiniteLossError, StoppedBySignalError, UsageError
from capsnet_jax.figures import reconstructions_figure
from capsnet_jax.nn.model import CapsNet
from capsnet_jax.ops import to_unit_range
from capsnet_jax.runs.folder import Run
from capsnet_jax.runs.metrics import event_writer_class
from capsnet_jax.runs.seeds import SeedFolders
from capsnet_jax.runs.session import train_runs
from capsnet_jax.train.evaluation import Evaluation, final_line, most_active
from capsnet_jax.train.loop import Trainer
from capsnet_jax.train.sharding import connect, failing_together

PICTURED = 10  # test images above their reconstructions


@dataclass(frozen=True)
class Train:
    """Trains a capsule network; the last line printed is its accuracy on all test images.

    Ctrl-C and SIGTERM end it after the steps under way, with a checkpoint to --resume from."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    preset: str | None = None
    """Values that all other options start from: readable (the reference model), digits (small and quick), or a
    published network: official, paper, efficient, em. By default digits for the data set of that name, and readable
    for all others; with --resume, what the run was started with."""
    run_dir: Path | None = None
    """Folder for config, metrics, checkpoints, weights and picture. By default runs/DATASET-DATE-TIME."""
    resume: bool = False
    """Go on with the run in --run-dir from its last checkpoint, or begin it if there is none."""
    seeds: int = 1
    """Number of seeds to train from, --seed and those that follow it: side by side as one program if memory allows,
    each with a run folder of its own in the run folder."""
    tensorboard: bool = False
    """Write TensorBoard events, too (pip install 'capsnet-jax[tensorboard]')."""
    distributed: bool = False
    """This is one of several processes of a run, on one or many hosts; all get the same options but --process-id."""
    coordinator: str | None = None
    """HOST:PORT of process 0. Under Slurm, this and the next two are found out."""
    num_processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Number of this process, from 0."""

    def run(self) -> None:
        self._check()
        if self.distributed:
            connect(self.coordinator, self.num_processes, self.process_id)
        data = with_absolute_paths(self.config.data)
        config = replace(self.config, data=data)
        dataset = configured_dataset(data).cropped(Augmentation.parse(data.augment).crop)
        folder = self.run_dir or Path("runs") / f"{Path(data.dataset).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        run = Run.of(folder, config, dataset)
        seeds = range(config.training.seed, config.training.seed + self.seeds)
        trainer = Trainer(
            run.new_model, dataset, config.training, augment=data.augment, stream=data.stream, seeds=seeds[:1]
        )
        folders = SeedFolders(run, seeds)
        with failing_together():
            folders.check(resume=self.resume)
            trainer.trace()
        with failing_together():
            if jax.process_index() == 0:
                folders.create()
        console = Console(highlight=False, quiet=jax.process_index() > 0)
        console.print(describe(trainer, dataset), f"Run folder: {folder}", sep="\n", soft_wrap=True)
        for layer, choice in trainer.implementations().items():
            console.print(f"{layer}: {choice}", soft_wrap=True)

        tests: list[Evaluation] = []
        try:
            for group in train_runs(
                trainer, folders, resume=self.resume, tensorboard=self.tensorboard, console=console
            ):
                tests += group.tests
                for run, model in zip(group.runs, group.trainer.models(), strict=True):
                    if model.decoder is not None and not console.quiet:
                        run.save_picture(picture(model, dataset))
        except NonFiniteLossError as error:
            check = f"`capsnet check-routing {config.model.routing}` tells whether the routing may be to blame."
            error.add_note(f"{check} The run folder keeps what was saved before.")
            raise
        except (StoppedBySignalError, KeyboardInterrupt) as error:
            error.add_note(f"To go on: capsnet train --resume --run-dir {shlex.quote(str(folder))}")
            raise
        if not console.quiet:
            print(lines_of_seeds(seeds, tests) if self.seeds > 1 else final_line(tests[0]))

    def _check(self) -> None:
        if self.seeds < 1:
            raise UsageError(f"seeds is {self.seeds}, and must be at least 1.")
        if self.resume and self.run_dir is None:
            raise UsageError("--resume needs the folder of the run; expected --run-dir, too.")
        options = {"coordinator": self.coordinator, "num_processes": self.num_processes, "process_id": self.process_id}
        given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
        if given and not self.distributed:
            raise UsageError(f"Got {', '.join(given)} for a run of one process; expected --distributed, too.")
        if self.tensorboard:
            event_writer_class()  # if it is missing, better now than once there is a run folder


def describe(trainer: Trainer, dataset: Dataset) -> str:
    """The sizes of model and data, in a line."""
    shape = " x ".join(map(str, dataset.image_shape))
    held_out = "" if dataset.validation_images is None else f"{len(dataset.validation_images):,} validation and "
    return (
        f"CapsNet of {trainer.num_params:,} parameters; {len(dataset.train_images):,} training"
        f"{', ' if held_out else ' and '}{held_out}{len(dataset.test_images):,} test images of {shape} in "
        f"{dataset.num_classes} classes"
    )


def lines_of_seeds(seeds: range, tests: list[Evaluation]) -> str:
    """The result from each seed, then mean and sample deviation."""
    accuracies = np.array([test.accuracy for test in tests])
    mean, deviation = accuracies.mean(), accuracies.std(ddof=1)
    lines = [f"seed {seed}: {final_line(test)}" for seed, test in zip(seeds, tests, strict=True)]
    lines.append(
        f"test accuracy {mean:.4f} +- {deviation:.4f} from {len(seeds)} seeds on {tests[0].num_images} images (error "
        f"{100 * (1 - mean):.2f} +- {100 * deviation:.2f} %)"
    )
    return "\n".join(lines)


def picture(model: CapsNet, dataset: Dataset) -> Figure:
    """The first test images, and what the capsules of their predicted classes make of them.

    An image with several labels is shown as often as it has labels, each time with one of the predicted capsules.
    """
    labels = rearrange(dataset.test_labels[:PICTURED], "b ... -> b (...)")
    k = labels.shape[1]
    labels = labels[: max(PICTURED // k, 1)]
    images = to_unit_range(jnp.asarray(dataset.test_images[: len(labels)]))
    capsules = model.encode(images)
    predictions = most_active(np.asarray(capsules.activations), k)
    titles = np.concatenate([_opposite(*both) for both in zip(labels, predictions, strict=True)])
    predictions = predictions.ravel()
    images, poses = (repeat(array, "b ... -> (b k) ...", k=k) for array in (images, capsules.poses))
    reconstructions = model.decode(poses, jnp.asarray(predictions))
    return reconstructions_figure(*map(np.asarray, (images, reconstructions, titles, predictions)))


def _opposite(labels: Int[np.ndarray, " k"], predictions: Int[np.ndarray, " k"]) -> Int[np.ndarray, " k"]:
    """For each prediction the same class, if it is a label, or else one of the labels that were not predicted."""
    missed = iter(np.setdiff1d(labels, predictions))
    return np.array([prediction if prediction in labels else next(missed) for prediction in predictions])
