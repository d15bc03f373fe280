"""The command `capsnet compare`: every routing on the same data and stem, from several seeds."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from flax import nnx
from rich.console import Console

from capsnet_jax.config import Config
from capsnet_jax.data import Dataset, configured_dataset
from capsnet_jax.data.augmentation import Augmentation
from capsnet_jax.errors import NonFiniteLossError, UsageError
from capsnet_jax.nn.model import CapsNet
from capsnet_jax.routing import ROUTINGS
from capsnet_jax.runs.comparison import Result, SeedOutcome, open_folder, table, write_report, write_results
from capsnet_jax.runs.seeds import groups_of_seeds
from capsnet_jax.train.couplings import make_coupling_entropy
from capsnet_jax.train.loop import Trainer
from capsnet_jax.train.progress_bar import show_progress

COUPLED_IMAGES = 1000  # test images over which the entropy of the couplings is averaged


@dataclass(frozen=True)
class Compare:
    """Trains every routing on the same images in the same order, from the same weights, and compares them.

    The same command with the same --output goes on where it stopped, and adds further routings to those there."""

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
        trainings = {routing: self.prepare(routing, dataset) for routing in routings}
        folder = self.output or Path("runs") / f"compare-{Path(data.dataset).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        results = open_folder(folder, self.depends_on())
        console = Console(highlight=False)
        console.print(
            f"{len(routings)} routings from {self.seeds} seeds each: {len(dataset.train_images):,} training and "
            f"{len(dataset.test_images):,} test images of {data.dataset}, {self.config.training.epochs} epochs",
            f"Output folder: {folder} (give it as --output to go on, if this is stopped)",
            sep="\n",
            soft_wrap=True,
        )
        for number, routing in enumerate(routings, 1):
            training = trainings.pop(routing)  # so that its compiled programs go when it is done
            if routing in results:
                console.print(f"{routing} ({number} of {len(routings)}): done before", soft_wrap=True)
                continue
            console.print(
                f"{routing} ({number} of {len(routings)}): {training.num_params:,} parameters", soft_wrap=True
            )
            results[routing] = self.train(routing, training, console)
            write_results(folder, results.values())
            write_report(folder, results.values())
        write_report(folder, results.values())
        print(table(results.values()))

    def prepare(self, routing: str, dataset: Dataset) -> Trainer:
        """The training of a routing, with nothing compiled yet.

        Raises:
            UsageError: the routing is unknown, or there is something wrong with it or with the config.
        """
        config = self.config
        model = replace(config.with_sizes(dataset.image_shape, dataset.num_classes).model, routing=routing)

        def new_model(seed: int) -> CapsNet:
            return CapsNet.from_config(model, rngs=nnx.Rngs(seed))

        return Trainer(new_model, dataset, config.training, augment=config.data.augment, stream=config.data.stream)

    def train(self, routing: str, trainer: Trainer, console: Console) -> Result:
        """Trains a routing from all seeds."""
        seeds = range(self.config.training.seed, self.config.training.seed + self.seeds)
        outcomes: list[SeedOutcome] = []
        speeds: list[float] = []
        memory, at_once, status = 0, 0, "ok"
        try:
            for group in groups_of_seeds(trainer, seeds, at_once=self.seeds_at_once):
                if len(group.seeds) < self.seeds:
                    console.print(f"seeds {group.seeds[0]} to {group.seeds[-1]}")
                memory, at_once = max(memory, group.memory()), max(at_once, len(group.seeds))
                outcomes += self.train_group(group, speeds, console)
        except NonFiniteLossError as error:
            status = f"diverged at step {error.step}"
            console.print(f"{routing}: {error}", soft_wrap=True)
        return Result(
            routing=routing,
            status=status,
            num_params=trainer.num_params,
            seeds_at_once=at_once,
            memory_bytes=memory,
            images_per_second=float(np.median(speeds[1:] or speeds)) if speeds else 0.0,
            seeds=outcomes,
        )

    def train_group(self, trainer: Trainer, speeds: list[float], console: Console) -> list[SeedOutcome]:
        """Trains from a group of seeds, and adds the images per second of each chunk to the speeds."""
        losses, errors = [], []
        for progress in show_progress(trainer.run(), epochs=trainer.config.epochs, console=console):
            speeds.append(progress.images_per_second)
            if progress.ends_epoch:
                losses.append([seed.epoch["total"] for seed in progress.seeds])
                errors.append([1 - seed.test.accuracy for seed in progress.seeds if seed.test is not None])
        coupling_entropy = make_coupling_entropy(trainer.graphdef)
        images = trainer.dataset.test_images[:COUPLED_IMAGES]
        return [
            SeedOutcome(
                seed=seed,
                train_loss=[of_seeds[index] for of_seeds in losses],
                test_error=[of_seeds[index] for of_seeds in errors],
                coupling_entropy=float(coupling_entropy(trainer.weights(index), images)),
            )
            for index, seed in enumerate(trainer.seeds)
        ]

    def depends_on(self) -> dict[str, Any]:
        """What the result of a routing depends on besides the routing."""
        fields = self.config.to_json()
        del fields["model"]["routing"]
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
