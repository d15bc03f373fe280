"""The PyTorch twin of `capsnet_jax`: the same functions and names, with the mathematics formulated differently."""

from capsnet_torch.capsules import Capsules as Capsules
from capsnet_torch.capsules import Routed as Routed
from capsnet_torch.model import CapsNet as CapsNet
