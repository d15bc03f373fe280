"""Models that can be verified, and settings: a preset, a run, a file of weights, or a small model."""

import difflib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from capsnet_jax.config import Config, ModelConfig
from capsnet_jax.errors import UsageError, in_words
from capsnet_jax.interchange.architecture import infer_architecture
from capsnet_jax.interchange.state_files import CONFIG, find_pretrained, read_state
from capsnet_jax.interchange.weights import StateDict
from capsnet_jax.presets import get_preset
from capsnet_jax.routing import ROUTINGS, get_routing
from capsnet_jax.runs.folder import Run, read_run
from capsnet_verify.checks import GRADIENTS, ON_GPU, VALUES

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
# Options with which every term of an algorithm matters. By default, EM's small variance makes its Gaussians collapse
# onto few votes, optional weights are left out, and the strong prior of variational routing makes activations small
# differences of large entropies, which float32 resolves to 4e-5 only.
EVERY_TERM = {
    "dynamic": "dynamic,leaky=true,prior_logits=0,capsule_bias=0.1",
    "em": "em,inverse_temperature=4,annealing=0.5,min_variance=0.4",
    "variational": "variational,psi0=1",
}


class Subject(NamedTuple):
    """A model to verify.

    Attributes:
        title: name of the model in tables.
        run: its sizes and losses.
        state: its weights, under the names of `capsnet_torch`; None for random ones.
    """

    title: str
    run: Run
    state: StateDict | None = None


@dataclass(frozen=True)
class Settings:
    """How a model is verified.

    Attributes:
        dtype: float64, float32 or bfloat16.
        device: cpu or gpu.
        steps: number of training steps.
        learning_rate: step size of Adam. A large one amplifies rounding errors: gradients of the reference model
            are as small as Adam's epsilon, so with 1e-3 its weights differ by 1e-9 after the first step.
        batch_size: number of images; by default several batches are compared, one for each implementation of a layer.
        seed: seed of weights and batches.
        torch_routing: routing of the PyTorch model, if another than the JAX model's.
        torch_state: weights of the PyTorch model, if others than the JAX model's.
        tolerances: tolerances of values and gradients by the name of their check, if others than usual.
        histograms: whether checks get histograms.
    """

    dtype: str = "float64"
    device: str = "cpu"
    steps: int = 20
    learning_rate: float = 1e-4
    batch_size: int | None = None
    seed: int = 0
    torch_routing: str | Callable[..., Any] | None = None
    torch_state: Mapping[str, Shaped[np.ndarray, "..."]] | None = None
    tolerances: Mapping[str, float] = field(default_factory=dict)
    histograms: bool = False

    def tolerance_of(self, name: str) -> float:
        """Return the tolerance of a value or gradient of this name."""
        of_gradients = GRADIENTS if name.startswith("gradient") else {}
        usual = VALUES | (ON_GPU if self.device == "gpu" else {}) | of_gradients
        return self.tolerances.get(name, usual[self.dtype])

    def check_names(self, names: Iterable[str]) -> None:
        """Raise a UsageError if there is a tolerance for something that is not among these values and gradients."""
        names = list(names)
        for name in self.tolerances:
            if name not in names:
                nearest = difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
                raise UsageError(
                    f"--tolerance is for {name!r}, which is no value or gradient here; the nearest is {nearest!r}."
                )


def of_model(title: str, model: ModelConfig, *, labels_per_image: int = 1) -> Subject:
    """Make a subject of a model config, with the default losses."""
    return Subject(title, Run(Path(), Config(model=model), _classes(model.num_classes), labels_per_image))


def of_preset(name: str) -> Subject:
    """Make a subject of a preset, at full size.

    Raises:
        UsageError: there is no such preset.
    """
    config = get_preset(name)
    return Subject(f"preset {name}", Run(Path(), config, _classes(config.model.num_classes)))


def of_routing(routing: str | Callable[..., Any]) -> Subject:
    """Make a subject of the small model with a routing, registered or of your own."""
    name = routing if isinstance(routing, str) else get_routing(routing).name
    # Activations of variational routing are differences of entropies, almost equal if no output dominates.
    scale = 4.0 if name.startswith("variational") else SMALL.primary_scale
    return of_model(f"routing {name}", replace(SMALL, routing=routing, primary_scale=scale))


def of_every_routing() -> list[Subject]:
    """Make a subject for each registered routing: the small model, with options with which every term matters."""
    return [of_routing("dynamic"), *(of_routing(EVERY_TERM.get(name, name)) for name in ROUTINGS)]


def with_routing(subject: Subject, routing: str) -> Subject:
    """Replace the routing of a subject; its weights, if any, stay."""
    config = subject.run.config
    config = replace(config, model=replace(config.model, routing=routing))
    return subject._replace(title=f"{subject.title} with {routing}", run=subject.run._replace(config=config))


def with_fields(subject: Subject, settings: Sequence[str]) -> Subject:
    """Replace fields of the config of a model.

    Args:
        subject: the model; its weights, if any, stay.
        settings: texts "name=value", with values as in JSON; quotes can be left out.

    Raises:
        UsageError: a text has no "=", there is no such field, or its value is wrong.
    """
    run, fields = subject.run, dict[str, Any]()
    known = vars(run.config.model)
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise UsageError(f"--set is {setting!r}; expected a field of the model and its value, as in num_classes=5.")
        try:
            fields[name] = json.loads(text)
        except (ValueError, RecursionError):
            fields[name] = text
        if isinstance(known.get(name), float) and type(fields[name]) is int:
            fields[name] = float(text)
    try:
        model = ModelConfig.of(**known | fields)
    except TypeError as error:
        raise UsageError(f"--set is {' '.join(settings)}: {in_words(error)}.") from error
    classes = run.class_names if model.num_classes == len(run.class_names) else _classes(model.num_classes)
    return subject._replace(run=run._replace(config=replace(run.config, model=model), class_names=classes))


def as_settings(fields: Mapping[str, Any]) -> str:
    """Format fields of a config as `with_fields` takes them."""
    return " ".join(
        f"{name}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}"
        for name, value in fields.items()
    )


def of_files(
    paths: Sequence[Path],
    preset: str | None = None,
    image_shape: tuple[int, int, int] | None = None,
    *,
    trust_code: bool = False,
) -> Subject:
    """Make a subject of a run, or of weights in files that `read_state` reads.

    Args:
        paths: the folder of a run, the name of a pretrained model, a file of weights, or the two files of encoder and
            decoder.
        preset: source of what weights without a config.json do not determine; by default the reference model.
        image_shape: height, width and number of channels, for weights without a decoder and without a config.json.
        trust_code: whether a routing of another package, named in a config.json, may be imported.

    Raises:
        UsageError: they cannot be read, are not the weights of a model, or an option contradicts a config.json.
    """
    state = read_state(paths)
    source = find_pretrained(paths[0])
    folder = source if source.is_dir() else source.parent
    title = " and ".join(map(str, paths))
    if (folder / CONFIG).exists():
        if preset is not None or image_shape is not None:
            raise UsageError(f"{folder / CONFIG} describes the model; expected neither --preset nor --image-shape.")
        return Subject(title, read_run(folder, trust_code=trust_code), state)
    preset = preset or "readable"
    config = get_preset(preset)
    model = infer_architecture(state, config.model, image_shape=image_shape)
    run = Run(folder, replace(config, model=model), _classes(model.num_classes))
    return Subject(f"{title} as preset {preset}", run, state)


def _classes(number: int) -> tuple[str, ...]:
    return tuple(map(str, range(number)))
