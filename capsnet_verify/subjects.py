"""What can be verified: a preset, a run, a file of weights, or a small model in which nothing is equal by chance."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from capsnet_jax.config import Config, ModelConfig
from capsnet_jax.errors import UsageError
from capsnet_jax.interchange.architecture import infer_architecture
from capsnet_jax.interchange.state_files import CONFIG, read_state
from capsnet_jax.interchange.weights import StateDict
from capsnet_jax.presets import PRESETS, get_preset
from capsnet_jax.routing import ROUTINGS
from capsnet_jax.runs.folder import Run, read_run

# All sizes differ, so that no transposed axis fits by chance; a primary scale of 1 gives capsules of visible length.
SMALL = ModelConfig(
    image_shape=(22, 24, 2),
    num_classes=5,
    stem_channels=7,
    stem_kernel=3,
    primary_groups=3,
    primary_dim=4,
    primary_kernel=5,
    primary_scale=1.0,
    class_dim=6,
    decoder_hidden=(11, 13),
)
SMALL_IMAGES, SMALL_CLASSES = SMALL.image_shape, SMALL.num_classes

# Options with which all that is in an algorithm matters: by default little variance makes the Gaussians of EM collapse
# onto few votes, and weights that are there on demand only are not there.
TELLING_OPTIONS = {
    "dynamic": "dynamic,leaky=true,prior_logits=0,capsule_bias=0.1",
    "em": "em,inverse_temperature=4,annealing=0.5,min_variance=0.4",
    "variational": "variational,psi0=1",
}


class Subject(NamedTuple):
    """A model to verify.

    Attributes:
        title: what it is called in tables.
        run: its sizes and losses.
        state: its weights, under the twin's names; None if they are to be drawn.
    """

    title: str
    run: Run
    state: StateDict | None = None


def of_preset(name: str) -> Subject:
    """A preset at full size, on images as it is for.

    Raises:
        UsageError: there is none of this name.
    """
    config = get_preset(name)
    return Subject(f"preset {name}", Run(Path(), config, tuple(map(str, range(config.model.num_classes)))))


def of_every_preset() -> list[Subject]:
    """Each preset at full size."""
    return [of_preset(name) for name in PRESETS]


def with_routing(subject: Subject, routing: str) -> Subject:
    """The same model, of the same weights if it has any, with another routing."""
    config = subject.run.config
    config = replace(config, model=replace(config.model, routing=routing))
    return subject._replace(title=f"{subject.title} with {routing}", run=subject.run._replace(config=config))


def of_routing(routing: str) -> Subject:
    """A small model with this routing."""
    # Activations of variational routing are differences of entropies, all but equal if no output wins.
    scale = 4.0 if routing.startswith("variational") else SMALL.primary_scale
    return of_model(f"routing {routing}", replace(SMALL, routing=routing, primary_scale=scale))


def of_every_routing() -> list[Subject]:
    """A small model for each registered routing, with options that make all of it matter."""
    return [of_routing("dynamic"), *(of_routing(TELLING_OPTIONS.get(name, name)) for name in ROUTINGS)]


def of_model(
    title: str,
    model: ModelConfig,
    image_shape: tuple[int, int, int] = SMALL_IMAGES,
    num_classes: int = SMALL_CLASSES,
    labels_per_image: int = 1,
) -> Subject:
    """A model of these sizes."""
    config = Config(model=model).with_sizes(image_shape, num_classes)
    return Subject(title, Run(Path(), config, tuple(map(str, range(num_classes))), labels_per_image))


def of_config(folder: Path) -> Subject:
    """The model of a run, of which only the config.json is read.

    Raises:
        UsageError: the folder is not that of a run.
    """
    return Subject(str(folder), read_run(folder))


def of_files(
    paths: Sequence[Path], preset: str | None = None, image_shape: tuple[int, int, int] | None = None
) -> Subject:
    """A run, or weights in one of the files that `read_state` reads.

    Args:
        paths: folder of the run, file of the weights, or those of encoder and decoder.
        preset: what weights without a config.json beside them do not tell, by default as in the reference model.
        image_shape: height, width and number of channels, for weights without a decoder and without a config.json.

    Raises:
        UsageError: they cannot be read, are not those of a model, or a config.json tells what is given.
    """
    state = read_state(paths)
    folder = paths[0] if paths[0].is_dir() else paths[0].parent
    title = " and ".join(map(str, paths))
    if (folder / CONFIG).exists():
        if preset is not None or image_shape is not None:
            raise UsageError(f"{folder / CONFIG} tells what model it is; expected neither --preset nor --image-shape.")
        return Subject(title, read_run(folder), state)
    preset = preset or "readable"
    title, config = f"{title} as preset {preset}", of_preset(preset).run.config
    model = infer_architecture(state, config.model, image_shape=image_shape)
    run = Run(folder, replace(config, model=model), tuple(map(str, range(model.num_classes))))
    return Subject(title, run, state)
