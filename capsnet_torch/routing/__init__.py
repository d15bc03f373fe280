"""Routing algorithms, each a function of a batch of votes, formulated differently from those of `capsnet_jax`."""

from capsnet_torch.routing.arguments import learns as learns
from capsnet_torch.routing.dynamic import dynamic as dynamic
from capsnet_torch.routing.em import em as em
from capsnet_torch.routing.inverted_attention import inverted_attention as inverted_attention
from capsnet_torch.routing.kmeans import kmeans as kmeans
from capsnet_torch.routing.random import random as random
from capsnet_torch.routing.registry import ROUTINGS as ROUTINGS
from capsnet_torch.routing.registry import Routing as Routing
from capsnet_torch.routing.self_attention import self_attention as self_attention
from capsnet_torch.routing.self_routing import self_routing as self_routing
from capsnet_torch.routing.uniform import uniform as uniform
from capsnet_torch.routing.variational import variational as variational
