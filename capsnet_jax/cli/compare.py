"""The command `capsnet compare`: train the same model with every routing, from several seeds."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import tyro
from rich.console import Console

from capsnet_jax.cli.train import describe_weights, prepare
from capsnet_jax.cli.training_options import TrainingOptions, is_given, read_defaults
from capsnet_jax.config import Config, ModelConfig
from capsnet_jax.data import configured_dataset, with_absolute_paths
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
    write_results,
)
from capsnet_jax.runs.folder import Run, SeedFolders
from capsnet_jax.runs.origin import Source
from capsnet_jax.runs.session import train_runs
from capsnet_jax.train.evaluation import mean_coupling_entropy
from capsnet_jax.train.loop import Trainer

COUPLED_IMAGES = 1000  # test images for the mean coupling entropy


@dataclass(frozen=True)
class ComparedModel(ModelConfig):
    """Sizes and options of the network, other than its routing. The defaults are the reference model."""

    routing: tyro.conf.Suppress[str] = "dynamic"  # replaced by each routing in turn


@dataclass(frozen=True)
class ComparisonOptions:
    """Routings and seeds to compare, and where the results are saved."""

    routings: tuple[str, ...] = ("all",)
    """Routings to compare, with options after commas; all stands for every built-in one."""
    seeds: int = 3
    """Number of seeds per routing: --seed, --seed + 1 ..."""
    output: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="(default: runs/compare-DATASET-DATE-TIME)")] = None
    """Folder for results, table and figure."""
    seeds_at_once: int = 0
    """Number of seeds to train side by side; 0 for as many as fit in memory."""


@dataclass(frozen=True)
class Compare(TrainingOptions):
    """Train the same model with every routing algorithm, and compare the results.

    All models see the same images in the same order, and start from the same weights.
    The same command with the same --output continues where it stopped.
    Details: docs/training.md."""

    model: ComparedModel = field(default_factory=ComparedModel)
    comparison: ComparisonOptions = field(default_factory=ComparisonOptions)
    ROUTING_OPTION: ClassVar = "--routings"

    @classmethod
    def default(cls, argv: Sequence[str]) -> "Compare":
        if is_given(argv, "--routing"):
            raise UsageError("compare has no --routing; expected --routings, with all or any number of names.")
        config, _ = read_defaults(argv, trust_code=True)  # its routing is replaced by those that are compared
        return cls(data=config.data, model=ComparedModel(**vars(config.model)), training=config.training)

    @property
    def config(self) -> Config:
        return Config(ModelConfig(**vars(self.model)), self.data, self.training)

    def run(self) -> None:
        options, data = self.comparison, with_absolute_paths(self.data)
        for name, smallest in (("seeds", 1), ("seeds_at_once", 0)):
            if getattr(options, name) < smallest:
                raise UsageError(f"{name} is {getattr(options, name)}, and must be at least {smallest}.")
        routings = expand(options.routings)
        source = None if self.from_ is None else Source.read(self.from_)
        dataset = configured_dataset(data).cropped(Augmentation.parse(data.augment).crop)
        stem = Path(self.data.dataset).stem
        folder = options.output or Path("runs") / f"compare-{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        trainings = {}
        for routing in routings:
            config = replace(self.config, data=data, model=replace(self.config.model, routing=routing))
            run = Run.of(folder / folder_of_routing(routing), config, dataset)
            trainings[routing] = prepare(run, dataset, options.seeds, source)
        results = open_folder(folder, self.depends_on(source))
        for routing, (_, folders) in trainings.items():
            if routing not in results:
                folders.check(resume=True)
        console = Console(highlight=False, markup=False, emoji=False)
        console.print(
            f"{len(routings)} routings from {options.seeds} seeds each: {len(dataset.train_images):,} training and "
            f"{len(dataset.test_images):,} test images of {self.data.dataset}, {self.training.epochs} epochs",
            f"Output folder: {folder} (give it as --output to continue, if this is stopped)",
            sep="\n",
            soft_wrap=True,
        )
        for number, routing in enumerate(routings, 1):
            trainer, folders = trainings.pop(routing)  # frees its compiled programs when it is done
            progress = f"{routing} ({number} of {len(routings)})"
            if routing in results:
                console.print(f"{progress}: done before", soft_wrap=True)
            else:
                console.print(f"{progress}: {trainer.num_params:,} parameters", soft_wrap=True)
                for line in describe_weights(trainer, folders):
                    console.print(line, soft_wrap=True)
                results[routing] = self.train(routing, trainer, folders, console)
            write_results(folder, results.values())
            folders.delete_checkpoints()
        print(table(results.values()))

    def train(self, routing: str, trainer: Trainer, folders: SeedFolders, console: Console) -> Result:
        """Train a routing from all seeds, or resume that."""
        folders.create()
        images = trainer.dataset.test_images[:COUPLED_IMAGES]
        outcomes: list[SeedOutcome] = []
        status = "ok"
        try:
            at_once = self.comparison.seeds_at_once
            for trained, runs, _ in train_runs(trainer, folders, at_once=at_once, console=console):
                for run, model in zip(runs, trained.models(), strict=True):
                    outcomes.append(SeedOutcome.of(run, mean_coupling_entropy(model, images)))
        except NonFiniteLossError as error:
            status = f"diverged at step {error.step}"
            console.print(f"{routing}: {error}", soft_wrap=True)
        except (StoppedBySignalError, KeyboardInterrupt) as error:
            error.add_note("To continue: the same command, with the output folder above as --output.")
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

    def depends_on(self, source: Source | None) -> dict[str, Any]:
        """Return what the result of a routing depends on, other than the routing."""
        fields = self.config.to_json()
        for name in ("routing", "image_shape", "num_classes"):  # the latter two are set by the data set
            del fields["model"][name]
        fields |= {"seeds": self.comparison.seeds, "device": jax.devices()[0].device_kind}
        return fields if source is None else fields | {"from": source.path, "sha256": source.sha256}


def expand(routings: Iterable[str]) -> list[str]:
    """Return the names of the routings, each once; "all" stands for every built-in one.

    Raises:
        UsageError: there are none.
    """
    names = [name for routing in routings for name in (ROUTINGS if routing == "all" else (routing,))]
    if not names:
        raise UsageError(f"routings is empty; expected all, or some of {', '.join(ROUTINGS)}.")
    return list(dict.fromkeys(names))
