"""The options of `capsnet train` and `capsnet compare`: what they start from, and what their help lists."""

import argparse
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from capsnet_jax.config import DataConfig
from capsnet_jax.data.augmentation import describe_augmentations
from capsnet_jax.presets import get_preset
from capsnet_jax.routing import ROUTINGS
from capsnet_jax.routing.registry import describe_options
from capsnet_jax.runs.seeds import saved_options

Command = TypeVar("Command")


def parse_training(command: type[Command], argv: Sequence[str], prog: str) -> Command:
    """Parse the arguments of a command that trains, whose field `config` is a `Config`; help ends the program.

    Raises:
        UsageError: there is no such preset, or the run to go on with cannot be read.
    """
    return tyro.cli(
        command,
        default=command(**default_options(argv)),
        args=argv,
        prog=prog,
        description=f"{inspect.cleandoc(command.__doc__ or '')}\n\n{describe_routings()}\n\n{describe_changes()}",
        config=(tyro.conf.OmitArgPrefixes,),
    )


def default_options(argv: Sequence[str]) -> dict[str, Any]:
    """The fields that the options start from, which depend on some of the options themselves.

    Raises:
        UsageError: there is no such preset, or the run to go on with cannot be read.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset")
    parser.add_argument("--dataset", default=DataConfig.dataset)
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--resume", action="store_true")
    try:
        options, _ = parser.parse_known_args([_with_hyphens(argument) for argument in argv])
    except argparse.ArgumentError:  # an option without its value, which the real parser tells of
        options = parser.parse_args([])
    if options.resume and options.run_dir is not None and options.preset is None:
        saved = saved_options(options.run_dir)
        if saved is not None:
            return saved
    preset = options.preset or ("digits" if options.dataset == "digits" else "readable")
    return {"config": get_preset(preset)}


def describe_routings() -> str:
    """The routings and their options, for help."""
    lines = [f"{name}: {describe_options(function)}" for name, function in ROUTINGS.items()]
    return "\n\n".join(["Routings and their options, as in --routing dynamic,leaky=true,num_iterations=5:", *lines])


def describe_changes() -> str:
    """The random changes of training images, for help."""
    lines = describe_augmentations().splitlines()
    return "\n\n".join(["Changes of training images, as in --augment shift=0.1 rotation=15:", *lines])


def _with_hyphens(argument: str) -> str:
    """The name of an option as it is declared; with underscores it is taken, too."""
    name, equals, value = argument.partition("=")
    return (name.replace("_", "-") if name.startswith("--") else name) + equals + value
