"""Capsule networks in PyTorch: the same functions and names as `capsnet_jax`, formulated differently to check it."""

from capsnet_torch.capsules import Capsules as Capsules
from capsnet_torch.capsules import Routed as Routed
from capsnet_torch.model import CapsNet as CapsNet
