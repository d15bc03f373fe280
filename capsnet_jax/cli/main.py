"""The console command `capsnet`: first what to do, then its options."""

import difflib
import importlib
import logging
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from capsnet_jax import __version__
from capsnet_jax.errors import NonFiniteLossError, StoppedBySignalError, UsageError


class Entry(NamedTuple):
    """A command: the module and the class that it is, and what it does in a line."""

    module: str
    name: str
    summary: str


# Modules are imported when their command is called, so that the help comes at once.
COMMANDS = {
    "train": Entry("capsnet_jax.cli.train", "Train", "train a model, and tell its accuracy on the test images"),
    "evaluate": Entry("capsnet_jax.cli.evaluate", "Evaluate", "evaluate the model of a run on all test images"),
    "predict": Entry("capsnet_jax.cli.predict", "Predict", "tell the classes of image files"),
    "report": Entry("capsnet_jax.cli.report", "Report", "put runs side by side, in a table and as learning curves"),
    "compare": Entry("capsnet_jax.cli.compare", "Compare", "train and compare all routings, from the same seeds"),
    "check-routing": Entry("capsnet_jax.cli.check_routing", "CheckRouting", "check what a routing has to keep"),
    "benchmark": Entry("capsnet_jax.cli.benchmark", "Benchmark", "measure time and memory beside PyTorch"),
    "verify": Entry("capsnet_jax.cli.verify", "Verify", "compare all values and gradients with PyTorch's"),
    "convert": Entry("capsnet_jax.cli.convert", "Convert", "convert weights between PyTorch and JAX"),
    "export": Entry("capsnet_jax.cli.export", "Export", "write a model as StableHLO or ONNX"),
}
TRAINING = ("train", "compare")  # whose options start from a preset, or from the run that is resumed
ADVICE = "A smaller --batch-size needs less, and so do --accumulate, --recompute-routing and --stream True."


@runtime_checkable
class Command(Protocol):
    """The dataclass of a command, with a field for each option."""

    def run(self) -> int | None:
        """Does it; returns the exit status, if it is not 0."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 if all went well, 1 if training met a loss that is not finite, memory was not enough or a check failed, 2 if
        the user has to mend something, and 128 plus the number of the signal if stopped by one: 130 by Ctrl-C, 143 by
        SIGTERM.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in ([], ["-h"], ["--help"]):
        print(describe_commands())
        return 0
    if argv[0] == "--version":
        print(f"capsnet-jax {__version__}")
        return 0
    sys.path.insert(0, "")  # a routing of the user's own is looked for where they are, as `python` would
    try:
        command = parse(argv)
        # Orbax logs what goes wrong with a stack trace before it raises it, and then it is told here in a sentence.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        return command.run() or 0
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
    except RuntimeError as error:
        from jax.errors import JaxRuntimeError

        if not isinstance(error, JaxRuntimeError) or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _fail(1, UsageError(f"The device has not enough memory: {str(error).splitlines()[0]}"), [ADVICE])


def parse(argv: Sequence[str]) -> Command:
    """Parse arguments, of which the first names a command; help and errors of syntax end the program, with 0 and 2.

    Raises:
        UsageError: there is no such command, or it cannot do with these options.
    """
    name, *options = argv
    if name not in COMMANDS:
        raise UsageError(unknown_command(name))
    if name == "compare" and any(option.partition("=")[0] == "--routing" for option in options):
        raise UsageError("compare has no --routing; expected --routings, with all or any number of names.")
    entry = COMMANDS[name]
    command: Any = getattr(importlib.import_module(entry.module), entry.name)
    if name in TRAINING:
        from capsnet_jax.cli.training_options import parse_training

        return parse_training(command, options, prog=f"capsnet {name}")
    import tyro

    return tyro.cli(command, args=options, prog=f"capsnet {name}")


def describe_commands() -> str:
    """The help of `capsnet` itself."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: capsnet COMMAND [OPTIONS]",
            "",
            "Capsule networks in JAX.",
            "",
            *(f"  {name.ljust(width)}  {entry.summary}" for name, entry in COMMANDS.items()),
            "",
            "`capsnet COMMAND --help` tells the options of a command, `capsnet --version` the version.",
        ]
    )


def unknown_command(name: str) -> str:
    """A sentence that names the commands, and the one that may have been meant."""
    nearest = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f" (did you mean {nearest[0]}?)" if nearest else ""
    return f"Unknown command {name!r}{hint}; expected {', '.join(COMMANDS)}."


def _notes(error: BaseException) -> Sequence[str]:
    """What the command added for the user to do. Others have notes of JAX, on its own stack traces."""
    return getattr(error, "__notes__", ())


def _fail(status: int, error: Exception, advice: Sequence[str] = ()) -> int:
    """Tells what went wrong, and what can be done, in a line; returns the exit status."""
    print(" ".join([f"capsnet: error: {error}", *advice]), file=sys.stderr)
    return status
