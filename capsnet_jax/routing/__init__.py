"""Routing algorithms, each a pure function of one example, which layers map over the batch with `jax.vmap`.

A routing algorithm is a function `(votes [i o h], activations [i]) -> Routed(poses [o h], activations [o],
couplings [i o])`. `Routing` lists the keyword arguments that a layer passes. To add an algorithm to this package, write
its file and name it in `registry.py`; your own functions need no registration.
"""

from capsnet_jax.routing.arguments import learns
from capsnet_jax.routing.dynamic import dynamic
from capsnet_jax.routing.em import em
from capsnet_jax.routing.inverted_attention import inverted_attention
from capsnet_jax.routing.kmeans import kmeans
from capsnet_jax.routing.random import random
from capsnet_jax.routing.registry import ROUTINGS, Routing, get_routing
from capsnet_jax.routing.self_attention import self_attention
from capsnet_jax.routing.self_routing import self_routing
from capsnet_jax.routing.uniform import uniform
from capsnet_jax.routing.variational import variational

__all__ = [
    "ROUTINGS",
    "Routing",
    "dynamic",
    "em",
    "get_routing",
    "inverted_attention",
    "kmeans",
    "learns",
    "random",
    "self_attention",
    "self_routing",
    "uniform",
    "variational",
]
