"""Presets: published numbers of weights, initial weights and schedules; training changes every weight."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from capsnet_jax import CapsNet
from capsnet_jax.presets import PRESETS
from capsnet_jax.train.optimizer import create_optimizer, learning_rate
from capsnet_jax.train.step import create_state, make_train_step

# On MNIST, in all and without the decoder.
COUNTS = {
    "readable": (8_214_272, 6_804_224),
    "official": (8_215_728, 6_804_384),  # published: 8.2 and 6.8 million; the sums of the authors' code
    "paper": (8_215_728, 6_804_384),
    "efficient": (1_573_168, 161_824),  # published: 161 thousand
    "em": (68_444, 68_444),
}
SMALLEST = {"digits": (8, 8, 1), "efficient": (28, 28, 1)}  # images that the kernels cover; 18 x 18 for the others


def shapes(preset: str, image_shape=(28, 28, 1), num_classes=10) -> CapsNet:
    return nnx.eval_shape(
        lambda: CapsNet.from_preset(preset, image_shape=image_shape, num_classes=num_classes, rngs=nnx.Rngs(0))
    )


def count(module: nnx.Module) -> int:
    return sum(param.size for param in jax.tree.leaves(nnx.state(module, nnx.Param)))


@pytest.mark.parametrize("preset", COUNTS)
def test_the_number_of_weights_is_as_published(preset):
    model = shapes(preset)
    of_decoder = 0 if model.decoder is None else count(model.decoder)
    assert (count(model), count(model) - of_decoder) == COUNTS[preset]


def test_em_has_68_thousand_weights_on_smallnorb():
    """Table 1 of the paper: A = 64, B = 8, C = D = 16, on crops of image pairs."""
    assert count(shapes("em", (32, 32, 2), 5)) == 68_754


def test_the_weights_of_every_published_preset_are_counted():
    assert PRESETS.keys() - COUNTS.keys() == {"digits"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset",
    # Other tests train networks like "readable", and "paper" is "official" with another weight of a loss.
    [pytest.param(name, marks=[pytest.mark.exhaustive] * (name in ("readable", "paper"))) for name in PRESETS],
)
def test_training_changes_every_weight_and_lowers_the_loss(preset):
    """One program creates the model and trains it for four steps, as compiling takes most of the time."""
    config = PRESETS[preset]
    image_shape = SMALLEST.get(preset, (18, 18, 1))
    optimizer = create_optimizer(config.training, steps_per_epoch=100)

    @jax.jit
    def train(images, labels):
        model = CapsNet.from_config(config.with_sizes(image_shape, 10).model, rngs=nnx.Rngs(0))
        graphdef, state = create_state(model, optimizer)
        train_step = make_train_step(graphdef, optimizer, config.training)

        def step(before, _):
            after, loss = train_step(before, images, labels)
            pairs = zip(*(nnx.to_flat_state(state.params) for state in (before, after)), strict=True)
            changed = {path: jnp.any(old[...] != new[...]) for (path, old), (_, new) in pairs}
            finite = {path: jnp.all(jnp.isfinite(new[...])) for path, new in nnx.to_flat_state(after.params)}
            return after, (loss.total, changed, finite)

        return jax.lax.scan(step, state, length=4)[1]

    rng = np.random.default_rng(0)
    images, labels = jnp.asarray(rng.random((4, *image_shape)), jnp.float32), jnp.array([7, 0, 3, 3])
    losses, changed, finite = jax.device_get(train(images, labels))
    for path in changed:
        assert finite[path].all(), path
        # In the first step, weights that are zero can stop the gradient of others. Single ReLU units may be dead.
        assert changed[path][1], path
    assert np.all(np.isfinite(losses))
    assert losses[-1] < losses[0]


def test_official_and_paper_differ_in_one_number():
    official, paper = (PRESETS[name].to_json() for name in ("official", "paper"))
    assert (official["training"].pop("reconstruction_weight"), paper["training"].pop("reconstruction_weight")) == (
        0.01,
        0.0005,
    )
    assert official == paper


def test_official_weights_have_the_distributions_of_the_authors():
    model = CapsNet.from_preset("official", rngs=nnx.Rngs(0))
    decoder = model.decoder
    stem, primary = model.stem.convolutions[0], model.primary_capsules.convolution
    for weight, deviation in (
        (stem.kernel, 0.05),
        (primary.kernel, 0.1),
        (model.capsule_layers[0].weight, 0.1),
        (decoder.from_capsules, 0.1),
        (decoder.hidden_weight, 0.1),
        (decoder.to_pixels, 0.1),
    ):
        values = np.asarray(weight[...], np.float64)
        assert np.abs(values).max() <= 2 * deviation
        # Cut at two standard deviations, a normal has 0.8796 of its deviation. Tolerance: five standard errors.
        assert abs(values.std() / (0.8796 * deviation) - 1) < 5 * 0.7 / values.size**0.5
    biases = [stem.bias, primary.bias, decoder.first_bias, decoder.hidden_bias, decoder.pixel_bias]
    for bias in (*biases, model.capsule_layers[0].routing_weights["capsule_bias"]):
        np.testing.assert_array_equal(bias[...], np.float32(0.1))


def test_the_learning_rate_falls_as_published():
    """By 0.96 every 2,000 steps, down to 1e-6."""
    rates = [float(learning_rate(PRESETS["official"].training, 468)(step)) for step in (0, 1000, 2000, 300_000, 10**6)]
    np.testing.assert_allclose(rates, [1e-3, 1e-3 * 0.96**0.5, 0.96e-3, 1e-3 * 0.96**150, 1e-6], rtol=1e-5)
    assert all(later < earlier for earlier, later in pairwise(rates))
    assert float(learning_rate(PRESETS["readable"].training, 937)(5000)) == np.float32(1e-3)
