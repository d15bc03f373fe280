"""Routings by name, with options bound and learned weights; see `capsnet_jax.routing.registry`."""

import inspect
import json
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

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

FUNCTIONS = (dynamic, em, variational, self_attention, inverted_attention, self_routing, kmeans, uniform, random)
ROUTINGS: dict[str, Callable[..., Routed]] = {function.__name__: function for function in FUNCTIONS}


class Routing:
    """A routing with its options bound, as layers call it for a batch; made from "name,option=value" or a function."""

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

    def __call__(self, votes: Tensor, activations: Tensor, **given: Any) -> Routed:
        given = {name: value for name, value in given.items() if name in self.parameters}
        return self.function(votes, activations, **(self.options | given))

    @cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(self.function).parameters)

    def new_weights(self, **sizes: int) -> nn.ParameterDict:
        """Create the learned weights, each filled with its initial value; `sizes` are the sizes of the axes."""
        function = self.function.func if isinstance(self.function, partial) else self.function
        weights = nn.ParameterDict()
        for name, axes in getattr(function, "learned_axes", {}).items():
            initial = self.options.get(name, self.parameters[name].default)
            if initial is not None:
                weights[name] = nn.Parameter(torch.full([sizes[axis] for axis in axes], float(initial)))
        return weights
