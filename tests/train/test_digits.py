"""Every routing algorithm, and a network with two layers of convolutional capsules, learn handwritten digits."""

import dataclasses

import pytest
from flax import nnx

from capsnet_jax import CapsNet
from capsnet_jax.config import ModelConfig
from capsnet_jax.data import load_digits
from capsnet_jax.presets import PRESETS
from capsnet_jax.routing import ROUTINGS
from capsnet_jax.train.loop import fit

DIGITS = PRESETS["digits"]
pytestmark = pytest.mark.slow


def last_accuracy(config: ModelConfig, epochs: int) -> float:
    """Accuracy on all test images after the last epoch."""
    dataset = load_digits()
    sizes = {"image_shape": dataset.image_shape, "num_classes": dataset.num_classes}
    model = CapsNet.from_config(dataclasses.replace(config, **sizes), rngs=nnx.Rngs(0))
    *_, last = fit(model, dataset, dataclasses.replace(DIGITS.training, epochs=epochs), augment=("shift=0.1",))
    return last.test_accuracy


@pytest.mark.parametrize(
    "routing", [pytest.param(name, marks=() if name == "dynamic" else pytest.mark.exhaustive) for name in ROUTINGS]
)
def test_every_routing_learns_digits(routing):
    epochs = 3 if routing == "dynamic" else 7
    assert last_accuracy(dataclasses.replace(DIGITS.model, routing=routing), epochs) >= 0.9


@pytest.mark.exhaustive
def test_two_layers_of_convolutional_capsules_learn_digits():
    layers = ((8, 8, 3, 1), (8, 8, 3, 1))
    assert last_accuracy(dataclasses.replace(DIGITS.model, primary_kernel=2, conv_capsules=layers), epochs=6) >= 0.95
