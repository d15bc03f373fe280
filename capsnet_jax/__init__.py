"""Capsule networks with routing, in JAX and Flax (NNX).

A capsule is a vector: its direction is the pose of what it stands for, its length how present that is. Capsules of
one layer vote for those of the next, and a routing algorithm decides which votes count. `CapsNet` is such a network;
its defaults are the dynamic-routing network of 8.2 million weights on MNIST.

>>> import jax
>>> from flax import nnx
>>> from capsnet_jax import CapsNet
>>> model = CapsNet(image_shape=(28, 28, 1), num_classes=10, rngs=nnx.Rngs(0))
>>> images = jax.random.uniform(jax.random.key(0), (4, 28, 28, 1))  # pixels in [0, 1]
>>> poses, activations, reconstructions = model(images)
>>> poses.shape, activations.shape, reconstructions.shape
((4, 10, 16), (4, 10), (4, 28, 28, 1))
>>> model.route(images)[-1].couplings.shape  # what each of 1152 primary capsules sends to each class
(4, 1152, 10)

Where to look next:

- `CapsNet.from_preset(name)` with a name in `PRESETS`, or any `ModelConfig`, for other networks;
- `ROUTINGS`, and `capsnet_jax.routing` for routing algorithms, your own among them;
- `load_dataset`, `fit` with a `TrainingConfig`, and `evaluate` to train; `load` for a trained model;
- `from_torch` and `to_torch` for weights of the PyTorch model.

The command `capsnet` does all of this from a shell.
"""

from capsnet_jax.capsules import Capsules, Routed
from capsnet_jax.config import ModelConfig, TrainingConfig
from capsnet_jax.data import Dataset, load_dataset
from capsnet_jax.errors import UsageError
from capsnet_jax.interchange.weights import from_torch, to_torch
from capsnet_jax.nn.conv_capsules import ConvCapsules
from capsnet_jax.nn.layers import CapsuleLayer, Decoder, PrimaryCapsules, Stem
from capsnet_jax.nn.losses import margin_loss, reconstruction_loss, spread_loss
from capsnet_jax.nn.model import CapsNet, Output
from capsnet_jax.presets import PRESETS
from capsnet_jax.routing import ROUTINGS
from capsnet_jax.runs.folder import load
from capsnet_jax.train.evaluation import evaluate
from capsnet_jax.train.loop import fit

__all__ = [
    "PRESETS",
    "ROUTINGS",
    "CapsNet",
    "CapsuleLayer",
    "Capsules",
    "ConvCapsules",
    "Dataset",
    "Decoder",
    "ModelConfig",
    "Output",
    "PrimaryCapsules",
    "Routed",
    "Stem",
    "TrainingConfig",
    "UsageError",
    "evaluate",
    "fit",
    "from_torch",
    "load",
    "load_dataset",
    "margin_loss",
    "reconstruction_loss",
    "spread_loss",
    "to_torch",
]

__version__ = "0.2.0.dev0"
