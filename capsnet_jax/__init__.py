"""Capsule networks with routing, in JAX and Flax (NNX).

A capsule is a vector. Its direction is the pose of an object or part; its length says how likely the object is present.
Each capsule of a layer votes for the pose of every capsule of the next layer, and a routing algorithm weighs the votes.
`CapsNet` is such a network; its defaults are the model of 8.2 million weights for MNIST.

Examples:
    >>> import jax
    >>> from flax import nnx
    >>> import capsnet_jax
    >>> model = capsnet_jax.CapsNet(image_shape=(28, 28, 1), num_classes=10, rngs=nnx.Rngs(0))
    >>> images = jax.random.uniform(jax.random.key(0), (4, 28, 28, 1))  # pixels in [0, 1]
    >>> poses, activations, reconstructions = model(images)
    >>> poses.shape, activations.shape, reconstructions.shape
    ((4, 10, 16), (4, 10), (4, 28, 28, 1))
    >>> model.route(images)[-1].couplings.shape  # share of each of 1152 primary capsules for each class
    (4, 1152, 10)
    >>> sorted(capsnet_jax.PRESETS)
    ['digits', 'efficient', 'em', 'official', 'paper', 'readable']
    >>> capsnet_jax.PRESETS["efficient"].model.routing
    'self_attention'
    >>> sorted(capsnet_jax.ROUTINGS)[:4]
    ['dynamic', 'em', 'inverted_attention', 'kmeans']
    >>> sorted(capsnet_jax.PRETRAINED)
    ['mnist-dynamic', 'mnist-efficient']

Build a model:

- `CapsNet`: the network, a Flax module; its keywords are the fields of `ModelConfig`.
- `PRESETS`: published networks by name, each with the options that it is trained with.
- `Stem`, `PrimaryCapsules`, `CapsuleLayer`, `ConvCapsules`, `Decoder`: the layers, for models of your own.
- `ROUTINGS`: the routing algorithms by name. Wherever a name is expected, you can pass a function of your own.
- `Capsules`, `Routed`, `Output`: what layers, routings and models return.

Train and use it:

- `load_dataset`, `fit` with a `TrainingConfig`, `evaluate` and `predict`; `load` reads a trained model from its folder.
- `PRETRAINED`: folders of the trained models that ship with the package, by the name that `load` and all commands take.
- `start_from`: weights of a trained model where they fit, to train them further on other classes or images.
- `margin_loss`, `spread_loss`, `reconstruction_loss`: for a training loop of your own.
- `from_torch`, `to_torch`: weights from and to the PyTorch model.
- `UsageError`: the exception for wrong arguments, files and data; its message says what is expected.

The command `capsnet` trains, evaluates, compares and verifies from a shell.
"""

from capsnet_jax.capsules import Capsules, Routed
from capsnet_jax.config import ModelConfig, TrainingConfig
from capsnet_jax.data import Dataset, load_dataset
from capsnet_jax.errors import UsageError
from capsnet_jax.interchange.state_files import PRETRAINED, start_from
from capsnet_jax.interchange.weights import from_torch, to_torch
from capsnet_jax.nn.conv_capsules import ConvCapsules
from capsnet_jax.nn.layers import CapsuleLayer, Decoder, PrimaryCapsules, Stem
from capsnet_jax.nn.losses import margin_loss, reconstruction_loss, spread_loss
from capsnet_jax.nn.model import CapsNet, Output
from capsnet_jax.presets import PRESETS
from capsnet_jax.routing import ROUTINGS
from capsnet_jax.runs.folder import load
from capsnet_jax.train.evaluation import evaluate, predict
from capsnet_jax.train.loop import fit

__all__ = [
    "PRESETS",
    "PRETRAINED",
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
    "predict",
    "reconstruction_loss",
    "spread_loss",
    "start_from",
    "to_torch",
]

__version__ = "0.2.0.dev0"
