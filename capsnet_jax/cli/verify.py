"""The command `capsnet verify`: compare JAX with PyTorch, and name the first value that differs."""

import dataclasses
import importlib.util
import itertools
import json
import math
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from capsnet_jax.errors import UsageError
from capsnet_jax.files import replace_file

if TYPE_CHECKING:  # importing these takes PyTorch, which the help can do without
    import capsnet_verify.subjects
    import capsnet_verify.verification


@dataclass(frozen=True)
class Verify:
    """Compare everything that a model computes in JAX and in PyTorch, on the same weights and inputs.

    Prints a row for each intermediate value in forward order, the losses, the gradient of each weight and each
    training step. Errors are fractions of the largest value. Layers whose capsules are so short that routing has no
    effect are first scaled in both models. After the first difference, each layer is fed PyTorch's values of the
    layers below, which tells wrong layers from those that inherit an error. Every implementation that may be chosen
    for a layer is compared, each at a batch size at which it is chosen. Exit status: 0 if everything agrees, 1 if
    something differs, 2 if not everything could be compared. By default, a small model is verified whose sizes all
    differ."""

    model: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Folder of a run; name of a pretrained model; a file of weights, .safetensors or .pt; or the two files of the
    reference model."""
    preset: str | None = None
    """Preset to verify at full size; for a file of weights without a config.json, the preset of its model."""
    image_shape: tuple[int, int, int] | None = None
    """Height, width and number of channels of the images, if others than those of the preset. Weights without a decoder
    and without a config.json need it."""
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """Other fields of the model, under their names in a config.json, such as num_classes=5 primary_squash=squash
    decoder_bias=true."""
    all_presets: bool = False
    """Verify every preset."""
    routing: Annotated[str | None, tyro.conf.arg(aliases=["--jax-routing"])] = None
    """Routing of the model: a registered name with options after commas, or your own as package.module:function."""
    torch_routing: str | None = None
    """Routing of the PyTorch model, if it is not registered under the same name: a function of a batch of votes
    [b i o h], as package.module:function, or a registered name."""
    all_routings: bool = False
    """Verify the small model with every registered routing."""
    random_model: int | None = None
    """Verify a random architecture, drawn from this seed."""
    torch_weights: tuple[Path, ...] = ()
    """Weights of the PyTorch model, if they are in another file; they are first compared one by one."""
    torch_model: str | None = None
    """PyTorch module of your own to compare with, as package.module:build, a function without arguments. Values and
    gradients are compared, training steps are not."""
    map: Path | None = None
    """TOML file that maps the weights of --torch-model to those of CapsNet. Without it, a map is proposed and nothing
    is compared."""
    dtype: tuple[Literal["float64", "float32", "bfloat16"], ...] = ("float64",)
    """Precisions. With bfloat16, matrix products in JAX are bfloat16, and PyTorch computes in float32."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Device of both frameworks."""
    steps: int = 20
    """Number of training steps; in float32 at most 5 are compared, because rounding errors grow."""
    learning_rate: float = 1e-4
    """Learning rate of Adam in the training steps; a large one amplifies rounding errors."""
    batch_size: int | None = None
    """Number of images. By default, batches of several sizes are compared, so that every implementation is used;
    training steps use the batch with the most fast implementations."""
    seed: int = 0
    """Seed of weights and images."""
    trust_code: bool = False
    """Import the routing that a run names, if it is not of this package. That runs code."""
    tolerance: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=X")] = ()
    """Other tolerances of values or gradients, by the names of their checks, such as "poses 0=1e-9"."""
    json: Path | None = None
    """File to write all checks to."""
    html: Path | None = None
    """File to write all checks to as a page, with a histogram of each value in both frameworks."""
    self_test: bool = False
    """Test the checks themselves: plant about a hundred mistakes, one at a time, which the right check must catch."""

    def run(self) -> int:
        """Print the tables and a sentence; returns the exit status.

        Raises:
            UsageError: an option is wrong, PyTorch is not installed, or nothing can be compared.
        """
        try:
            return self._run()
        except (UsageError, OSError):
            raise
        except (Exception, SystemExit):  # the user's code may end with 0 or 1, which would be a verdict
            traceback.print_exc()
            return 2

    def _run(self) -> int:
        self._check()
        if self.self_test:
            from capsnet_verify.self_test import self_test

            return self_test()
        from capsnet_jax.interchange.state_files import read_state
        from capsnet_verify.foreign import propose, verify_module
        from capsnet_verify.foreign_module import load_module
        from capsnet_verify.report import describe, row, summarize
        from capsnet_verify.subjects import Settings
        from capsnet_verify.torch_routing import find_routing
        from capsnet_verify.verification import verify
        from capsnet_verify.weight_map import read_map

        subjects = self._subjects()
        settings = Settings(
            device=self.device,
            steps=self.steps,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            seed=self.seed,
            torch_routing=None if self.torch_routing is None else find_routing(self.torch_routing),
            torch_state=read_state(self.torch_weights) if self.torch_weights else None,
            tolerances=dict(map(_tolerance, self.tolerance)),
            histograms=self.html is not None,
        )
        if self.torch_model is not None and self.map is None:
            print(propose(load_module(self.torch_model), subjects[0], settings))
            print("capsnet: There is no --map, so nothing was compared; the one above is a proposal.", file=sys.stderr)
            return 2
        verifications: list[capsnet_verify.verification.Verification] = []
        for subject, dtype in itertools.product(subjects, self.dtype):
            options = dataclasses.replace(settings, dtype=dtype)
            if self.torch_model is None or self.map is None:
                verifications.append(verify(subject, options))
            else:
                module, weight_map = load_module(self.torch_model), read_map(self.map)
                verifications.append(verify_module(module, weight_map, subject, options))
            self._write(verifications)
            if len(subjects) * len(self.dtype) > 1:
                print(f"| {' | '.join(row(verifications[-1]))} |", file=sys.stderr, flush=True)
        print(describe(verifications[0]) if len(verifications) == 1 else summarize(verifications))
        statuses = {verification.status for verification in verifications}
        return 1 if 1 in statuses else max(statuses)

    def _check(self) -> None:
        """Refuse wrong values, options that contradict each other, and a missing PyTorch, before anything is built."""
        given = self._given()

        def named(option: str) -> str:
            return "a model" if option == "model" else f"--{option.replace('_', '-')}"

        if self.self_test and len(given) > 1:
            raise UsageError("--self-test takes no other options.")
        for name, smallest in (("steps", 0), ("batch_size", 1), ("seed", 0), ("random_model", 0)):
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise UsageError(f"{name} is {value}, and must be at least {smallest}.")
        if self.seed >= 2**32:
            raise UsageError(f"seed is {self.seed}, and must be less than {2**32}.")
        if not 0 < self.learning_rate < math.inf:
            raise UsageError(f"learning_rate is {self.learning_rate}, and must be a positive number.")
        if not self.dtype:
            raise UsageError("dtype is empty; expected float64, float32 or bfloat16.")
        for name, path in (("json", self.json), ("html", self.html)):
            if path is not None and not path.absolute().parent.is_dir():
                raise UsageError(f"{name} is {path}, and the folder {path.parent} does not exist.")
        for one, *others in (
            ("all_presets", "model", "random_model", "routing", "torch_model"),
            ("all_routings", "model", "random_model", "routing", "torch_model"),
            ("random_model", "model", "preset"),
            ("torch_model", "torch_weights"),
        ):
            for other in others:
                if one in given and other in given:
                    raise UsageError(f"{named(one)} and {named(other)} are given; expected one of them.")
        for one, *needed in (
            ("torch_routing", "routing"),
            ("map", "torch_model"),
            ("torch_weights", "model"),
            ("torch_model", "model", "preset"),
        ):
            if one in given and not given.keys() & needed:
                raise UsageError(f"{named(one)} is given without {' or '.join(map(named, needed))}; expected both.")
        if importlib.util.find_spec("torch") is None:
            raise UsageError('capsnet verify needs PyTorch, which is not installed: pip install ".[torch]".')

    def _given(self) -> dict[str, Any]:
        """Return the options that do not have their default."""
        return {name: value for name, value in vars(self).items() if value != getattr(Verify(), name)}

    def _subjects(self) -> list["capsnet_verify.subjects.Subject"]:
        """Return the models to verify."""
        from capsnet_jax.interchange.state_files import find_pretrained
        from capsnet_jax.presets import PRESETS
        from capsnet_jax.runs.folder import read_run
        from capsnet_verify import subjects
        from capsnet_verify.random_models import random_subject

        routing = self.routing
        found = [subjects.of_preset(name) for name in PRESETS] if self.all_presets else []
        found += subjects.of_every_routing() if self.all_routings else []
        if self.torch_model is not None and self.model and find_pretrained(self.model[0]).is_dir():
            # Weights of the run, if there are any, would not be used.
            found = [subjects.Subject(str(self.model[0]), read_run(self.model[0], trust_code=self.trust_code))]
        elif self.model:
            found = [subjects.of_files(self.model, self.preset, self.image_shape, trust_code=self.trust_code)]
        elif self.random_model is not None:
            found = [random_subject(self.random_model)]
        elif self.preset is not None:
            found = [subjects.of_preset(self.preset), *found]
        elif not found:
            found, routing = [subjects.of_routing(routing or "dynamic")], None
        if routing is not None:
            found = [subjects.with_routing(subject, routing) for subject in found]
        fields = [f"image_shape={[*self.image_shape]}"] if self.image_shape else []
        return [subjects.with_fields(subject, [*fields, *self.set]) for subject in found]

    def _write(self, verifications: list["capsnet_verify.verification.Verification"]) -> None:
        """Replace the files of --html and --json by the results so far."""
        if self.html is not None:
            from capsnet_verify.page import to_html

            replace_file(self.html, to_html(verifications))
        if self.json is None:
            return
        from capsnet_benchmark.results import origin
        from capsnet_verify.report import to_json

        device = "cpu"
        if self.device == "gpu":
            import jax

            device = str(jax.devices("gpu")[0].device_kind)
        results = {
            "options": json.loads(json.dumps(self._given(), default=str)),
            "verifications": [to_json(verification) for verification in verifications],
        }
        text = json.dumps(origin(("jax", "torch-eager"), device) | results, indent=2)
        replace_file(self.json, f"{text}\n")


def _tolerance(text: str) -> tuple[str, float]:
    """Split "name=x"."""
    name, _, number = text.rpartition("=")
    try:
        tolerance = float(number)
    except ValueError:
        tolerance = math.nan
    if not (name and 0 <= tolerance < math.inf):
        raise UsageError(f"--tolerance is {text!r}; expected the name of a check and a number, as in 'poses 0=1e-9'.")
    return name, tolerance
