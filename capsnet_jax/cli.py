"""The console command: capsnet train | evaluate | compare | check-routing."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from matplotlib.figure import Figure
from rich.console import Console

from capsnet_jax.check_routing import CheckRouting
from capsnet_jax.compare import Compare
from capsnet_jax.config import PRESETS, Config, DataConfig
from capsnet_jax.data import Dataset, load_dataset, to_unit_range
from capsnet_jax.errors import UsageError
from capsnet_jax.evaluation import Evaluation, evaluate, make_count_correct
from capsnet_jax.figures import reconstructions_figure
from capsnet_jax.model import CapsNet
from capsnet_jax.progress import show_progress
from capsnet_jax.routing import ROUTINGS
from capsnet_jax.routing.binding import describe_options
from capsnet_jax.runs import Run, load_run
from capsnet_jax.training import NonFiniteLossError, fit

PICTURED = 10  # test images above their reconstructions


@dataclass(frozen=True)
class Train:
    """Trains a capsule network; the last line printed is its accuracy on all test images."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    preset: str | None = None
    """Values that all other options start from: readable (the reference model), digits (small and quick), or a
    published network: official, paper, efficient, em. By default digits for the data set of that name, and readable
    for all others."""
    run_dir: Path | None = None
    """New folder for config, metrics, weights and picture. By default runs/DATASET-DATE-TIME."""

    def run(self) -> None:
        config = self.config
        dataset = load_dataset(config.data.dataset, config.data.data_dir).limited(config.data.train_limit)
        folder = self.run_dir or Path("runs") / f"{config.data.dataset}-{time.strftime('%Y%m%d-%H%M%S')}"
        run = Run(folder, config, dataset.image_shape, dataset.num_classes)
        model = run.new_model()
        training = fit(model, dataset, config.training, shift=config.data.shift, shift_pixels=config.data.shift_pixels)
        run.create_folder()
        console = Console(highlight=False)
        console.print(describe(model, dataset), f"Run folder: {folder}", sep="\n", soft_wrap=True)

        try:
            for progress in show_progress(training, epochs=config.training.epochs, console=console):
                if progress.test is not None:
                    run.record(progress)
                    run.save_weights(model)
                    final = progress.test
        except NonFiniteLossError as error:
            check = f"`capsnet check-routing {config.model.routing}` tells whether the routing may be to blame."
            raise NonFiniteLossError(f"{error} {check}") from error
        if model.decoder is not None:
            run.save_picture(picture(model, dataset))
        print(final_line(final))


@dataclass(frozen=True)
class Evaluate:
    """Evaluates the weights of a run on all test images."""

    run_dir: tyro.conf.Positional[Path]
    """Folder of the run."""
    dataset: str | None = None
    """Data set, if not the one that the run was trained on."""
    data_dir: Path | None = None
    """Folder of the data set, if not the one that the run was trained from."""

    def run(self) -> None:
        run, model = load_run(self.run_dir)
        data = run.config.data
        dataset = load_dataset(self.dataset or data.dataset, self.data_dir or data.data_dir)
        graphdef, params = nnx.split(model)
        print(final_line(evaluate(make_count_correct(graphdef), params, dataset.test_images, dataset.test_labels)))


@runtime_checkable
class Command(Protocol):
    """What a command line asks for."""

    def run(self) -> int | None:
        """Does it; returns the exit status, if it is not 0."""


COMMANDS: dict[str, Callable[..., Command]] = {
    "train": Train,
    "evaluate": Evaluate,
    "compare": Compare,
    "check-routing": CheckRouting,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0 if all went well, 1 if training met a loss that is not finite or a check failed, 2 if the user has to mend
        something, and 130 if interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    sys.path.insert(0, "")  # a routing of the user's own is looked for where they are, as `python` would
    try:
        return parse(argv).run() or 0
    except UsageError as error:
        print(f"capsnet: error: {error}", file=sys.stderr)
        return 2
    except NonFiniteLossError as error:
        print(f"capsnet: error: {error} The run folder keeps what was saved before.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "capsnet: interrupted; the folder keeps the last whole epoch, or the last whole routing.",
            file=sys.stderr,
        )
        return 130


def parse(argv: Sequence[str]) -> Command:
    """The command of these arguments; help and errors of syntax end the program, with status 0 and 2."""
    if argv[:1] == ["compare"] and any(argument.partition("=")[0] == "--routing" for argument in argv):
        raise UsageError("compare has no --routing; expected --routings, with all or any number of names.")
    if argv[:1] in (["train"], ["compare"]):
        command: type[Train | Compare] = Train if argv[0] == "train" else Compare
        return tyro.cli(
            command,
            default=command(default_config(argv[1:])),
            args=argv[1:],
            prog=f"capsnet {argv[0]}",
            description=f"{command.__doc__}\n\n{describe_routings()}",
            config=(tyro.conf.OmitArgPrefixes,),
        )
    if argv[:1] == ["evaluate"]:
        return tyro.cli(Evaluate, args=argv[1:], prog="capsnet evaluate")
    if argv[:1] == ["check-routing"]:
        return tyro.cli(CheckRouting, args=argv[1:], prog="capsnet check-routing")
    return tyro.extras.subcommand_cli_from_dict(COMMANDS, args=argv, prog="capsnet", description=__doc__)


def default_config(argv: Sequence[str]) -> Config:
    """What the options of `train` and `compare` start from: they depend on two of the options themselves.

    Raises:
        UsageError: there is no such preset.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    parser.add_argument("--dataset", default=DataConfig.dataset)
    options, _ = parser.parse_known_args(argv)
    preset = options.preset or ("digits" if options.dataset == "digits" else "readable")
    if preset not in PRESETS:
        raise UsageError(f"Unknown preset {preset!r}; expected {', '.join(PRESETS)}.")
    return PRESETS[preset]


def describe_routings() -> str:
    """The routings and their options, for help."""
    lines = [f"{name}: {describe_options(function)}" for name, function in ROUTINGS.items()]
    return "\n\n".join(["Routings and their options, as in --routing dynamic,leaky=true,num_iterations=5:", *lines])


def describe(model: CapsNet, dataset: Dataset) -> str:
    """The sizes of model and data, in a line."""
    num_params = sum(param.size for param in jax.tree.leaves(nnx.state(model, nnx.Param)))
    shape = " x ".join(map(str, dataset.image_shape))
    return (
        f"CapsNet of {num_params:,} parameters; {len(dataset.train_images):,} training and "
        f"{len(dataset.test_images):,} test images of {shape} in {dataset.num_classes} classes"
    )


def final_line(test: Evaluation) -> str:
    """The result of a run."""
    error = 100 * (1 - test.accuracy)
    return f"test accuracy {test.accuracy:.4f} on {test.num_images} images (error {error:.2f} %)"


def picture(model: CapsNet, dataset: Dataset) -> Figure:
    """The first test images, and what the capsules of their predicted classes make of them."""
    images = to_unit_range(jnp.asarray(dataset.test_images[:PICTURED]))
    capsules = model.encode(images)
    predictions = capsules.activations.argmax(axis=1)
    reconstructions = model.decode(capsules.poses, predictions)
    return reconstructions_figure(
        *map(np.asarray, (images, reconstructions, dataset.test_labels[:PICTURED], predictions))
    )
