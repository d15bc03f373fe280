"""The console script `capsnet`: find the command, parse its options, run it and report errors."""

import contextlib
import difflib
import importlib
import inspect
import io
import logging
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from capsnet_jax import __version__
from capsnet_jax.errors import NonFiniteLossError, StoppedBySignalError, UsageError

# Class, in a module of this package, and summary. The module is imported only when its command is called.
COMMANDS = {
    "train": ("train:Train", "train a model, and print its accuracy on the test images"),
    "evaluate": ("evaluate:Evaluate", "evaluate a trained model on the test images, class by class"),
    "predict": ("predict:Predict", "classify image files"),
    "explore": ("explore:Explore", "draw in the browser, and see a trained model route"),
    "report": ("report:Report", "summarize runs in a table and plot their learning curves"),
    "figures": ("figures:Figures", "draw reconstructions, couplings, mistakes and curves of a run"),
    "compare": ("compare:Compare", "train the same model with every routing algorithm, and compare"),
    "check-routing": ("check_routing:CheckRouting", "test a routing algorithm, for example your own"),
    "benchmark": ("benchmark:Benchmark", "measure time and memory, side by side with PyTorch"),
    "verify": ("verify:Verify", "compare every value and gradient with PyTorch"),
    "convert": ("convert:Convert", "convert weights between PyTorch and JAX files"),
    "export": ("export:Export", "save a trained model as StableHLO or ONNX"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the name of the command and its options; by default those of the process.

    Returns:
        The exit status: 0 for success; 1 if the loss is not finite, memory is exhausted or a check failed; 2 if an
        argument or a file is wrong; 129, 130 or 143 if stopped by SIGHUP, Ctrl-C or SIGTERM; 141 if the reader of the
        output has ended, such as `head`.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files and classes that the locale cannot express
    try:
        status = run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return status
    except OSError as error:
        place = error.filename or "a file"
        try:
            sys.stdout.flush()
        except OSError:
            place = "the output"
            # Python writes the rest of the output when it exits, which would fail again.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 128 + 13  # SIGPIPE
        return _fail(2, f"Cannot read or write {place}: {error.strerror or error}.")


def run(argv: Sequence[str]) -> int:
    """Run a command, and report errors; returns the exit status.

    Raises:
        OSError: a file or the output cannot be read or written.
    """
    if argv[:1] in ([], ["-h"], ["--help"]):
        print(describe_commands())
        return 0
    if argv[0] == "--version":
        print(f"capsnet-jax {__version__}")
        return 0
    sys.path.append("")  # find the user's routings in the working directory; nothing there replaces a package
    try:
        command = parse(argv)
        # Orbax logs errors with a stack trace before raising them; they are reported below in one sentence.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        if command is None:
            return 0
        from capsnet_jax.compilation import use_cache

        use_cache()
        return command.run() or 0
    except UsageError as error:
        return _fail(2, error)
    except NonFiniteLossError as error:
        return _fail(1, error, *_notes(error))
    except StoppedBySignalError as error:
        print(f"capsnet: {error}", *_notes(error), file=sys.stderr)
        return 128 + error.signal
    except KeyboardInterrupt as error:
        print("capsnet: interrupted; folders keep what was saved before.", *_notes(error), file=sys.stderr)
        return 130
    except MemoryError as error:  # of the host, such as for a folder of large photographs
        return _fail(1, f"There is not enough memory: {error}; expected fewer or smaller images, or a smaller model.")
    except RuntimeError as error:
        from jax.errors import JaxRuntimeError

        if not isinstance(error, JaxRuntimeError) or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        advice = "A smaller --batch-size needs less, and so do --accumulate, --recompute-routing and --stream True."
        return _fail(1, f"The device does not have enough memory: {str(error).splitlines()[0]}", advice)


def parse(argv: Sequence[str]) -> Any | None:
    """Parse the name of a command and its options.

    Returns:
        An instance of the class of the command, to be run by its method `run`; None if help was printed instead.

    Raises:
        UsageError: there is no such command, or an option is unknown or has a wrong value.
    """
    name, *options = argv
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" (did you mean {nearest[0]}?)" if nearest else ""
        raise UsageError(f"Unknown command {name!r}{hint}; expected {', '.join(COMMANDS)}.")
    module, class_name = COMMANDS[name][0].split(":")
    command = getattr(importlib.import_module(f"capsnet_jax.cli.{module}"), class_name)
    import tyro

    from_options = {"default": command.default(options)} if hasattr(command, "default") else {}
    width = min(shutil.get_terminal_size().columns, 120)
    paragraphs = inspect.cleandoc(command.__doc__).split("\n\n")
    description = "\n\n".join(
        textwrap.fill(" ".join(text.split()), width, subsequent_indent="  ") for text in paragraphs
    )
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(
                command,
                args=options,
                prog=f"capsnet {name}",
                description=description,
                config=(tyro.conf.OmitArgPrefixes,),
                **from_options,
            )
    except SystemExit as end:
        if end.code:
            raise UsageError(in_a_sentence(printed.getvalue(), f"capsnet {name} --help")) from None
        if hasattr(command, "epilog"):
            print(command.epilog())
        return None


def in_a_sentence(box: str, help_command: str) -> str:
    """Turn the box that tyro draws around an error into one sentence.

    Args:
        box: what tyro printed: the error, and below horizontal rules some help.
        help_command: the command that lists all options.
    """
    rows = [row.strip("│| ") for row in re.sub(r"\x1b\[[\d;]*m", "", box).strip().splitlines()[1:-1]]
    message, *others = "\n".join("" if set(row) <= set("─-") else row for row in rows).split("\n\n")
    message, help_text = " ".join(message.split()).rstrip("."), " ".join(" ".join(others).split())
    if constructor := re.match(r"Error parsing \w+: (.*)", message):  # of a dataclass, whose messages are complete
        return f"{constructor[1]}."
    help_command = f"`{help_command}`"
    if choice := re.match(r"invalid choice ('.*') for argument '(.*)'. Expected one of \((.*)\)", message):
        return f"{choice[2]} is {choice[1]}; expected {choice[3]} ({help_command} explains it)."
    value = re.match(r"Error parsing (\S+): .*?(\[?'.*'\]?)$", message)
    expected = re.search(r"Argument helptext: \S+ (.*?) [A-Z0-9][a-z.]", help_text)
    if value and expected:
        kinds = {"INT": "a whole number", "FLOAT": "a number"}
        kind = kinds.get(expected[1]) or re.sub(r"[{}]", "", expected[1]).replace("|", " or ")
        return f"{value[1]} is {value[2]}; expected {kind} ({help_command} explains it)."
    nearest = re.search(r"Perhaps you meant: (--[\w-]+)", help_text)
    hint = f"did you mean {nearest[1]}? " if nearest else ""
    return f"{message}; {hint}{help_command} lists all options."


def describe_commands() -> str:
    """Return the help of `capsnet` itself."""
    lines = [f"  {name:13}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: capsnet COMMAND [OPTIONS]",
            "",
            "Capsule networks with routing, in JAX.",
            "",
            *lines,
            "",
            "`capsnet COMMAND --help` describes a command and its options.",
            "`capsnet train` alone trains on small digits, in a minute or two.",
            "`capsnet --version` prints the version.",
            "JAX_ENABLE_COMPILATION_CACHE=false keeps no compiled programs in ~/.cache.",
        ]
    )


def _notes(error: BaseException) -> Sequence[str]:
    """Return the advice that a command added to an error."""
    return getattr(error, "__notes__", ())


def _fail(status: int, error: Exception | str, *advice: str) -> int:
    print(f"capsnet: error: {error}", *advice, file=sys.stderr)
    return status
