"""Initial weights in JAX and PyTorch have the distributions of the reference model."""

import numpy as np
import pytest
from flax import nnx

import capsnet_jax
import capsnet_torch
from capsnet_jax.interchange.weights import to_torch

# Bounds of the uniform distributions of the full-size model: 1 / sqrt(fan_in), and sqrt(3 / fan_in) of einsums.
BOUNDS = {
    "encoder.image2primary_capsules.0.weight": (1 * 81) ** -0.5,
    "encoder.image2primary_capsules.0.bias": (1 * 81) ** -0.5,
    "encoder.image2primary_capsules.2.weight": (256 * 81) ** -0.5,
    "encoder.image2primary_capsules.2.bias": (256 * 81) ** -0.5,
    "encoder.primary2digit_capsules.input_caps2U.weight": (3 / 8) ** 0.5,
    "decoder.0.weight": (3 / 160) ** 0.5,
    "decoder.2.weight": 512**-0.5,
    "decoder.2.bias": 512**-0.5,
    "decoder.4.weight": (3 / 1024) ** 0.5,
}


@pytest.fixture(scope="module")
def states() -> list[dict[str, np.ndarray]]:
    in_torch = {name: tensor.numpy() for name, tensor in capsnet_torch.CapsNet().state_dict().items()}
    return [to_torch(capsnet_jax.CapsNet(rngs=nnx.Rngs(0))), in_torch]


def test_the_reference_model_has_8_2_million_weights(states):
    for state in states:
        assert sum(array.size for array in state.values()) == 8_214_272


@pytest.mark.parametrize("side", [0, 1], ids=["jax", "torch"])
@pytest.mark.parametrize("name", BOUNDS)
def test_weights_are_uniform_in_the_bounds(name, side, states):
    values, bound = states[side][name].ravel().astype(np.float64), BOUNDS[name]
    deviation = bound / 3**0.5
    # Five standard errors for this size; for the largest of n values, 20 times its mean distance to the bound.
    assert np.abs(values).max() <= bound * (1 + 1e-6)
    assert np.abs(values).max() >= bound * (1 - 20 / values.size)
    assert abs(values.mean()) <= 5 * deviation / values.size**0.5
    assert abs(values.std() / deviation - 1) <= 5 * 0.45 / values.size**0.5


def test_no_two_weights_are_drawn_alike(states):
    """Tensors drawn with the same key would begin alike."""
    beginnings = [tuple(np.round(array.ravel()[:5] / np.abs(array).max(), 4)) for array in states[0].values()]
    assert len(set(beginnings)) == len(beginnings)
