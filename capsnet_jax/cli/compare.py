"""The command `capsnet compare`: every routing on the same data and stem, from several seeds."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console

from capsnet_jax.config import Config
from capsnet_jax.data import Dataset, configured_dataset, with_absolute_paths
from capsnet_jax.data.augmentation import Augmentation
from capsnet_jax.errors import NonFiniteLossError, StoppedBySignalError, UsageError
from capsnet_jax.routing import ROUTINGS
from capsnet_jax.runs.comparison import (
    Result,
    SeedOutcome,
    folder_of_routing,
    median_speed,
    open_folder,
    table,
    write_report,
    write_results,
)
from capsnet_jax.runs.folder import Run
from capsnet_jax.runs.seeds import SeedFolders
from capsnet_jax.runs.session import train_runs
from capsnet_jax.train.evaluation import mean_coupling_entropy
from capsnet_jax.train.loop import Trainer

COUPLED_IMAGES = 1000  # test images over which the entropy of the couplings is averaged


@dataclass(frozen=True)
class Compare:
    """Trains every routing on the same images in the same order, from the same weights, and compares them.

    Each has a folder in the output folder, with the runs from its seeds. The same command with the same --output goes
    on where it stopped, in the middle of a routing, too, and adds further routings to those there."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    routings: tuple[str, ...] = ("all",)
    """Names as for --routing, which they take the place of; all for every registered one."""
    seeds: int = 3
    """Number of seeds that every routing is trained from: --seed and those that follow it."""
    seeds_at_once: int = 0
    """Seeds trained side by side as one program; 0 for as many as fit in memory."""
    preset: str | None = None
    """Values that all other options start from, as for train."""
    output: Path | None = None
    """Folder for results, table and figure. By default runs/compare-DATASET-DATE-TIME."""

    def run(self) -> None:
        for name, smallest in (("seeds", 1), ("seeds_at_once", 0)):
            if getattr(self, name) < smallest:
                raise UsageError(f"{name} is {getattr(self, name)}, and must be at least {smallest}.")
        data = self.config.data
        routings = expand(self.routings)
        dataset = configured_dataset(data).cropped(Augmentation.parse(data.augment).crop)
        folder = self.output or Path("runs") / f"compare-{Path(data.dataset).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        trainings = {routing: self.prepare(routing, dataset, folder) for routing in routings}
        results = open_folder(folder, self.depends_on())
        for routing, (_, folders) in trainings.items():
            if routing not in results:
                folders.check(resume=True)
        console = Console(highlight=False)
        console.print(
            f"{len(routings)} routings from {self.seeds} seeds each: {len(dataset.train_images):,} training and "
            f"{len(dataset.test_images):,} test images of {data.dataset}, {self.config.training.epochs} epochs",
            f"Output folder: {folder} (give it as --output to go on, if this is stopped)",
            sep="\n",
            soft_wrap=True,
        )
        for number, routing in enumerate(routings, 1):
            trainer, folders = trainings.pop(routing)  # so that its compiled programs go when it is done
            progress = f"{routing} ({number} of {len(routings)})"
            if routing in results:
                console.print(f"{progress}: done before", soft_wrap=True)
            else:
                console.print(f"{progress}: {trainer.num_params:,} parameters", soft_wrap=True)
                results[routing] = self.train(routing, trainer, folders, console)
                write_results(folder, results.values())
                write_report(folder, results.values())
            folders.delete_checkpoints()
        write_report(folder, results.values())
        print(table(results.values()))

    def prepare(self, routing: str, dataset: Dataset, folder: Path) -> tuple[Trainer, SeedFolders]:
        """The training of a routing, with nothing compiled yet, and the folders of its runs, which are not made yet.

        Raises:
            UsageError: the routing is unknown, or there is something wrong with it or with the config.
        """
        data = with_absolute_paths(self.config.data)
        config = replace(self.config, data=data, model=replace(self.config.model, routing=routing))
        run = Run.of(folder / folder_of_routing(routing), config, dataset)
        seeds = range(config.training.seed, config.training.seed + self.seeds)
        trainer = Trainer(
            run.new_model, dataset, config.training, augment=data.augment, stream=data.stream, seeds=seeds[:1]
        )
        return trainer, SeedFolders(run, seeds)

    def train(self, routing: str, trainer: Trainer, folders: SeedFolders, console: Console) -> Result:
        """Train a routing from all seeds, or what is left of that."""
        folders.create()
        images = trainer.dataset.test_images[:COUPLED_IMAGES]
        outcomes: list[SeedOutcome] = []
        status = "ok"
        try:
            for group in train_runs(trainer, folders, at_once=self.seeds_at_once, console=console):
                for run, model in zip(group.runs, group.trainer.models(), strict=True):
                    outcomes.append(SeedOutcome.of(run, mean_coupling_entropy(model, images)))
        except NonFiniteLossError as error:
            status = f"diverged at step {error.step}"
            console.print(f"{routing}: {error}", soft_wrap=True)
        except (StoppedBySignalError, KeyboardInterrupt) as error:
            error.add_note("To go on: the same command, with the output folder above as --output.")
            raise
        return Result(
            routing=routing,
            status=status,
            num_params=trainer.num_params,
            seeds_at_once=folders.at_once,
            memory_bytes=trainer.with_seeds(folders.seeds[: folders.at_once]).memory(),
            images_per_second=median_speed(folders),
            seeds=outcomes,
        )

    def depends_on(self) -> dict[str, Any]:
        """What the result of a routing depends on besides the routing."""
        fields = self.config.to_json()
        for name in ("routing", "image_shape", "num_classes"):  # the latter two are those of the data set
            del fields["model"][name]
        return fields | {"seeds": self.seeds, "device": jax.devices()[0].device_kind}


def expand(routings: Iterable[str]) -> list[str]:
    """The routings by name, each once; "all" stands for every registered one.

    Raises:
        UsageError: there are none.
    """
    names = [name for routing in routings for name in (ROUTINGS if routing == "all" else (routing,))]
    if not names:
        raise UsageError(f"routings is empty; expected all, or some of {', '.join(ROUTINGS)}.")
    return list(dict.fromkeys(names))
