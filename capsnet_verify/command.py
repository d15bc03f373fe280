"""The command `capsnet verify`: whether JAX and PyTorch compute the same, and where they part if they do not."""

import dataclasses
import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from capsnet_jax.benchmark.results import origin
from capsnet_jax.errors import UsageError
from capsnet_jax.files import replace_file

if TYPE_CHECKING:  # PyTorch is needed to run, and not to tell how
    from capsnet_verify.subjects import Subject
    from capsnet_verify.verification import Verification


@dataclass(frozen=True)
class Verify:
    """Builds a model in JAX and in PyTorch on the same weights and inputs, and compares everything they compute.

    A row for each intermediate in forward order, the losses, the gradient of each weight and each training step. An
    error is a fraction of the largest value. Layers whose capsules are so short that routing does nothing are first
    scaled on both sides. Exit status: 0 if all agrees, 1 if something differs, 2 if not all could be compared. Without
    a model, a small one in which all sizes differ is verified."""

    model: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Folder of a run; a file of weights, .safetensors or .pt; or the two files of the reference model."""
    preset: str | None = None
    """Model of a preset at full size; or, of weights without a config.json, what they do not tell."""
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
    """Any PyTorch module, as package.module:build, a function without arguments, in place of the twin."""
    map: Path | None = None
    """Which weight of that module is which of ours, in TOML. Without it one is proposed and nothing is compared."""
    dtype: tuple[Literal["float64", "float32", "bfloat16"], ...] = ("float64",)
    """Precisions. In bfloat16 only the products of JAX are, and it is compared with PyTorch in float32."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Where both sides compute."""
    steps: int = 20
    """Number of training steps; no more than 5 are compared in float32, in which rounding errors soon grow."""
    batch_size: int = 3
    """Number of images."""
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
        for name, smallest in (("steps", 0), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < smallest:
                raise UsageError(f"{name} is {getattr(self, name)}, and must be at least {smallest}.")
        if self.json is not None and not self.json.absolute().parent.is_dir():
            raise UsageError(f"json is {self.json}, and the folder {self.json.parent} does not exist.")
        if importlib.util.find_spec("torch") is None:
            raise UsageError('capsnet verify needs PyTorch, which is not installed: pip install ".[torch]".')
        if self.self_test:
            from capsnet_verify.self_test import self_test

            return self_test()
        verifications = self._verify_all()
        return self._tell(verifications)

    def _verify_all(self) -> "list[Verification]":
        from capsnet_verify.verification import Settings, verify

        subjects = self._subjects()
        settings = Settings(device=self.device, steps=self.steps, batch_size=self.batch_size, seed=self.seed)
        settings = dataclasses.replace(settings, **self._of_torch())
        verifications = []
        for subject in subjects:
            for dtype in self.dtype:
                if len(subjects) * len(self.dtype) > 1:
                    print(f"{subject.title}, {dtype}", file=sys.stderr, flush=True)
                verifications.append(verify(subject, dataclasses.replace(settings, dtype=dtype)))
        return verifications

    def _tell(self, verifications: "list[Verification]") -> int:
        from capsnet_verify.report import describe, summarize, to_json

        print(describe(verifications[0]) if len(verifications) == 1 else summarize(verifications))
        if self.json is not None:
            device = "cpu" if self.device == "cpu" else _gpu()
            results = {"verifications": [to_json(verification) for verification in verifications]}
            text = json.dumps(origin(("jax", "torch-eager"), device) | results, indent=2)
            replace_file(self.json, f"{text}\n")
        statuses = {verification.status for verification in verifications}
        return 1 if 1 in statuses else max(statuses)

    def _subjects(self) -> "list[Subject]":
        """The models, refused if they contradict each other."""
        from capsnet_verify import subjects
        from capsnet_verify.random_models import random_subject

        routing = self.jax_routing or self.routing
        several = {"--all-presets": self.all_presets, "--all-routings": self.all_routings}
        single = {"a model": bool(self.model), "--random-model": self.random_model is not None}
        chosen = [name for name, is_chosen in (several | single).items() if is_chosen]
        if routing is not None:
            chosen += ["--routing"] if any(several.values()) else []
        if len(chosen) > 1 and not all(name in several for name in chosen):
            raise UsageError(f"{chosen[0]} and {chosen[1]} are given; expected one of them.")
        if self.jax_routing is not None and self.routing is not None:
            raise UsageError("--routing is that of both sides, and --jax-routing is given, too; expected one of them.")
        if (self.jax_routing is None) != (self.torch_routing is None):
            raise UsageError("Only one of --jax-routing and --torch-routing is given; expected both.")
        if self.torch_weights and not self.model:
            raise UsageError("--torch-weights are compared with those of a model; expected its folder or file, too.")
        found = subjects.of_every_preset() if self.all_presets else []
        found += subjects.of_every_routing() if self.all_routings else []
        if self.model:
            found = [subjects.of_files(self.model, self.preset or "readable")]
        elif self.random_model is not None:
            found = [random_subject(self.random_model)]
        elif self.preset is not None:
            found = [subjects.of_preset(self.preset), *found]
        elif not found:
            found = [subjects.of_routing(routing or "dynamic")]
        return [subjects.with_routing(subject, routing) for subject in found] if routing else found

    def _of_torch(self) -> dict[str, Any]:
        """What the PyTorch side has of its own."""
        from capsnet_jax.state_files import read_state
        from capsnet_verify.torch_routing import find_routing

        given: dict[str, Any] = {}
        if self.torch_routing is not None:
            given["torch_routing"] = find_routing(self.torch_routing)
        if self.torch_weights:
            given["torch_state"] = read_state(self.torch_weights)
        return given


def _gpu() -> str:
    import jax

    return str(jax.devices("gpu")[0].device_kind)
