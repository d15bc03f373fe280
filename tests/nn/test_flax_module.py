"""The model works with the transformations of Flax and JAX, whatever implementation is chosen."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from capsnet_jax import CapsNet, UsageError
from capsnet_jax.nn.losses import margin_loss
from tests.conftest import IMAGE_SHAPE, SMALL

CONVOLUTIONAL = SMALL | {"conv_capsules": ((3, 4, 2, 1),), "decoder_hidden": None}
BATCHES = {"votes": 2, "fused": 16}


@pytest.fixture(scope="module")
def model() -> CapsNet:
    return CapsNet(IMAGE_SHAPE, 10, **SMALL, rngs=nnx.Rngs(0))


def images_of(batch_size: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(batch_size).random((batch_size, *IMAGE_SHAPE)), jnp.float32)


@pytest.fixture(params=BATCHES.values(), ids=BATCHES)
def images(request) -> jax.Array:
    return images_of(request.param)


forward = nnx.jit(lambda model, images: model(images))


def test_a_call_returns_what_encode_and_decode_return(model, images):
    @jax.jit
    def both_ways(images, labels):
        capsules = model.encode(images)
        predicted = capsules.activations.argmax(axis=1)
        decoded = [model.decode(capsules.poses, classes) for classes in (predicted, labels)]
        return (model(images), model(images, labels)), (capsules, decoded)

    labels = jnp.full(len(images), 3)
    (by_default, of_labels), (capsules, (of_predicted, decoded)) = both_ways(images, labels)
    np.testing.assert_array_equal(by_default.poses, capsules.poses)
    np.testing.assert_array_equal(by_default.activations, capsules.activations)
    np.testing.assert_array_equal(by_default.reconstructions, of_predicted)
    np.testing.assert_array_equal(of_labels.reconstructions, decoded)
    assert np.abs(of_predicted - decoded).max() > 1e-4


def test_a_model_without_decoder_returns_no_reconstructions():
    model = CapsNet(IMAGE_SHAPE, 10, **CONVOLUTIONAL, rngs=nnx.Rngs(0))
    assert jax.eval_shape(model.__call__, images_of(2)).reconstructions is None


@pytest.mark.parametrize("compiled", [False, True])
def test_wrong_images_and_labels_are_errors(model, compiled):
    call = jax.jit(model) if compiled else model
    with pytest.raises(UsageError, match=r"Images are of shape \(9, 10, 1\), and the model was made for \(9, 11, 1\)"):
        call(jnp.ones((2, 9, 10, 1)))
    for labels, message in (
        (jnp.zeros(3, int), r"Labels are int32 of shape \(3,\); expected integers of shape \(2,\), or \(2, k\)"),
        (jnp.zeros(2), "Labels are float32 of shape"),
        (jnp.zeros((), int), r"Labels are int32 of shape \(\);"),
    ):
        with pytest.raises(UsageError, match=message):
            # Without compilation, all layers before the decoder would take long.
            call(jnp.ones((2, *IMAGE_SHAPE)), labels) if compiled else model.decode(jnp.ones((2, 10, 5)), labels)


@pytest.mark.parametrize("labels", [[0, 10], [-1, 3]])
def test_labels_out_of_range_are_an_error_outside_jit(model, labels):
    with pytest.raises(UsageError, match=f"The label {10 if 10 in labels else -1} is not a class; expected 0 to 9"):
        model(jnp.ones((2, *IMAGE_SHAPE)), np.array(labels))


def test_tabulate_shows_every_layer(model):
    table = nnx.tabulate(model, images_of(2), console_kwargs={"width": 300, "force_terminal": False})
    for path in ("stem/convolutions/0", "primary_capsules", "capsule_layers/0", "decoder"):
        assert re.search(rf"{path}\W", table), path
    total = sum(param.size for param in jax.tree.leaves(nnx.state(model)))
    assert f"{total:,}" in table


def test_split_and_merge_give_the_same_model(model, images):
    graphdef, state = nnx.split(model)
    assert hash(graphdef) == hash(nnx.split(nnx.clone(model))[0])
    np.testing.assert_array_equal(forward(nnx.merge(graphdef, state), images).poses, forward(model, images).poses)


def test_an_optimizer_of_flax_trains_it(images):
    model = CapsNet(IMAGE_SHAPE, 10, **SMALL, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    labels = jnp.arange(len(images)) % 10

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return margin_loss(model(images, labels).activations, labels).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(model, optimizer)) for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("batch_size", "compiled", "second"),
    [
        (BATCHES["votes"], True, True),
        (BATCHES["fused"], True, False),
        pytest.param(BATCHES["fused"], True, True, marks=pytest.mark.exhaustive),
        pytest.param(BATCHES["votes"], False, False, marks=pytest.mark.exhaustive),
        pytest.param(BATCHES["fused"], False, False, marks=pytest.mark.exhaustive),
    ],
)
def test_derivatives_in_forward_mode(batch_size, compiled, second, model):
    """Compared with central differences of the function and of its gradient, and with reverse mode."""
    with jax.enable_x64(True):
        graphdef, state = nnx.split(model)
        exact = nnx.merge(graphdef, jax.tree.map(lambda weight: jnp.asarray(weight, "float64"), state))
        images = images_of(batch_size).astype("float64")
        direction = jnp.asarray(np.random.default_rng(9).normal(size=images.shape))

        def along(t):
            output = exact(images + t * direction)
            return output.activations.sum() + output.poses[..., 0].sum()

        def derivatives(t):
            value, pushed = jax.jvp(along, (t,), (1.0,))
            curvature = jax.hessian(along)(t) if second else 0.0
            return value, pushed, jax.grad(along)(t), jax.linearize(along, t)[1](1.0), curvature

        step = 1e-5
        evaluate = jax.jit(derivatives) if compiled else derivatives
        below, here, above = (evaluate(t) for t in (-step, 0.0, step))
        _, pushed, slope, linear, curvature = here
        np.testing.assert_allclose(pushed, (above[0] - below[0]) / (2 * step), rtol=1e-6)
        np.testing.assert_allclose(pushed, slope, rtol=1e-10)
        np.testing.assert_allclose(linear, pushed, rtol=1e-10)
        if second:
            np.testing.assert_allclose(curvature, (above[2] - below[2]) / (2 * step), rtol=1e-5)


def test_vmap_over_images_and_over_models(model, images):
    each = jax.jit(jax.vmap(lambda image: model(image[None]).activations[0]))(images)
    expected = forward(model, images).activations
    np.testing.assert_allclose(each, expected, rtol=2e-4, atol=1e-6)
    graphdef, state = nnx.split(model)
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), state)
    outputs = jax.jit(jax.vmap(lambda state: nnx.merge(graphdef, state)(images).activations))(two)
    np.testing.assert_allclose(outputs[0], expected, rtol=2e-4, atol=1e-6)
    assert np.abs(outputs[1] - outputs[0]).max() > 0.01


@pytest.mark.parametrize("options", [SMALL, CONVOLUTIONAL], ids=["dense", "convolutional"])
def test_couplings_and_votes_are_returned_and_captured(options, images):
    model = CapsNet(IMAGE_SHAPE, 10, **options, rngs=nnx.Rngs(0))

    @nnx.jit
    def in_all_ways(model, images):
        routed, plain = model.route(images), model(images)
        captured = nnx.capture(model, nnx.Intermediate)(images)
        return routed, plain, captured, model(images)

    routed, plain, (output, captured), again = in_all_ways(model, images)
    assert len(routed) == len(model.capsule_layers)
    np.testing.assert_array_equal(routed[-1].activations.reshape(len(images), 10), plain.activations)
    np.testing.assert_array_equal(output.poses, plain.poses)
    for number, layer in enumerate(routed):
        intermediates = captured["capsule_layers"][number]
        np.testing.assert_array_equal(intermediates["couplings"].get_value()[0], layer.couplings)
        (votes,) = intermediates["votes"].get_value()
        summed = np.einsum("...io,...ioh->...oh", layer.couplings, votes.reshape(*layer.couplings.shape, -1))
        norm = np.linalg.norm(summed, axis=-1, keepdims=True)  # dynamic routing squashes the coupled sum of the votes
        np.testing.assert_allclose(norm * summed / (1 + norm**2), layer.poses, rtol=1e-3, atol=1e-5)
    assert not jax.tree.leaves(nnx.state(model, nnx.Intermediate))
    np.testing.assert_array_equal(again.poses, output.poses)


def test_implementations_are_reported_with_reasons():
    model = nnx.eval_shape(lambda: CapsNet(rngs=nnx.Rngs(0)))
    words = {name: str(choice) for name, choice in model.implementations(64).items()}
    assert words == {
        "stem 0": "direct+patches, because the kernel is large and has few channels",
        "primary capsules": "fourier, because it costs 0.47 of a matrix product of patches",
        "routing 0": "fused, because 64 >= 16 examples on one device",
    }
    assert str(model.implementations(3)["routing 0"]) == "votes, because 3 < 16 examples"
