"""Routing algorithms, each a function of a batch of votes, and each the second formulation of the one in JAX."""

from collections.abc import Callable

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

__all__ = [
    "ROUTINGS",
    "dynamic",
    "em",
    "inverted_attention",
    "kmeans",
    "random",
    "self_attention",
    "self_routing",
    "uniform",
    "variational",
]

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
