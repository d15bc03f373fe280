"""The PyTorch twin of capsnet_jax: the same mathematics, written a second time."""

from capsnet_torch.capsules import Capsules as Capsules
from capsnet_torch.capsules import Routed as Routed
from capsnet_torch.model import CapsNet as CapsNet
