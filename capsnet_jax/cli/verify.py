"""The command `capsnet verify`: whether JAX and PyTorch compute the same, and where they part if they do not."""

import dataclasses
import importlib.util
import json
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from capsnet_jax.errors import UsageError
from capsnet_jax.files import replace_file

if TYPE_CHECKING:  # these need PyTorch, and the help does not
    import capsnet_verify.subjects
    import capsnet_verify.verification


@dataclass(frozen=True)
class Verify:
    """Builds a model in JAX and in PyTorch on the same weights and inputs, and compares everything they compute.

    A row for each intermediate in forward order, the losses, the gradient of each weight and each training step. An
    error is a fraction of the largest value. Layers whose capsules are so short that routing does nothing are first
    scaled on both sides. Every implementation that may be chosen for a layer is compared, at a batch at which it is.
    Exit status: 0 if all agrees, 1 if something differs, 2 if not all could be compared. Without a model, a small one
    in which all sizes differ is verified."""

    model: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Folder of a run; a file of weights, .safetensors or .pt; or the two files of the reference model."""
    preset: str | None = None
    """Model of a preset at full size; or, of weights without a config.json, what they do not tell."""
    image_shape: tuple[int, int, int] | None = None
    """Height, width and number of channels, for weights without a decoder and without a config.json."""
    all_presets: bool = False
    """Every preset."""
    routing: str | None = None
    """Routing of both sides, in the small model if there is no other; options follow after commas."""
    all_routings: bool = False
    """The small model with every registered routing."""
    random_model: int | None = None
    """The random architecture of this number."""
    jax_routing: str | None = None
    """Your routing as package.module:function, or a registered name; together with --torch-routing."""
    torch_routing: str | None = None
    """The same in PyTorch, of a batch of votes [b i o h], as package.module:function, or a registered name."""
    torch_weights: tuple[Path, ...] = ()
    """Weights of the PyTorch side, if they come from another file; they are compared one by one first."""
    torch_model: str | None = None
    """Any PyTorch module, as package.module:build, a function without arguments, in place of the twin; its values and
    gradients are compared, and no training steps."""
    map: Path | None = None
    """Which weight of that module is which of ours, in TOML. Without it one is proposed and nothing is compared."""
    dtype: tuple[Literal["float64", "float32", "bfloat16"], ...] = ("float64",)
    """Precisions. In bfloat16 only the products of JAX are, and it is compared with PyTorch in float32."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Where both sides compute."""
    steps: int = 20
    """Number of training steps; no more than 5 are compared in float32, in which rounding errors soon grow."""
    learning_rate: float = 1e-4
    """Of Adam, in these steps; with a large one rounding errors grow."""
    batch_size: int | None = None
    """Number of images. By default several are compared, of 3 and of as many as each implementation of a layer is
    chosen at, as in training; training steps are at the batch with the most of the fast ones."""
    seed: int = 0
    """Of weights and images."""
    json: Path | None = None
    """File that all checks are written to."""
    self_test: bool = False
    """Verify the checks themselves: each of some hundred wrong models must be caught by the check that should."""

    def run(self) -> int:
        """Prints the tables and a sentence; returns the exit status.

        Raises:
            UsageError: an option is wrong, PyTorch is not installed, or there is nothing that can be compared.
        """
        try:
            return self._run()
        except (UsageError, OSError):
            raise
        except Exception:  # status 1 would be a verdict, and there is none
            traceback.print_exc()
            return 2

    def _run(self) -> int:
        self._check()
        if self.self_test:
            from capsnet_verify.self_test import self_test

            return self_test()
        from capsnet_verify.report import describe, row, summarize

        subjects, settings = self._subjects(), self._settings()
        if self.torch_model is not None and self.map is None:
            return self._propose_map(subjects[0], settings)
        verifications: list[capsnet_verify.verification.Verification] = []
        for subject in subjects:
            for dtype in self.dtype:
                verifications.append(self._verify(subject, dataclasses.replace(settings, dtype=dtype)))
                self._write(verifications)
                if len(subjects) * len(self.dtype) > 1:
                    print(f"| {' | '.join(row(verifications[-1]))} |", file=sys.stderr, flush=True)
        print(describe(verifications[0]) if len(verifications) == 1 else summarize(verifications))
        statuses = {verification.status for verification in verifications}
        return 1 if 1 in statuses else max(statuses)

    def _check(self) -> None:
        """Make sure that the options fit each other and PyTorch is installed, before anything is imported or built."""
        if self.self_test and self != Verify(self_test=True):
            raise UsageError("--self-test takes no other options.")
        for name, smallest in (("steps", 0), ("batch_size", 1), ("seed", 0), ("random_model", 0)):
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise UsageError(f"{name} is {value}, and must be at least {smallest}.")
        if self.seed >= 2**32:
            raise UsageError(f"seed is {self.seed}, and must be less than {2**32}.")
        if not self.learning_rate > 0:
            raise UsageError(f"learning_rate is {self.learning_rate}, and must be more than 0.")
        if self.json is not None and not self.json.absolute().parent.is_dir():
            raise UsageError(f"json is {self.json}, and the folder {self.json.parent} does not exist.")
        if not self.dtype:
            raise UsageError("dtype is empty; expected float64, float32 or bfloat16.")
        self._check_models()
        if importlib.util.find_spec("torch") is None:
            raise UsageError('capsnet verify needs PyTorch, which is not installed: pip install ".[torch]".')

    def _check_models(self) -> None:
        """Refuse options that name models which contradict each other."""
        several = {"--all-presets": self.all_presets, "--all-routings": self.all_routings}
        single = {"a model": bool(self.model), "--random-model": self.random_model is not None}
        chosen = [name for name, is_chosen in (several | single).items() if is_chosen]
        if (self.jax_routing or self.routing) is not None and any(several.values()):
            chosen += ["--routing"]
        if self.preset is not None and self.random_model is not None:
            chosen += ["--preset"]
        if len(chosen) > 1 and not all(name in several for name in chosen):
            raise UsageError(f"{chosen[0]} and {chosen[1]} are given; expected one of them.")
        if self.jax_routing is not None and self.routing is not None:
            raise UsageError("--routing is that of both sides, and --jax-routing is given, too; expected one of them.")
        if (self.jax_routing is None) != (self.torch_routing is None):
            raise UsageError("Only one of --jax-routing and --torch-routing is given; expected both.")
        if self.map is not None and self.torch_model is None:
            raise UsageError("--map tells of the weights of --torch-model; expected that, too.")
        if self.torch_model is not None:
            if self.torch_weights:
                raise UsageError("--torch-model has weights of its own; expected no others.")
            if not (self.model or self.preset):
                raise UsageError("--torch-model is compared with a model of its sizes; expected a run, or --preset.")
            if any(several.values()):
                raise UsageError("--torch-model is compared with one model of ours; expected neither --all option.")
        if self.torch_weights and not self.model:
            raise UsageError("--torch-weights are compared with those of a model; expected its folder or file, too.")
        if self.image_shape is not None and not self.model:
            raise UsageError("--image-shape is that of weights; expected their file, too.")

    def _subjects(self) -> list["capsnet_verify.subjects.Subject"]:
        """The models to verify."""
        from capsnet_verify import subjects
        from capsnet_verify.random_models import random_subject

        routing = self.jax_routing or self.routing
        found = subjects.of_every_preset() if self.all_presets else []
        found += subjects.of_every_routing() if self.all_routings else []
        if self.torch_model is not None and self.model and self.model[0].is_dir():
            found = [subjects.of_config(self.model[0])]  # its weights would not be used
        elif self.model:
            found = [subjects.of_files(self.model, self.preset, self.image_shape)]
        elif self.random_model is not None:
            found = [random_subject(self.random_model)]
        elif self.preset is not None:
            found = [subjects.of_preset(self.preset), *found]
        elif not found:
            return [subjects.of_routing(routing or "dynamic")]
        return [subjects.with_routing(subject, routing) for subject in found] if routing else found

    def _settings(self) -> "capsnet_verify.verification.Settings":
        """How they are verified, but for the dtype, and what the PyTorch side has of its own."""
        from capsnet_jax.interchange.state_files import read_state
        from capsnet_verify.torch_routing import find_routing
        from capsnet_verify.verification import Settings

        return Settings(
            device=self.device,
            steps=self.steps,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            seed=self.seed,
            torch_routing=None if self.torch_routing is None else find_routing(self.torch_routing),
            torch_state=read_state(self.torch_weights) if self.torch_weights else None,
        )

    def _verify(
        self, subject: "capsnet_verify.subjects.Subject", settings: "capsnet_verify.verification.Settings"
    ) -> "capsnet_verify.verification.Verification":
        from capsnet_verify.foreign import verify_module
        from capsnet_verify.torch_module import load_module
        from capsnet_verify.verification import verify
        from capsnet_verify.weight_map import read_map

        if self.torch_model is None or self.map is None:
            return verify(subject, settings)
        return verify_module(load_module(self.torch_model), read_map(self.map), subject, settings)

    def _propose_map(
        self, subject: "capsnet_verify.subjects.Subject", settings: "capsnet_verify.verification.Settings"
    ) -> int:
        """Print a map to be looked through; nothing is compared, which is exit status 2."""
        from capsnet_verify.foreign import propose
        from capsnet_verify.torch_module import load_module

        print(propose(load_module(str(self.torch_model)), subject, settings))
        print("capsnet: There is no --map, so nothing was compared; the one above is a proposal.", file=sys.stderr)
        return 2

    def _write(self, verifications: list["capsnet_verify.verification.Verification"]) -> None:
        """Write what there is so far, in place of what the file had before."""
        from capsnet_benchmark.results import origin
        from capsnet_verify.report import to_json

        if self.json is not None:
            device = "cpu" if self.device == "cpu" else _gpu()
            options = {name: value for name, value in vars(self).items() if value != getattr(Verify(), name)}
            results = {
                "options": json.loads(json.dumps(options, default=str)),
                "verifications": [to_json(verification) for verification in verifications],
            }
            text = json.dumps(origin(("jax", "torch-eager"), device) | results, indent=2)
            replace_file(self.json, f"{text}\n")


def _gpu() -> str:
    import jax

    return str(jax.devices("gpu")[0].device_kind)
