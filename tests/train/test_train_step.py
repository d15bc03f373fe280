"""Training steps: micro-batches, averaged weights, bfloat16, images with several labels."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from capsnet_jax import CapsNet
from capsnet_jax.cli.train import picture
from capsnet_jax.config import TrainingConfig
from capsnet_jax.data import make_dataset
from capsnet_jax.train import evaluation
from capsnet_jax.train import loop as trainer
from capsnet_jax.train.evaluation import evaluate, predict
from capsnet_jax.train.loop import Trainer
from capsnet_jax.train.step import TrainState, compute_losses, create_state, make_train_step, without_axis_of_one
from tests.conftest import IMAGE_SHAPE, SMALL, make_small_dataset

QUICK = SMALL | {"routing": "uniform"}  # a model that is quick to compile


def float64_batch() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(5)
    return jnp.asarray(rng.random((8, *IMAGE_SHAPE))), jnp.asarray(rng.integers(0, 10, 8), jnp.int32)


def in_parts(accumulate: int, *, steps: int = 2, **options) -> tuple[TrainState, np.ndarray]:
    """State and metrics after some steps on the same batch in float64."""
    with jax.enable_x64(True):
        model = CapsNet(IMAGE_SHAPE, 10, **QUICK, **options, param_dtype="float64", rngs=nnx.Rngs(0))
        # A large epsilon, so that Adam does not amplify rounding errors of gradients near zero.
        optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.01, eps=1e-4))
        graphdef, state = create_state(model, optimizer)
        train_step = jax.jit(make_train_step(graphdef, optimizer, TrainingConfig(accumulate=accumulate)))
        metrics = []
        for _ in range(steps):
            state, of_step = train_step(state, *float64_batch())
            metrics.append(np.stack(of_step))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("float64")}
    return state, np.stack(metrics)


@pytest.fixture(scope="module")
def in_one():
    return in_parts(1)


@pytest.mark.parametrize("accumulate", [4, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_micro_batches_give_the_result_of_the_whole_batch(accumulate, in_one):
    state, metrics = in_parts(accumulate)
    expected_state, expected_metrics = in_one
    np.testing.assert_allclose(metrics, expected_metrics, rtol=1e-12)
    assert np.all(metrics[0, :3] > metrics[1, :3])
    for (path, leaf), expected in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(expected_state), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=1e-12 * np.abs(expected).max(), err_msg=str(path))


@pytest.mark.parametrize(("seeds", "is_batched"), [(1, False), (3, True)])
def test_a_single_seed_is_computed_without_a_batch_axis(seeds, is_batched):
    rng = np.random.default_rng(0)
    left, right, shared = rng.random((seeds, 2, 5)), rng.random((seeds, 5, 3)), rng.random(3)

    @partial(jax.vmap, in_axes=(0, 0, None))
    @without_axis_of_one
    def products(left, right, shared):
        return {"sum": left @ right + shared}, left.sum()

    with jax.enable_x64(True):
        (result, sums), program = products(left, right, shared), jax.make_jaxpr(products)(left, right, shared)
    np.testing.assert_allclose(result["sum"], np.einsum("sab,sbc->sac", left, right) + shared, rtol=1e-12)
    np.testing.assert_allclose(sums, left.sum((1, 2)), rtol=1e-12)
    (product,) = (equation for equation in program.jaxpr.eqns if equation.primitive.name == "dot_general")
    assert (product.invars[0].aval.ndim == 3) is is_batched


def test_the_gradient_norm_is_that_before_clipping(in_one):
    with jax.enable_x64(True):
        model = CapsNet(IMAGE_SHAPE, 10, **QUICK, param_dtype="float64", rngs=nnx.Rngs(0))
        graphdef, params = nnx.split(model)
        images, labels = float64_batch()
        is_label = np.arange(10) == labels[:, None]

        def loss(params):
            model = nnx.merge(graphdef, params)
            poses, activations = model.encode(images)
            margins = jnp.where(is_label, jax.nn.relu(0.9 - activations) ** 2, jax.nn.relu(activations - 0.1) ** 2 / 2)
            return margins.sum() / 8 + 10 * jnp.mean((model.decode(poses, labels) - images) ** 2)

        gradients = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params))]
    norm = np.sqrt(sum(np.sum(gradient**2) for gradient in gradients))
    assert norm > 0.5
    _, metrics = in_one
    np.testing.assert_allclose(metrics[0, -1], norm, rtol=1e-12)


def test_batch_normalization_is_updated_by_one_micro_batch_after_the_other():
    """The first micro-batch is every other image."""
    state, _ = in_parts(2, steps=1, batch_norm=True)
    with jax.enable_x64(True):
        model = CapsNet(IMAGE_SHAPE, 10, **QUICK, param_dtype="float64", rngs=nnx.Rngs(0))
        features = np.asarray(nnx.relu(model.stem.convolutions[0](float64_batch()[0])))
    mean, variance = np.zeros(6), np.ones(6)
    for part in (features[::2], features[1::2]):
        mean = 0.99 * mean + 0.01 * part.mean(axis=(0, 1, 2))
        variance = 0.99 * variance + 0.01 * part.var(axis=(0, 1, 2))
    norm = state.batch_stats["stem"]["norms"][0]
    np.testing.assert_allclose(norm["mean"][...], mean, rtol=1e-12)
    np.testing.assert_allclose(norm["var"][...], variance, rtol=1e-12)
    assert np.abs(mean - 0.01 * features.mean(axis=(0, 1, 2))).max() > 1e-4


class Evaluated:
    """Replaces `evaluate` in the training loop by one that records the weights."""

    def __init__(self, monkeypatch):
        self.states = []

        def noting(model, *args, **options):
            self.states.append(jax.device_get(nnx.state(model)))
            return evaluate(model, *args, **options)

        monkeypatch.setattr(trainer, "evaluate", noting)


def new_trainer(config: TrainingConfig, dataset=None, **options) -> Trainer:
    return Trainer(
        lambda seed: CapsNet(IMAGE_SHAPE, 10, **SMALL | options, rngs=nnx.Rngs(seed)),
        make_small_dataset() if dataset is None else dataset,
        config,
    )


def of_seed(tree):
    """Select the only seed and fetch it."""
    return jax.tree.map(lambda leaf: leaf[0], jax.device_get(tree))


ALL_AT_ONCE = TrainingConfig(epochs=4, batch_size=50, learning_rate=0.02)  # one step per epoch, on all images


def test_the_moving_average_of_the_weights_is_evaluated_and_kept(monkeypatch):
    """The decay in step t is (1 + t) / (10 + t), but at most that of the config."""
    evaluated = Evaluated(monkeypatch)
    config = dataclasses.replace(ALL_AT_ONCE, ema_decay=0.2, reconstruction_weight=0.0)
    averaging = new_trainer(config, batch_norm=True, routing="uniform", decoder_hidden=None)
    average = jax.tree.map(np.float64, of_seed(averaging.snapshot.state.params))
    for decay, _ in zip((1 / 10, 2 / 11, 0.2, 0.2), averaging.run(), strict=True):
        state = of_seed(averaging.snapshot.state)
        average = jax.tree.map(lambda old, new, decay=decay: decay * old + (1 - decay) * new, average, state.params)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), state.average, average)
        # The average and the batch statistics are evaluated ...
        expected = nnx.merge_state(state.average, state.batch_stats)
        jax.tree.map(np.testing.assert_array_equal, evaluated.states[-1], expected)
    # ... and kept.
    kept = nnx.state(averaging.models()[0], (nnx.Param, nnx.BatchStat))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(kept), expected)
    differences = jax.tree.map(lambda one, other: np.abs(one - other).max(), state.average, state.params)
    assert min(jax.tree.leaves(differences)) > 1e-4
    assert len(evaluated.states) == 4


def test_bfloat16_is_used_in_training_but_not_in_evaluation(monkeypatch, small_dataset):
    """Weights stay float32; losses start close to those in float32, and fall."""
    evaluated = Evaluated(monkeypatch)
    config = dataclasses.replace(ALL_AT_ONCE, epochs=12, precision="bfloat16")
    rounding = new_trainer(config, routing="uniform")
    images, labels = small_dataset.train_images / np.float32(255), small_dataset.train_labels
    exact = jax.jit(partial(compute_losses, rounding.models()[0], reconstruction_weight=10.0))(images, labels)
    losses = [progress.losses["total"] for progress in rounding.run()]
    assert losses[0] != exact.total
    assert losses[0] == pytest.approx(float(exact.total), rel=1e-2)
    assert losses[-1] < 0.85 * losses[0]
    state = rounding.snapshot.state
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, evaluated.states))} == {np.dtype("float32")}
    program = evaluation._compiled(evaluation._predict_batch, rounding.graphdef, rounding.mesh)
    batch = small_dataset.test_images, small_dataset.test_labels
    weights = of_seed(rounding.snapshot.state.weights)
    assert "bf16" not in str(program.trace(weights, *batch).jaxpr)
    batch = images[None, None], labels[None, None], None, jax.random.split(jax.random.key(0), 1)
    assert "bf16" in str(rounding._train_chunk.trace(state, *batch).jaxpr)


def pairs_dataset():
    """Images with a bright row and a bright column for their two classes; labels are in random order."""
    rng = np.random.default_rng(3)
    splits = []
    for count in (50, 23):
        labels = np.stack([rng.integers(0, 5, count), rng.integers(5, 10, count)], axis=1)
        images = rng.integers(0, 60, (count, *IMAGE_SHAPE), dtype=np.uint8)
        for image, (row, column) in zip(images, labels, strict=True):
            image[row] = image[:, column] = 255
        splits += [images, rng.permuted(labels, axis=1)]
    return make_dataset(*splits, num_classes=10)


@pytest.fixture(scope="module")
def pairs():
    """A data set, a model trained on it, and the progress and two most active classes after each epoch."""
    dataset = pairs_dataset()
    learning = new_trainer(
        TrainingConfig(epochs=20, batch_size=8, learning_rate=0.01, reconstruction_weight=0.1), dataset
    )
    epochs = []
    for progress in learning.run():
        if progress.ends_epoch:
            activations = predict(learning.models()[0], dataset.test_images).activations
            epochs.append((progress, np.argsort(-activations)[:, :2].tolist()))
    return dataset, learning.models()[0], epochs


def test_a_prediction_of_two_classes_is_right_if_both_are(pairs):
    dataset, _, epochs = pairs
    half_right = 0
    for progress, predictions in epochs:
        hits = [len(set(both) & set(labels)) for both, labels in zip(predictions, dataset.test_labels, strict=True)]
        assert progress.seeds[0].test[:2] == (hits.count(2), 23)
        half_right += hits.count(1)
    last, _ = epochs[-1]
    assert last.test_accuracy > 0.8
    assert last.losses["accuracy"] > 0.8
    assert half_right > 23


def test_an_image_with_two_labels_is_drawn_once_for_each_predicted_class(pairs):
    """Five images, twice each; labels are changed so that one prediction of image 1 and both of image 2 are wrong."""
    dataset, model, epochs = pairs
    _, predictions = epochs[-1]
    labels = dataset.test_labels.copy()
    labels[:5] = predictions[:5]
    absent = [sorted(set(range(10)) - set(both)) for both in predictions]
    labels[1], labels[2] = (predictions[1][1], absent[1][0]), absent[2][:2]
    upper, lower = np.reshape(picture(model, dataset._replace(test_labels=labels)).axes, (2, 10))
    expected_titles = [
        *predictions[0],
        absent[1][0],
        predictions[1][1],
        *absent[2][:2],
        *predictions[3],
        *predictions[4],
    ]
    assert [axis.get_title() for axis in upper] == list(map(str, expected_titles))
    assert [axis.get_xlabel() for axis in lower] == [str(label) for both in predictions[:5] for label in both]
    wrong = [axis.xaxis.label.get_weight() == "bold" for axis in lower]
    assert wrong == [False, False, True, False, True, True, False, False, False, False]
    images = jnp.asarray(dataset.test_images) / 255
    shown = np.arange(10) // 2  # image of each column
    of_prediction = jnp.array(predictions[:5]).ravel()
    reconstructions = jax.jit(lambda images: model.decode(model.encode(images).poses[shown], of_prediction))(images)
    for axes, expected in ((upper, images[shown]), (lower, reconstructions)):
        drawn = np.stack([axis.images[0].get_array() for axis in axes])
        np.testing.assert_allclose(drawn, expected[..., 0], atol=1e-6)
