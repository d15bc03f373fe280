"""Weights are converted from PyTorch to JAX and back without changing a bit."""

import numpy as np
import pytest
import safetensors.torch
import torch
from flax import nnx

import capsnet_jax
import capsnet_torch
from capsnet_jax.interchange.weights import from_torch, load_weights, save_weights, to_torch
from capsnet_torch.model import ONLY_IN_JAX
from capsnet_verify.subjects import SMALL
from parity_tests.pairs import make_pair

SIZES = {name: value for name, value in vars(SMALL).items() if name not in ONLY_IN_JAX}
# Shapes in the two state_dicts of the reference model on MNIST.
REFERENCE_ENCODER = {
    "image2primary_capsules.0.weight": (256, 1, 9, 9),
    "image2primary_capsules.0.bias": (256,),
    "image2primary_capsules.2.weight": (256, 256, 9, 9),
    "image2primary_capsules.2.bias": (256,),
    "primary2digit_capsules.input_caps2U.weight": (1152, 8, 10, 16),
}
REFERENCE_DECODER = {
    "0.weight": (10, 16, 512),
    "2.weight": (1024, 512),
    "2.bias": (1024,),
    "4.weight": (1024, 1, 28, 28),
}


def test_the_reference_models_state_dicts_load_unchanged():
    model = capsnet_torch.CapsNet()
    for module, shapes in ((model.encoder, REFERENCE_ENCODER), (model.decoder, REFERENCE_DECODER)):
        state = {name: torch.rand(shape) for name, shape in shapes.items()}
        module.load_state_dict(state, strict=True)
        assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("hidden_capsules", [(), ((8, 9), (7, 5))], ids=["one layer", "three layers"])
def test_torch_to_jax_and_back_is_bit_exact(hidden_capsules):
    options = SIZES | {"hidden_capsules": hidden_capsules}
    torch.manual_seed(0)
    state = {name: tensor.numpy() for name, tensor in capsnet_torch.CapsNet(**options).state_dict().items()}
    model = capsnet_jax.CapsNet(**options, rngs=nnx.Rngs(0))
    assert not np.array_equal(to_torch(model)["decoder.0.weight"], state["decoder.0.weight"])
    from_torch(model, state)
    back = to_torch(model)
    assert list(back) == list(state)
    for name in state:
        np.testing.assert_array_equal(back[name], state[name])


def test_each_weight_arrives_with_the_axes_it_left_with():
    """A swap of two axes in one direction that is undone in the other would show only here."""
    pair = make_pair("float32")
    state = to_torch(pair.jax_model)
    kernel = pair.jax_model.primary_capsules.convolution.kernel[...]
    assert state["encoder.image2primary_capsules.2.weight"][11, 6, 2, 4] == kernel[2, 4, 6, 11]
    assert state["decoder.2.weight"][12, 10] == pair.jax_model.decoder.hidden_weight[...][10, 12]
    assert state["decoder.4.weight"][12, 1, 20, 23] == pair.jax_model.decoder.to_pixels[...][12, 20, 23, 1]


def test_torch_reads_what_jax_saved_and_jax_what_torch_saved(tmp_path):
    pair = make_pair("float32")
    save_weights(tmp_path / "jax.safetensors", pair.jax_model)
    tensors = safetensors.torch.load_file(tmp_path / "jax.safetensors")
    for name, tensor in pair.torch_model.state_dict().items():
        assert torch.equal(tensors[name], tensor)

    doubled = {name: 2 * tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(doubled, tmp_path / "torch.safetensors")
    load_weights(tmp_path / "torch.safetensors", pair.jax_model)
    for name, array in to_torch(pair.jax_model).items():
        np.testing.assert_array_equal(array, doubled[name])
