"""The command `capsnet check-routing`: test the properties that every routing must have."""

import importlib.util
from dataclasses import dataclass
from typing import Annotated

import tyro

from capsnet_jax.errors import UsageError
from capsnet_jax.routing.properties import IN_SIZE, INPUTS, OUT_SIZE, OUTPUTS, Check, check_routing, verdict


@dataclass(frozen=True)
class CheckRouting:
    """Test the properties that every routing must have: shapes, gradients, and so on.

    The exit status is 0 if all checks pass, and 1 if not.
    How to write a routing of your own: docs/routing.md."""

    routing: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ROUTING")]
    """Your own routing, as package.module:function, or a built-in one; options after commas."""
    torch: str | None = None
    """The same routing in PyTorch, as package.module:function, for votes [b i o h]; compared in float64."""
    num_iterations: int = 3
    """Number of routing iterations."""

    def run(self) -> int:
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
