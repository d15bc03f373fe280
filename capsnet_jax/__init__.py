"""Capsule networks with routing, in JAX and Flax."""

from capsnet_jax.capsules import Capsules as Capsules
from capsnet_jax.capsules import Routed as Routed
from capsnet_jax.errors import UsageError as UsageError
from capsnet_jax.nn.model import CapsNet as CapsNet
