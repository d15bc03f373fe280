"""Wrong arguments of models, layers and losses: the message has what was given and what is expected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from capsnet_jax import (
    CapsuleLayer,
    Capsules,
    ConvCapsules,
    Decoder,
    PrimaryCapsules,
    Stem,
    UsageError,
    margin_loss,
    spread_loss,
)

pytestmark = pytest.mark.usefixtures("without_type_checks")


def of_layer(**sizes):
    options = {"in_capsules": 6, "in_dim": 3, "out_capsules": 2, "out_dim": 4}
    return CapsuleLayer(**(options | sizes), rngs=nnx.Rngs(0))


def of_convolution(**sizes):
    options = {"in_groups": 2, "in_dim": 3, "out_groups": 2, "out_dim": 4, "kernel_size": 2}
    return ConvCapsules((3, 4), **(options | sizes), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 9, 11, 1), np.uint8), "Images are uint8; expected floats in \\[0, 1\\], such as images / 255"),
        (np.zeros((2, 9, 11, 1), bool), "Images are bool; expected floats"),
        (np.zeros((2, 9, 12, 1), np.float32), "\\(9, 12, 1\\), and the model was made for \\(9, 11, 1\\)"),
        (np.zeros((9, 11, 1), np.float32), "\\(11, 1\\), and the model was made for"),
    ],
)
def test_images_are_floats_of_the_shape_of_the_model(images, message, jit, small_model):
    encode = nnx.jit(lambda model, images: model.encode(images)) if jit else lambda model, images: model.encode(images)
    with pytest.raises(UsageError, match=message):
        encode(small_model, images)


@pytest.mark.parametrize("loss", [margin_loss, spread_loss])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 99], "The label 99 is not a class; expected 0 to 2"),
        ([-1, 0], "The label -1 is not a class; expected 0 to 2"),
        ([0.0, 1.5], "Labels are float64 of shape \\(2,\\); expected integers of shape \\(2,\\)"),
        ([0, 1, 2], "Labels are int64 of shape \\(3,\\); expected integers of shape \\(2,\\)"),
        (1, "Labels are int64 of shape \\(\\)"),
    ],
)
def test_labels_of_losses_are_classes(loss, labels, message):
    with pytest.raises(UsageError, match=message):
        loss(jnp.zeros((2, 3)), np.array(labels))


@pytest.mark.parametrize(("labels", "message"), [([0, 99], "The label 99"), ([0.0, 1.5], "Labels are float")])
def test_labels_of_the_decoder_are_classes(labels, message, small_model):
    with pytest.raises(UsageError, match=message):
        small_model.decode(jnp.zeros((2, 10, 5)), np.array(labels))


def test_losses_accept_labels_of_numpy_and_under_jit():
    activations, labels = jnp.array([[0.5, 0.2], [0.1, 0.7]]), np.array([0, 1])
    for loss in (margin_loss, spread_loss):
        np.testing.assert_allclose(
            jax.jit(loss)(activations, labels), loss(activations, jnp.asarray(labels)), rtol=1e-6
        )


@pytest.mark.parametrize(("layer", "number"), [(of_layer, 6), (of_convolution, 24)])
def test_layers_take_capsules_of_their_sizes(layer, number):
    layer, expected = layer(), f"\\(b, {number}, 3\\) and \\(b, {number}\\)"
    poses, activations = jnp.ones((5, number, 3)), jnp.ones((5, number))
    with pytest.raises(UsageError, match=f"The layer got ArrayImpl; expected Capsules.*{expected}"):
        layer(poses)
    with pytest.raises(UsageError, match=f"The layer got tuple; expected Capsules.*{expected}"):
        layer((poses, activations))
    for wrong in (Capsules(poses[:, 1:], activations[:, 1:]), Capsules(poses[..., :2], activations)):
        with pytest.raises(UsageError, match=f"The layer got capsules of shapes .*{expected}"):
            layer(wrong)
    with pytest.raises(UsageError, match=f"The layer got capsules of shapes .*{expected}"):
        layer(Capsules(poses, activations[:4]))
    assert layer(Capsules(poses, activations)).activations.shape[0] == 5


@pytest.mark.parametrize("size", [0, -1, 2.5])
@pytest.mark.parametrize(
    ("name", "create"),
    [
        *((name, of_layer) for name in ("in_capsules", "in_dim", "out_capsules", "out_dim")),
        *((name, of_convolution) for name in ("in_groups", "in_dim", "out_groups", "out_dim", "stride")),
        ("groups", lambda groups: PrimaryCapsules(3, groups, 2, rngs=nnx.Rngs(0))),
        ("dim", lambda dim: PrimaryCapsules(3, 2, dim, rngs=nnx.Rngs(0))),
        ("in_channels", lambda in_channels: Stem(in_channels, [(2, 3, 1)], rngs=nnx.Rngs(0))),
        ("out_channels", lambda out_channels: Stem(1, [(out_channels, 3, 1)], rngs=nnx.Rngs(0))),
        ("num_classes", lambda num_classes: Decoder(num_classes, 3, (4, 5), (6, 7, 1), rngs=nnx.Rngs(0))),
    ],
)
def test_sizes_of_layers_are_at_least_one(name, create, size):
    with pytest.raises(UsageError, match=f"{name} is {size}; expected a whole number of at least 1"):
        create(**{name: size})
