"""The command `capsnet compare`: every routing on the same data and stem, from several seeds."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from rich.console import Console

from capsnet_jax.comparison import Result, SeedOutcome, open_folder, table, write_report, write_results
from capsnet_jax.config import Config
from capsnet_jax.data import Dataset, load_dataset
from capsnet_jax.errors import UsageError
from capsnet_jax.progress import show_progress
from capsnet_jax.routing import ROUTINGS
from capsnet_jax.seeds import DivergedError, SeedTraining, available_memory


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
        dataset = load_dataset(data.dataset, data.data_dir).limited(data.train_limit)
        trainings = {routing: self.prepare(routing, dataset) for routing in routings}
        folder = self.output or Path("runs") / f"compare-{data.dataset}-{time.strftime('%Y%m%d-%H%M%S')}"
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

    def prepare(self, routing: str, dataset: Dataset) -> SeedTraining:
        """The training of a routing, with nothing compiled yet.

        Raises:
            UsageError: the routing is unknown, or there is something wrong with it or with the config.
        """
        fields = self.config.to_json()
        fields["model"]["routing"] = routing
        return SeedTraining(Config.from_json(fields), dataset)

    def train(self, routing: str, training: SeedTraining, console: Console) -> Result:
        """Trains a routing from all seeds."""
        epochs = self.config.training.epochs
        at_once = min(self.seeds_at_once, self.seeds) or training.how_many_fit(self.seeds, available_memory())
        seeds = range(self.config.training.seed, self.config.training.seed + self.seeds)
        status = "ok"
        try:
            for start in range(0, self.seeds, at_once):
                group = seeds[start : start + at_once]
                if at_once < self.seeds:
                    console.print(f"seeds {group[0]} to {group[-1]}")
                for _ in show_progress(training.train(group), epochs=epochs, console=console):
                    pass
        except DivergedError as error:
            status = f"diverged at step {error.step}"
            console.print(f"{routing}: {error}", soft_wrap=True)
        return Result(
            routing=routing,
            status=status,
            num_params=training.num_params,
            seeds_at_once=at_once,
            memory_bytes=training.memory,
            images_per_second=training.images_per_second,
            seeds=[
                SeedOutcome(
                    seed=result.seed,
                    train_loss=np.reshape(result.losses, (epochs, -1)).mean(axis=1).tolist(),
                    test_error=[1 - test.accuracy for test in result.tests],
                    coupling_entropy=result.coupling_entropy,
                )
                for result in training.results
            ],
        )

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
