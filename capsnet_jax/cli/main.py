"""Capsule networks in JAX: first what to do, then its options."""

import argparse
import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import tyro

from capsnet_benchmark.command import Benchmark
from capsnet_jax.cli.check_routing import CheckRouting
from capsnet_jax.cli.compare import Compare
from capsnet_jax.cli.convert import Convert
from capsnet_jax.cli.evaluate import Evaluate
from capsnet_jax.cli.export import Export
from capsnet_jax.cli.predict import Predict
from capsnet_jax.cli.train import Train
from capsnet_jax.config import DataConfig
from capsnet_jax.data.augmentation import describe_augmentations
from capsnet_jax.errors import NonFiniteLossError, UsageError
from capsnet_jax.presets import PRESETS
from capsnet_jax.routing import ROUTINGS
from capsnet_jax.routing.registry import describe_options
from capsnet_jax.runs.report import Report
from capsnet_jax.runs.seeds import saved_options
from capsnet_jax.runs.signals import StoppedBySignalError
from capsnet_verify.command import Verify


@runtime_checkable
class Command(Protocol):
    """What a command line asks for."""

    def run(self) -> int | None:
        """Does it; returns the exit status, if it is not 0."""


COMMANDS: dict[str, Callable[..., Command]] = {
    "train": Train,
    "evaluate": Evaluate,
    "predict": Predict,
    "report": Report,
    "compare": Compare,
    "check-routing": CheckRouting,
    "benchmark": Benchmark,
    "convert": Convert,
    "export": Export,
    "verify": Verify,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0 if all went well, 1 if training met a loss that is not finite, memory was not enough or a check failed, 2 if
        the user has to mend something, and 128 plus the number of the signal if stopped by one: 130 by Ctrl-C, 143 by
        SIGTERM.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    sys.path.insert(0, "")  # a routing of the user's own is looked for where they are, as `python` would
    # Orbax logs what goes wrong with a stack trace before it raises it, and then it is told here in a sentence.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        return parse(argv).run() or 0
    except UsageError as error:
        return _fail(2, error)
    except NonFiniteLossError as error:
        return _fail(1, error, _notes(error))
    except StoppedBySignalError as error:
        print(" ".join([f"capsnet: {error}", *_notes(error)]), file=sys.stderr)
        return 128 + error.signal
    except KeyboardInterrupt as error:
        print(" ".join(["capsnet: interrupted; folders keep what was saved before.", *_notes(error)]), file=sys.stderr)
        return 130
    except OSError as error:
        return _fail(2, error)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        advice = "A smaller --batch-size needs less, and so do --accumulate, --recompute-routing and --stream True."
        return _fail(1, UsageError(f"The device has not enough memory: {str(error).splitlines()[0]}"), [advice])


def parse(argv: Sequence[str]) -> Command:
    """The command of these arguments; help and errors of syntax end the program, with status 0 and 2."""
    if argv[:1] == ["compare"] and any(argument.partition("=")[0] == "--routing" for argument in argv):
        raise UsageError("compare has no --routing; expected --routings, with all or any number of names.")
    if argv[:1] in (["train"], ["compare"]):
        command: type[Train | Compare] = Train if argv[0] == "train" else Compare
        return tyro.cli(
            command,
            default=command(**default_options(argv[1:])),
            args=argv[1:],
            prog=f"capsnet {argv[0]}",
            description=f"{inspect.cleandoc(command.__doc__ or '')}\n\n{describe_routings()}\n\n{describe_changes()}",
            config=(tyro.conf.OmitArgPrefixes,),
        )
    # By itself, as tyro tells an error of a dataclass under another name when there are several.
    if argv and argv[0] in COMMANDS:
        return tyro.cli(COMMANDS[argv[0]], args=argv[1:], prog=f"capsnet {argv[0]}")
    return tyro.extras.subcommand_cli_from_dict(COMMANDS, args=argv, prog="capsnet", description=__doc__)


def default_options(argv: Sequence[str]) -> dict[str, Any]:
    """What the options of `train` and `compare` start from: they depend on some of the options themselves.

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
    if preset not in PRESETS:
        raise UsageError(f"Unknown preset {preset!r}; expected {', '.join(PRESETS)}.")
    return {"config": PRESETS[preset]}


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


def _notes(error: BaseException) -> Sequence[str]:
    """What the command added for the user to do. Others have notes of JAX, on its own stack traces."""
    return getattr(error, "__notes__", ())


def _fail(status: int, error: Exception, advice: Sequence[str] = ()) -> int:
    """Tells what went wrong, and what can be done, in a line; returns the exit status."""
    print(" ".join([f"capsnet: error: {error}", *advice]), file=sys.stderr)
    return status
