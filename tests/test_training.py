"""Training: one program, reproducible steps; evaluation: every image once."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from capsnet_jax import CapsNet, UsageError, evaluation, trainer, training
from capsnet_jax.config import TrainingConfig
from capsnet_jax.data import make_dataset
from capsnet_jax.evaluation import evaluate, make_count_correct
from capsnet_jax.feeding import Feed
from capsnet_jax.train import picture
from capsnet_jax.trainer import NonFiniteLossError, Trainer, fit
from capsnet_jax.training import TrainState, compute_losses, create_state, make_train_step
from capsnet_jax.weights import to_torch
from tests.conftest import IMAGE_SHAPE, SMALL, make_small_dataset

CONFIG = TrainingConfig(epochs=2, batch_size=8, learning_rate=0.01)


def train(model, dataset, config=CONFIG, augment=("shift=0.2",)):
    return list(fit(model, dataset, config, augment=augment))


def test_it_learns(small_model, small_dataset):
    before = to_torch(small_model)
    progress = train(small_model, small_dataset, dataclasses.replace(CONFIG, epochs=20), augment=())
    assert progress[-1].losses["total"] < 0.5 * progress[0].losses["total"]
    assert progress[-1].test.accuracy > 0.9
    assert all(not np.array_equal(before[name], after) for name, after in to_torch(small_model).items())


@pytest.mark.parametrize("steps_per_chunk", [0, 3])
def test_a_run_compiles_once(steps_per_chunk, small_model, small_dataset, monkeypatch):
    """Two epochs of six steps, and evaluations with a last batch that is not full."""
    traces = {"train": 0, "evaluate": 0}
    compute_losses, to_unit_range = training.compute_losses, evaluation.to_unit_range

    def counted_losses(*args, **kwargs):
        traces["train"] += 1
        return compute_losses(*args, **kwargs)

    def counted_conversion(images):
        traces["evaluate"] += images.shape[0] == 5
        return to_unit_range(images)

    monkeypatch.setattr(training, "compute_losses", counted_losses)
    monkeypatch.setattr(evaluation, "to_unit_range", counted_conversion)
    monkeypatch.setattr(trainer, "evaluate", partial(evaluate, batch_size=5))
    progress = train(small_model, small_dataset, dataclasses.replace(CONFIG, steps_per_chunk=steps_per_chunk))
    assert len(progress) == 12 / max(steps_per_chunk, 1)
    assert traces == {"train": 1, "evaluate": 1}


def test_the_length_of_chunks_changes_nothing(small_dataset, small_model):
    """Shifts depend on the key and the number of the step alone."""
    weights = []
    for steps_per_chunk in (1, 2, 6):
        model = nnx.clone(small_model)
        progress = train(model, small_dataset, dataclasses.replace(CONFIG, steps_per_chunk=steps_per_chunk))
        assert [p.step for p in progress] == list(range(steps_per_chunk, 13, steps_per_chunk))
        weights.append(to_torch(model))
    for name in weights[0]:
        scale = np.abs(weights[0][name]).max()
        np.testing.assert_allclose(weights[1][name], weights[0][name], atol=1e-4 * scale)
        np.testing.assert_allclose(weights[2][name], weights[0][name], atol=1e-4 * scale)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(small_model, small_dataset):
    results = []
    for seed in (0, 0, 1):
        model = nnx.clone(small_model)
        train(model, small_dataset, dataclasses.replace(CONFIG, seed=seed, epochs=1))
        results.append(to_torch(model)["decoder.2.weight"])
    np.testing.assert_array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def test_every_epoch_sees_every_image_at_most_once_in_another_order(small_model, small_dataset, monkeypatch):
    seen = []
    send = Feed._send_indices

    def recording(self, indices):
        seen.append(indices.ravel())
        return send(self, indices)

    monkeypatch.setattr(Feed, "_send_indices", recording)
    train(small_model, small_dataset, dataclasses.replace(CONFIG, steps_per_chunk=6))
    assert [len(set(epoch)) for epoch in seen] == [48, 48]
    assert list(seen[0]) != list(seen[1])


def test_test_images_are_not_shifted(small_model, small_dataset):
    """Evaluation inside training is the plain evaluation of the same weights."""
    last = train(small_model, small_dataset)[-1]
    graphdef, params = nnx.split(small_model)
    again = evaluate(make_count_correct(graphdef), params, small_dataset.test_images, small_dataset.test_labels)
    assert last.test == again


@pytest.mark.parametrize("batch_size", [1, 5, 22, 23, 100])
def test_every_image_is_counted_once(batch_size, small_model, small_dataset):
    graphdef, params = nnx.split(small_model)
    images, labels = small_dataset.test_images, small_dataset.test_labels
    predictions = np.asarray(small_model.encode(jnp.asarray(images) / jnp.float32(255)).activations.argmax(axis=1))
    # The last image, with which the last batch is padded, is one that the model gets right.
    labels = np.where(np.arange(len(labels)) == len(labels) - 1, predictions, labels).astype(np.int32)
    result = evaluate(make_count_correct(graphdef), params, images, labels, batch_size=batch_size)
    assert result == (np.sum(predictions == labels), 23)
    assert result.accuracy == np.mean(predictions == labels)


def test_the_callers_weights_survive_donation(small_model):
    before = to_torch(small_model)
    _, state = create_state(small_model, optax.adam(0.1))
    jax.tree.map(lambda array: array.delete(), state.params)
    np.testing.assert_array_equal(to_torch(small_model)["decoder.2.bias"], before["decoder.2.bias"])


def test_a_loss_that_is_not_finite_stops_with_its_step(small_model, small_dataset):
    config = dataclasses.replace(CONFIG, learning_rate=1e30, steps_per_chunk=3)
    with pytest.raises(NonFiniteLossError, match=r"The loss of step \d+ is (nan|inf)"):
        train(small_model, small_dataset, config)


def test_the_step_named_is_the_first_at_which_any_seed_is_wrong(small_model, small_dataset):
    trainer = Trainer(lambda seed: small_model, small_dataset, CONFIG, seeds=(7, 8, 9))
    losses = np.array([[1, 2, 3, np.inf], [1, 2, np.nan, np.nan], [1, 2, 3, 4]])
    with pytest.raises(NonFiniteLossError, match="The loss of step 42 is nan, from seed 8") as error:
        trainer._check_finite(losses, first_step=40)
    assert (error.value.seed, error.value.step) == (8, 42)
    trainer._check_finite(losses[:, :2], first_step=40)


def test_a_batch_larger_than_the_set_is_an_error(small_model, small_dataset):
    with pytest.raises(UsageError, match="batch_size is 51, with only 50 training images"):
        fit(small_model, small_dataset, dataclasses.replace(CONFIG, batch_size=51))


def test_the_last_chunk_of_an_epoch_may_be_shorter(small_model, small_dataset):
    models = [nnx.clone(small_model) for _ in range(2)]
    config = dataclasses.replace(CONFIG, warmup_steps=19)
    progress = train(models[0], small_dataset, dataclasses.replace(config, steps_per_chunk=4))
    assert [(one.epoch, one.step, one.ends_epoch) for one in progress] == [
        (1, 4, False),
        (1, 6, True),
        (2, 10, False),
        (2, 12, True),
    ]
    # The rate is that of the last step of the chunk.
    assert [one.learning_rate for one in progress] == pytest.approx([0.002, 0.003, 0.005, 0.006])
    *_, last = train(models[1], small_dataset, config)
    assert progress[-1].losses["total"] == pytest.approx(last.losses["total"], rel=1e-5)


def float64_batch() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(5)
    return jnp.asarray(rng.random((8, *IMAGE_SHAPE))), jnp.asarray(rng.integers(0, 10, 8), jnp.int32)


def in_parts(accumulate: int, *, steps: int = 2, **options) -> tuple[TrainState, np.ndarray]:
    """State and metrics after some steps with the same batch, in float64."""
    with jax.enable_x64(True):
        model = CapsNet(IMAGE_SHAPE, 10, **SMALL, **options, param_dtype="float64", rngs=nnx.Rngs(0))
        # With an epsilon that does not make much of gradients that are nearly zero.
        optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.01, eps=1e-4))
        graphdef, state = create_state(model, optimizer)
        train_step = jax.jit(make_train_step(graphdef, optimizer, accumulate=accumulate, reconstruction_weight=10.0))
        metrics = []
        for _ in range(steps):
            state, of_step = train_step(state, *float64_batch())
            metrics.append(np.stack(of_step))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("float64")}
    return state, np.stack(metrics)


@pytest.fixture(scope="module")
def in_one():
    return in_parts(1)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_a_batch_in_parts_is_the_same_batch(accumulate, in_one):
    state, metrics = in_parts(accumulate)
    expected_state, expected_metrics = in_one
    np.testing.assert_allclose(metrics, expected_metrics, rtol=1e-12)
    assert np.all(metrics[0, :3] > metrics[1, :3])
    for (path, leaf), expected in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(expected_state), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=1e-12 * np.abs(expected).max(), err_msg=str(path))


def test_the_norm_that_is_told_is_that_of_the_gradient_before_clipping(in_one):
    with jax.enable_x64(True):
        model = CapsNet(IMAGE_SHAPE, 10, **SMALL, param_dtype="float64", rngs=nnx.Rngs(0))
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


def test_batch_normalisation_sees_each_part_by_itself():
    """Its running means follow the parts one after the other; the first is every other image."""
    state, _ = in_parts(2, steps=1, batch_norm=True)
    with jax.enable_x64(True):
        model = CapsNet(IMAGE_SHAPE, 10, **SMALL, param_dtype="float64", rngs=nnx.Rngs(0))
        features = np.asarray(nnx.relu(model.encoder.stem.convolutions[0](float64_batch()[0])))
    mean, variance = np.zeros(6), np.ones(6)
    for part in (features[::2], features[1::2]):
        mean = 0.99 * mean + 0.01 * part.mean(axis=(0, 1, 2))
        variance = 0.99 * variance + 0.01 * part.var(axis=(0, 1, 2))
    norm = state.batch_stats["encoder"]["stem"]["norms"][0]
    np.testing.assert_allclose(norm["mean"][...], mean, rtol=1e-12)
    np.testing.assert_allclose(norm["var"][...], variance, rtol=1e-12)
    assert np.abs(mean - 0.01 * features.mean(axis=(0, 1, 2))).max() > 1e-4


class Evaluated:
    """Evaluates, and notes by what."""

    def __init__(self, monkeypatch):
        self.states = []

        def noting(count_correct, state, *args, **options):
            self.states.append(jax.device_get(state))
            return evaluate(count_correct, state, *args, **options)

        monkeypatch.setattr(trainer, "evaluate", noting)


def new_trainer(config: TrainingConfig, dataset=None, **options) -> Trainer:
    return Trainer(
        lambda seed: CapsNet(IMAGE_SHAPE, 10, **SMALL, **options, rngs=nnx.Rngs(seed)),
        make_small_dataset() if dataset is None else dataset,
        config,
    )


ALL_AT_ONCE = TrainingConfig(epochs=4, batch_size=50, learning_rate=0.02)  # a step is an epoch, in whatever order


def test_the_average_of_the_weights_is_evaluated_and_kept(monkeypatch):
    """In step t the factor is (1 + t) / (10 + t), and then no more than that of the config."""
    evaluated = Evaluated(monkeypatch)
    config = dataclasses.replace(ALL_AT_ONCE, ema_decay=0.2)
    averaging = new_trainer(config, batch_norm=True)
    average = jax.tree.map(np.float64, jax.device_get(averaging.snapshot.state.params))
    for decay, _ in zip((1 / 10, 2 / 11, 0.2, 0.2), averaging.run(), strict=True):
        state = jax.device_get(averaging.snapshot.state)
        average = jax.tree.map(lambda old, new, decay=decay: decay * old + (1 - decay) * new, average, state.params)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), state.average, average)
        # These, and the running means, are what is evaluated ...
        expected = nnx.merge_state(state.average, state.batch_stats)
        jax.tree.map(np.testing.assert_array_equal, evaluated.states[-1], expected)
    # ... and what is kept.
    kept = nnx.state(averaging.model(), (nnx.Param, nnx.BatchStat))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(kept), expected)
    differences = jax.tree.map(lambda one, other: np.abs(one - other).max(), state.average, state.params)
    assert min(jax.tree.leaves(differences)) > 1e-4
    assert len(evaluated.states) == 4


def test_bfloat16_is_for_training_alone(monkeypatch, small_dataset):
    """Weights and evaluation are float32; the losses fall, and begin nearly where those of float32 do."""
    evaluated = Evaluated(monkeypatch)
    config = dataclasses.replace(ALL_AT_ONCE, epochs=30, precision="bfloat16")
    rounding = new_trainer(config)
    images, labels = small_dataset.train_images / np.float32(255), small_dataset.train_labels
    exact = compute_losses(rounding.model(), jnp.asarray(images), jnp.asarray(labels), reconstruction_weight=10.0)
    losses = [progress.losses["total"] for progress in rounding.run()]
    assert losses[0] != exact.total
    assert losses[0] == pytest.approx(float(exact.total), rel=1e-2)
    assert losses[-1] < 0.7 * losses[0]
    state = rounding.snapshot.state
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, evaluated.states))} == {np.dtype("float32")}
    batch = small_dataset.test_images, small_dataset.test_labels, np.ones(23, bool)
    assert "bf16" not in str(jax.make_jaxpr(rounding._count_correct)(state.weights, *batch))
    batch = images[None], labels[None], None, jax.random.key(0)
    assert "bf16" in str(jax.make_jaxpr(rounding._train_chunk)(state, *batch))


def pairs_dataset():
    """A bright row and a bright column say the two classes of an image; the order of its labels says nothing."""
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
    """A data set, what was learnt of it, and how: after each epoch the classes of the two most active capsules."""
    dataset = pairs_dataset()
    learning = new_trainer(dataclasses.replace(CONFIG, epochs=20, reconstruction_weight=0.1), dataset)
    epochs = []
    for progress in learning.run():
        if progress.ends_epoch:
            activations = np.asarray(learning.model().encode(jnp.asarray(dataset.test_images) / 255).activations)
            epochs.append((progress, np.argsort(-activations)[:, :2].tolist()))
    return dataset, learning.model(), epochs


def test_an_image_of_two_classes_is_right_if_both_are(pairs):
    dataset, _, epochs = pairs
    half_right = 0
    for progress, predictions in epochs:
        hits = [len(set(both) & set(labels)) for both, labels in zip(predictions, dataset.test_labels, strict=True)]
        assert progress.test == (hits.count(2), 23)
        half_right += hits.count(1)
    last, _ = epochs[-1]
    assert last.test.accuracy > 0.8
    assert last.losses["accuracy"] > 0.8
    assert half_right > 23


def test_an_image_of_two_classes_is_pictured_with_a_capsule_of_each(pairs):
    """Five images, twice each; the labels of the second are changed so that one prediction, or both, are wrong."""
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
    wrong = [axis.xaxis.label.get_color() == "red" for axis in lower]
    assert wrong == [False, False, True, False, True, True, False, False, False, False]
    images = jnp.asarray(dataset.test_images) / 255
    poses = model.encode(images).poses
    for column, axes in enumerate(zip(upper, lower, strict=True)):
        image, place = divmod(column, 2)
        alone = model.decode(poses[image : image + 1], jnp.array(predictions[image][place : place + 1]))
        for axis, expected in zip(axes, (images[image], alone[0]), strict=True):
            np.testing.assert_allclose(axis.images[0].get_array(), expected[..., 0], atol=1e-6)
