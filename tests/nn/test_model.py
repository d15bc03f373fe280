"""Layers and model: inferred sizes, stacking, recomputed routing and errors."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from capsnet_jax import CapsNet, Capsules, Routed, UsageError
from capsnet_jax.nn.conv_capsules import ConvCapsules
from capsnet_jax.nn.layers import CapsuleLayer, PrimaryCapsules
from capsnet_jax.nn.losses import margin_loss
from capsnet_jax.presets import PRESETS
from tests.conftest import SMALL


def test_the_defaults_are_the_reference_model():
    model = nnx.eval_shape(lambda: CapsNet(rngs=nnx.Rngs(0)))
    assert model.capsule_layers[0].weight.shape == (1152, 8, 10, 16)
    assert sum(param.size for param in jax.tree.leaves(nnx.state(model))) == 8_214_272


def test_keywords_and_configs_and_presets_make_the_same_model():
    config = PRESETS["digits"].model
    models = [
        CapsNet(**vars(config), rngs=nnx.Rngs(3)),
        CapsNet.from_config(config, rngs=nnx.Rngs(3)),
        CapsNet.from_preset("digits", rngs=nnx.Rngs(3)),
    ]
    assert {model.config for model in models} == {config}
    first, *others = [nnx.state(model) for model in models]
    for other in others:
        for ours, expected in zip(jax.tree.leaves(other), jax.tree.leaves(first), strict=True):
            np.testing.assert_array_equal(ours, expected)
    changed = CapsNet.from_preset("digits", num_classes=4, class_dim=3, rngs=nnx.Rngs(0))
    assert changed.config == dataclasses.replace(config, num_classes=4, class_dim=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"primary_group": 4}, "no field 'primary_group'; the nearest is 'primary_groups'"),
        ({"routings": "em"}, "no field 'routings'; the nearest is 'routing'"),
        ({"num_classes": 0}, "num_classes is 0, and must be at least 1"),
        ({"hidden_capsules": [[4, 0]]}, r"hidden_capsules is \(\(4, 0\),\), and must be of sizes of at least 1"),
    ],
)
def test_a_wrong_field_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        CapsNet(**options, rngs=nnx.Rngs(0))
    if "image_shape" not in options:
        with pytest.raises(UsageError, match=message):
            CapsNet.from_preset("digits", **options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("sizes", "fields"),
    [(((9, 11, 1), 4, 3), {}), (((9, 11, 1),), {"image_shape": (12, 13, 1)}), (((9, 11, 1), 4), {"num_classes": 4})],
)
def test_repeated_or_too_many_sizes_are_refused(sizes, fields):
    with pytest.raises(UsageError, match="expected image_shape and num_classes, each once, and all other"):
        CapsNet(*sizes, **fields, rngs=nnx.Rngs(0))


def test_an_unknown_preset_is_refused():
    with pytest.raises(UsageError, match="Unknown preset 'digit'; expected readable, digits"):
        CapsNet.from_preset("digit", rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("image_shape", "stride", "positions"), [((13, 16, 3), 2, 5 * 6), ((9, 5, 1), 1, 5 * 1), ((10, 12, 1), 3, 2 * 3)]
)
def test_the_number_of_primary_capsules_is_inferred(image_shape, stride, positions):
    def weight_and_outputs(images):
        model = CapsNet(image_shape, 4, **SMALL, primary_stride=stride, rngs=nnx.Rngs(0))
        capsules = model.encode(images)
        return model.capsule_layers[0].weight[...], capsules.poses, model.decode(capsules.poses, jnp.array([0, 3]))

    images = jax.ShapeDtypeStruct((2, *image_shape), "float32")
    weight, poses, decoded = jax.eval_shape(weight_and_outputs, images)
    assert weight.shape == (2 * positions, 4, 4, 5)
    assert poses.shape == (2, 4, 5)
    assert decoded.shape == images.shape


def test_a_capsule_is_the_channels_of_one_group_at_one_position():
    """With kernels of one pixel, a pixel changes the capsules at its position and no others."""
    model = CapsNet(
        (9, 11, 1), 4, **(SMALL | {"stem_kernel": 1, "primary_kernel": 1}), primary_stride=1, rngs=nnx.Rngs(0)
    )
    images = np.zeros((2, 9, 11, 1), np.float32)
    images[1, 5, 7] = 1
    dark, lit = np.asarray(jax.jit(lambda images: model.primary_capsules(model.stem(images)).poses)(images))
    changed = np.flatnonzero(np.abs(lit - dark).max(axis=1))
    np.testing.assert_array_equal(changed, [(5 * 11 + 7) * 2, (5 * 11 + 7) * 2 + 1])


@pytest.mark.parametrize("activation", ["norm", "sigmoid"])
def test_each_channel_is_one_pose_component_or_the_activation_of_one_group(activation):
    """Channels are in the order (groups, pose size); with "sigmoid", the last channel of a group is its activation."""
    groups, dim = 3, 4
    size = dim + (activation == "sigmoid")
    channels = groups * size
    options = {"kernel_size": 1, "stride": 1, "scale": 1.0, "activation": activation}
    primary = PrimaryCapsules(channels, groups, dim, **options, rngs=nnx.Rngs(0))
    primary.convolution.kernel[...] = np.eye(channels, dtype=np.float32)[None, None]
    primary.convolution.bias[...] = np.zeros(channels, np.float32)
    one_at_a_time = np.eye(channels, dtype=np.float32)
    poses, activations = jax.jit(primary)(one_at_a_time[:, None, None, :])
    expected = one_at_a_time.reshape(channels, groups, size)
    np.testing.assert_array_equal(poses, expected[..., :dim])
    expected = 1 / (1 + np.exp(-expected[..., dim])) if activation == "sigmoid" else expected.max(axis=-1)
    np.testing.assert_allclose(activations, expected, rtol=1e-6)


def test_three_capsule_layers_train():
    """The input capsules form clusters, which the layers learn to classify."""
    rngs = nnx.Rngs(0)
    layers = nnx.List(
        [CapsuleLayer(*sizes, num_iterations=2, rngs=rngs) for sizes in ((24, 8, 12, 6), (12, 6, 8, 7), (8, 7, 4, 9))]
    )
    rng = np.random.default_rng(0)
    labels = jnp.asarray(np.arange(12) % 4, jnp.int32)
    poses = jnp.asarray(3 * rng.normal(size=(4, 24, 8))[labels] + 0.5 * rng.normal(size=(12, 24, 8)), jnp.float32)
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

    def step(state, _):
        params, opt_state = state
        measured, grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), measured

    train = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), length=60)[1])
    losses, accuracies = jax.device_get(train(params))
    assert losses[-1] < 0.1 * losses[0]
    assert accuracies[-1] == 1


def test_hidden_capsules_set_the_sizes_of_layers():
    model = nnx.eval_shape(lambda: CapsNet((9, 9, 1), 4, **SMALL, hidden_capsules=((7, 3), (6, 2)), rngs=nnx.Rngs(0)))
    shapes = [layer.weight.shape for layer in model.capsule_layers]
    assert shapes == [(18, 4, 7, 3), (7, 3, 6, 2), (6, 2, 4, 5)]


def test_routing_is_used_in_every_layer():
    calls = []

    def first_votes(votes, activations):
        calls.append(votes.shape)
        return Routed(votes[0], jnp.ones(votes.shape[1]), jnp.ones(votes.shape[:2]))

    model = CapsNet((9, 9, 1), 4, **SMALL, hidden_capsules=((7, 3),), routing=first_votes, rngs=nnx.Rngs(0))
    calls.clear()
    capsules = jax.jit(model.encode)(jnp.ones((2, 9, 9, 1)))
    assert calls == [(18, 7, 3), (7, 4, 5)]
    np.testing.assert_array_equal(capsules.activations, np.ones((2, 4)))


def test_too_small_images_are_refused_with_the_smallest_size():
    with pytest.raises(UsageError, match=r"Images of 16 x 30 are too small.* at least 17 x 17"):
        CapsNet((16, 30, 1), rngs=nnx.Rngs(0))


def test_zero_iterations_are_refused():
    with pytest.raises(UsageError, match="num_iterations is 0"):
        CapsNet((9, 9, 1), 4, **SMALL, num_iterations=0, rngs=nnx.Rngs(0))


def test_images_of_another_shape_are_refused():
    model = CapsNet((9, 9, 1), 4, **SMALL, rngs=nnx.Rngs(0))
    with pytest.raises(UsageError, match=r"\(9, 10, 1\).*\(9, 9, 1\)"):
        model.encode(jnp.zeros((2, 9, 10, 1)))


def test_images_are_standardized_for_the_encoder_only():
    plain = CapsNet((9, 9, 2), 4, **SMALL, rngs=nnx.Rngs(0))
    standardizing = CapsNet((9, 9, 2), 4, **SMALL, standardize_images=True, rngs=nnx.Rngs(0))
    images = np.random.default_rng(3).random((2, 9, 9, 2)).astype(np.float32)
    mean, deviation = (getattr(images, name)(axis=(1, 2, 3), keepdims=True) for name in ("mean", "std"))
    encode = jax.jit(lambda images: standardizing.encode(images).poses)
    poses = encode(images)
    expected = jax.jit(lambda images: plain.encode(images).poses)((images - mean) / deviation)
    np.testing.assert_allclose(poses, expected, rtol=1e-4, atol=1e-6)
    # Brightness and contrast do not matter then.
    np.testing.assert_allclose(encode(0.3 + 0.5 * images), poses, rtol=1e-3, atol=1e-6)
    decoded = jax.jit(lambda *arguments: [model.decode(*arguments) for model in (standardizing, plain)])
    np.testing.assert_array_equal(*decoded(poses, jnp.array([3, 1])))


def test_images_are_reconstructed_from_the_capsules_of_all_labels():
    model = CapsNet((9, 9, 1), 4, **SMALL, rngs=nnx.Rngs(0))
    labels = np.array([[3, 1], [0, 2]])
    poses = jnp.asarray(np.random.default_rng(4).normal(size=(2, 4, 5)), jnp.float32)
    grads = jax.jit(jax.grad(lambda poses: jnp.square(model.decode(poses, jnp.asarray(labels))).sum()))(poses)
    grads = np.asarray(grads)
    for example, of_example in enumerate(labels):
        matters = np.abs(grads[example]).max(axis=1) > 0
        np.testing.assert_array_equal(np.flatnonzero(matters), sorted(of_example))


RECOMPUTING = {"dense": partial(CapsuleLayer, 36), "convolutional": partial(ConvCapsules, (6, 3), 2, kernel_size=2)}


@pytest.mark.parametrize("kind", RECOMPUTING)
def test_recomputed_routing_is_equal_and_stores_less(kind):
    with jax.enable_x64(True):
        rng = np.random.default_rng(5)
        capsules = Capsules(jnp.asarray(rng.normal(size=(2, 36, 4))), jnp.asarray(rng.uniform(size=(2, 36))))
        results, kept = [], []
        for recompute in (False, True):
            layer = RECOMPUTING[kind](
                4,
                3,
                7,
                routing="em,min_variance=0.1",
                num_iterations=2,
                recompute=recompute,
                param_dtype="float64",
                rngs=nnx.Rngs(0),
            )
            graphdef, params = nnx.split(layer)

            def poses(params, capsules, graphdef=graphdef):
                return nnx.merge(graphdef, params)(capsules).poses

            def loss(*args, poses=poses):
                return jnp.square(poses(*args) - 1).sum()

            results.append(jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, capsules))
            residuals = jax.eval_shape(lambda *args, poses=poses: jax.vjp(poses, *args)[1], params, capsules)
            floats = [leaf for leaf in jax.tree.leaves(residuals) if leaf.dtype == jnp.float64]
            kept.append(sum(leaf.size for leaf in floats))
    for plain, recomputed in zip(*map(jax.tree.leaves, results), strict=True):
        assert np.abs(plain).max() > 1e-3
        assert np.abs(recomputed - plain).max() <= 1e-12 * np.abs(plain).max()
    # Recomputing stores only weights and input capsules; otherwise votes are stored, too.
    assert kept[1] <= sum(leaf.size for leaf in jax.tree.leaves((params, capsules)))
    num_votes = {"dense": 36 * 3, "convolutional": 5 * 2 * 2 * 2 * 2 * 3}[kind]
    assert kept[0] - kept[1] > 2 * num_votes * 7


def test_the_model_recomputes_in_every_layer():
    model = CapsNet((9, 9, 1), 4, **SMALL, conv_capsules=((3, 4, 2, 1),), recompute_routing=True, rngs=nnx.Rngs(0))
    names = [equation.primitive.name for equation in jax.make_jaxpr(model.encode)(jnp.ones((2, 9, 9, 1))).eqns]
    assert sum(name.startswith("remat") for name in names) == len(model.capsule_layers) == 2
