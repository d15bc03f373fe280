"""From the name of a routing to what a layer calls, with the options and weights that its arguments say it has."""

import inspect
import json
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from capsnet_torch.capsules import Routed
from capsnet_torch.routing.dynamic import dynamic
from capsnet_torch.routing.em import em
from capsnet_torch.routing.inverted_attention import inverted_attention
from capsnet_torch.routing.kmeans import kmeans
from capsnet_torch.routing.random import random
from capsnet_torch.routing.self_attention import self_attention
from capsnet_torch.routing.self_routing import self_routing
from capsnet_torch.routing.uniform import uniform
from capsnet_torch.routing.variational import variational

ROUTINGS: dict[str, Callable[..., Routed]] = {
    "dynamic": dynamic,
    "em": em,
    "variational": variational,
    "self_attention": self_attention,
    "inverted_attention": inverted_attention,
    "self_routing": self_routing,
    "kmeans": kmeans,
    "uniform": uniform,
    "random": random,
}


class Routing:
    """A routing of a batch, as "name,option=value" or a function; see `capsnet_jax.routing.registry.Routing`."""

    def __init__(self, routing: str | Callable[..., Routed], *, num_iterations: int):
        settings: list[str] = []
        if isinstance(routing, str):
            name, *settings = routing.split(",")
            routing = ROUTINGS[name]
        self.function = routing
        self.options: dict[str, Any] = {}
        bound = routing.keywords if isinstance(routing, partial) else {}
        if "num_iterations" in self.parameters and "num_iterations" not in bound:
            self.options["num_iterations"] = num_iterations
        for option, _, text in (setting.partition("=") for setting in settings):
            value = json.loads(text.lower())  # true, false or a number
            self.options[option] = float(value) if isinstance(self.parameters[option].default, float) else value

    def __call__(self, votes: torch.Tensor, activations: torch.Tensor, **given: Any) -> Routed:
        given = {name: value for name, value in given.items() if name in self.parameters}
        return self.function(votes, activations, **(self.options | given))

    @cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(self.function).parameters)

    def new_weights(self, **sizes: int) -> nn.ParameterDict:
        """The weights that the routing learns, each full of the constant that it starts from."""
        function = self.function.func if isinstance(self.function, partial) else self.function
        weights = nn.ParameterDict()
        for name, axes in getattr(function, "learned_axes", {}).items():
            initial = self.options.get(name, self.parameters[name].default)
            if initial is not None:
                weights[name] = nn.Parameter(torch.full([sizes[axis] for axis in axes], float(initial)))
        return weights
