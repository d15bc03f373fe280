"""The options that `capsnet train` and `capsnet compare` share."""

import argparse
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from capsnet_jax.config import Config, DataConfig, ModelConfig, TrainingConfig
from capsnet_jax.data.augmentation import describe_augmentations
from capsnet_jax.interchange.state_files import CONFIG, find_pretrained
from capsnet_jax.presets import get_preset
from capsnet_jax.routing import ROUTINGS
from capsnet_jax.routing.registry import describe_options
from capsnet_jax.runs.folder import read_run


@dataclass(frozen=True)
class TrainingOptions:
    """Options of a command that trains. Each dataclass among the fields is a group in the help."""

    preset: Annotated[
        str | None,
        tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: digits for the data set digits, else readable)"),
    ] = None
    """Preset that the defaults of all other options come from:
    readable (the reference model), digits (small and quick), official, paper, efficient, em."""
    from_: Annotated[Path | None, tyro.conf.arg(name="from", metavar="PATH")] = None
    """Start from the weights of a run folder, a converted folder, a .safetensors or .pt file, or a pretrained model.
    Without --preset, a config.json there provides the defaults of the model."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    ROUTING_OPTION: ClassVar = "--routing"

    @property
    def config(self) -> Config:
        return Config(self.model, self.data, self.training)

    @classmethod
    def of_config(cls, config: Config, **fields: Any) -> Any:
        return cls(model=config.model, data=config.data, training=config.training, **fields)

    @classmethod
    def epilog(cls) -> str:
        """Return the tables of routings and augmentations at the end of the help."""
        routings = [(name, describe_options(function)) for name, function in ROUTINGS.items()]
        changes = [line.split(" ", 1) for line in describe_augmentations().splitlines()]
        option = cls.ROUTING_OPTION
        about_routings = f"for {option}, with options after commas: {option} em,annealing=0.9 (docs/routing.md)"
        about_changes = "for --augment, as in --augment shift=0.1 flip (docs/training.md)"
        return "\n".join(_table("Routings", about_routings, routings) + _table("Changes", about_changes, changes))


def read_defaults(argv: Sequence[str], *, trust_code: bool) -> tuple[Config, Path | None]:
    """Find the defaults of all options from --preset, --from, --dataset, --run-dir and --resume.

    Args:
        argv: arguments of the command.
        trust_code: whether the config of the weights to start from may name a routing of another package.

    Returns:
        The config of the preset, by default of the one that suits the data set, with the model that --from is of; and
        the folder of the run to resume, whose options replace it, or None.

    Raises:
        UsageError: there is no such preset, or the config of --from cannot be read.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset")
    parser.add_argument("--from", type=Path, dest="source")
    parser.add_argument("--dataset", default=DataConfig.dataset)
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--resume", action="store_true")
    try:
        options, _ = parser.parse_known_args([_with_hyphens(argument) for argument in argv])
    except argparse.ArgumentError:  # an option without its value, which the real parser reports
        options = parser.parse_args([])
    config = get_preset(options.preset or ("digits" if options.dataset == "digits" else "readable"))
    if options.preset is not None:
        return config, None
    if options.source is not None:
        source = find_pretrained(options.source)
        folder = source if source.is_dir() else source.parent
        if (folder / CONFIG).exists():
            config = replace(config, model=read_run(folder, trust_code=trust_code).config.model)
    return config, options.run_dir if options.resume else None


def _table(name: str, about: str, rows: Sequence[Sequence[str]]) -> list[str]:
    width = min(shutil.get_terminal_size().columns, 120)
    left = max(len(row[0]) for row in rows) + 4
    lines = ["", *textwrap.wrap(f"{name} {about}:", width)]
    for first, second in rows:
        start, indent = f"  {first}".ljust(left), " " * left
        lines.append(textwrap.fill(second, width, initial_indent=start, subsequent_indent=indent))
    return lines


def is_given(argv: Sequence[str], option: str) -> bool:
    """Return whether an option is among the arguments of a command."""
    return any(_with_hyphens(argument).partition("=")[0] == option for argument in argv)


def _with_hyphens(argument: str) -> str:
    """Replace underscores in the name of an option, as tyro does."""
    name, equals, value = argument.partition("=")
    return (name.replace("_", "-") if name.startswith("--") else name) + equals + value
