"""Layers and model: sizes that come by themselves, stacking, and errors."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from capsnet_jax import CapsNet, Capsules, Routed, UsageError
from capsnet_jax.config import ModelConfig
from capsnet_jax.layers import CapsuleLayer
from capsnet_jax.losses import margin_loss

SMALL = {
    "stem_channels": 6,
    "stem_kernel": 3,
    "primary_groups": 2,
    "primary_dim": 4,
    "primary_kernel": 3,
    "class_dim": 5,
}


def test_the_defaults_are_the_reference_model():
    model = nnx.eval_shape(lambda: CapsNet(rngs=nnx.Rngs(0)))
    assert model.encoder.capsule_layers[0].weight.shape == (1152, 8, 10, 16)
    assert sum(param.size for param in jax.tree.leaves(nnx.state(model))) == 8_214_272


def test_config_and_model_have_the_same_defaults():
    arguments = inspect.signature(CapsNet.__init__).parameters
    for name, value in vars(ModelConfig()).items():
        assert arguments[name].default == value, name
    rest = arguments.keys() - vars(ModelConfig()).keys()
    assert rest == {"self", "image_shape", "num_classes", "param_dtype", "rngs"}


@pytest.mark.parametrize(
    ("image_shape", "stride", "positions"), [((13, 16, 3), 2, 5 * 6), ((9, 5, 1), 1, 5 * 1), ((10, 12, 1), 3, 2 * 3)]
)
def test_the_number_of_primary_capsules_is_inferred(image_shape, stride, positions):
    model = CapsNet(image_shape, 4, **SMALL, primary_stride=stride, rngs=nnx.Rngs(0))
    assert model.encoder.capsule_layers[0].weight.shape == (2 * positions, 4, 4, 5)
    images = jax.ShapeDtypeStruct((2, *image_shape), "float32")
    capsules = jax.eval_shape(model.encode, images)
    assert capsules.poses.shape == (2, 4, 5)
    assert jax.eval_shape(model.decode, capsules.poses, jnp.array([0, 3])).shape == images.shape


def test_a_capsule_is_the_channels_of_one_group_at_one_position():
    """Position-coded: the pixel under a capsule is seen in that capsule and in no other."""
    model = CapsNet(
        (9, 11, 1), 4, **(SMALL | {"stem_kernel": 1, "primary_kernel": 1}), primary_stride=1, rngs=nnx.Rngs(0)
    )
    dark, lit = jnp.zeros((1, 9, 11, 1)), jnp.zeros((1, 9, 11, 1)).at[0, 5, 7].set(1)
    before, after = (model.encoder.primary_capsules(model.encoder.stem(images)).poses for images in (dark, lit))
    changed = np.flatnonzero(np.abs(after - before).max(axis=2)[0])
    np.testing.assert_array_equal(changed, [(5 * 11 + 7) * 2, (5 * 11 + 7) * 2 + 1])


def test_capsule_layers_stack_and_train():
    """Three lines make three layers; from capsules of clusters they learn the clusters."""
    rngs = nnx.Rngs(0)
    layers = nnx.List(
        [
            CapsuleLayer(24, 8, 32, 8, rngs=rngs),
            CapsuleLayer(32, 8, 16, 12, rngs=rngs),
            CapsuleLayer(16, 12, 10, 16, rngs=rngs),
        ]
    )
    rng = np.random.default_rng(0)
    labels = jnp.asarray(np.arange(40) % 10, jnp.int32)
    poses = jnp.asarray(3 * rng.normal(size=(10, 24, 8))[labels] + 0.5 * rng.normal(size=(40, 24, 8)), jnp.float32)
    graphdef, params = nnx.split(layers)

    def activations(params):
        capsules = Capsules(poses, jnp.linalg.norm(poses, axis=-1))
        for layer in nnx.merge(graphdef, params):
            capsules = layer(capsules)
        return capsules.activations

    def loss(params):
        predictions = activations(params)
        return margin_loss(predictions, labels).mean(), jnp.mean(predictions.argmax(axis=1) == labels)

    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, opt_state):
        (value, accuracy), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, value, accuracy

    opt_state = optimizer.init(params)
    losses = []
    for _ in range(100):
        params, opt_state, value, accuracy = step(params, opt_state)
        losses.append(float(value))
    assert losses[-1] < 0.1 * losses[0]
    assert accuracy == 1


def test_hidden_capsules_make_layers_of_these_sizes():
    model = CapsNet((9, 9, 1), 4, **SMALL, hidden_capsules=((7, 3), (6, 2)), rngs=nnx.Rngs(0))
    shapes = [layer.weight.shape for layer in model.encoder.capsule_layers]
    assert shapes == [(18, 4, 7, 3), (7, 3, 6, 2), (6, 2, 4, 5)]


def test_another_routing_reaches_every_layer():
    calls = []

    def first_votes(votes, activations):
        calls.append(votes.shape)
        return Routed(votes[0], jnp.ones(votes.shape[1]), jnp.ones(votes.shape[:2]))

    model = CapsNet((9, 9, 1), 4, **SMALL, hidden_capsules=((7, 3),), routing=first_votes, rngs=nnx.Rngs(0))
    calls.clear()
    capsules = model.encode(jnp.ones((2, 9, 9, 1)))
    assert calls == [(18, 7, 3), (7, 4, 5)]
    np.testing.assert_array_equal(capsules.activations, np.ones((2, 4)))


def test_too_small_an_image_is_an_error_that_tells_the_smallest():
    with pytest.raises(UsageError, match=r"Images of 16 x 30 are too small.* at least 17 x 17"):
        CapsNet((16, 30, 1), rngs=nnx.Rngs(0))


def test_no_iteration_is_an_error_when_the_model_is_made():
    with pytest.raises(UsageError, match="num_iterations is 0"):
        CapsNet((9, 9, 1), 4, **SMALL, num_iterations=0, rngs=nnx.Rngs(0))


def test_an_image_of_another_shape_is_an_error():
    model = CapsNet((9, 9, 1), 4, **SMALL, rngs=nnx.Rngs(0))
    with pytest.raises(UsageError, match=r"\(9, 10, 1\).*\(9, 9, 1\)"):
        model.encode(jnp.zeros((2, 9, 10, 1)))
