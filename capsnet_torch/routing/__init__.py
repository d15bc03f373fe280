"""Routing algorithms, each a function of a batch of votes."""

from collections.abc import Callable

from capsnet_torch.capsules import Routed
from capsnet_torch.routing.dynamic import dynamic

__all__ = ["ROUTINGS", "dynamic"]

ROUTINGS: dict[str, Callable[..., Routed]] = {"dynamic": dynamic}
