"""The command `capsnet check-routing`: the property suite on a routing, told in plain words."""

import importlib.util
from dataclasses import dataclass

import tyro

from capsnet_jax.errors import UsageError
from capsnet_jax.routing.properties import IN_SIZE, INPUTS, OUT_SIZE, OUTPUTS, Check, check_routing, verdict


@dataclass(frozen=True)
class CheckRouting:
    """Checks that a routing keeps the promises that all parts of this package rest on, and says what it breaks."""

    routing: tyro.conf.Positional[str]
    """Your own routing as package.module:function, or a registered name; options follow after commas."""
    torch: str | None = None
    """The same routing in PyTorch, as package.module:function, for a batch of votes [b i o h]; compared in float64."""
    num_iterations: int = 3
    """For routings that iterate."""

    def run(self) -> int:
        """Prints a line for each check and a verdict; returns 0 if all passed and 1 if not.

        Raises:
            UsageError: a function cannot be found or called or has no such option, or PyTorch is not installed.
        """
        extra: list[Check] = []
        if self.torch is not None:
            if importlib.util.find_spec("torch") is None:
                raise UsageError("--torch needs PyTorch, which is not installed: pip install 'capsnet-jax[torch]'.")
            from capsnet_verify.torch_routing import find_torch, torch_check

            extra.append(torch_check(find_torch(self.torch)))
        outcomes = check_routing(self.routing, num_iterations=self.num_iterations, extra_checks=extra)
        print(f"{self.routing}, from {INPUTS} capsules of pose size {IN_SIZE} to {OUTPUTS} of pose size {OUT_SIZE}:")
        for outcome in outcomes:
            print(f"{outcome.status:8} {outcome.name:17} {outcome.finding or outcome.promise}")
        print(verdict(self.routing, outcomes))
        return int(any(outcome.status != "ok" for outcome in outcomes))
