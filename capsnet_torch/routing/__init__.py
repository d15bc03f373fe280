"""Routing algorithms, each a function of a batch of votes, and each the second formulation of the one in JAX."""

from capsnet_torch.routing.arguments import learns
from capsnet_torch.routing.dynamic import dynamic
from capsnet_torch.routing.em import em
from capsnet_torch.routing.inverted_attention import inverted_attention
from capsnet_torch.routing.kmeans import kmeans
from capsnet_torch.routing.random import random
from capsnet_torch.routing.registry import ROUTINGS, Routing
from capsnet_torch.routing.self_attention import self_attention
from capsnet_torch.routing.self_routing import self_routing
from capsnet_torch.routing.uniform import uniform
from capsnet_torch.routing.variational import variational

__all__ = [
    "ROUTINGS",
    "Routing",
    "dynamic",
    "em",
    "inverted_attention",
    "kmeans",
    "learns",
    "random",
    "self_attention",
    "self_routing",
    "uniform",
    "variational",
]
