"""Every routing, and convolutional capsules in three layers, learn real handwritten digits."""

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
    """On all test images after the last epoch, which need not be the best one."""
    dataset = load_digits()
    sizes = {"image_shape": dataset.image_shape, "num_classes": dataset.num_classes}
    model = CapsNet.from_config(dataclasses.replace(config, **sizes), rngs=nnx.Rngs(0))
    *_, last = fit(model, dataset, dataclasses.replace(DIGITS.training, epochs=epochs), augment=("shift=0.1",))
    return last.test_accuracy


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_routing_learns_digits(routing):
    assert last_accuracy(dataclasses.replace(DIGITS.model, routing=routing), epochs=7) >= 0.9


def test_three_layers_of_capsules_two_of_them_convolutional_learn_digits():
    layers = ((8, 8, 3, 1), (8, 8, 3, 1))
    assert last_accuracy(dataclasses.replace(DIGITS.model, primary_kernel=2, conv_capsules=layers), epochs=6) >= 0.95
