"""Evaluation against counts in plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from capsnet_jax import CapsNet, UsageError
from capsnet_jax.ops import to_unit_range
from capsnet_jax.train import evaluation
from capsnet_jax.train.evaluation import (
    Evaluation,
    Predictions,
    evaluate,
    mean_coupling_entropy,
    predict,
    score,
)
from tests.conftest import IMAGE_SHAPE, SMALL


def random_answers(k):
    """Activations with many ties for 6 classes: class 5 has no images, and class 4 is never predicted."""
    rng = np.random.default_rng(k)
    activations = np.round(rng.uniform(0, 1, (40, 6)), 1).astype(np.float32)
    activations[:, 4] = 0
    labels = np.array([rng.permutation(5)[:k] for _ in range(40)], np.int32)
    activations[np.arange(20)[:, None], labels[:20]] += 0.3
    return activations, labels[:, 0] if k == 1 else labels


def k_best(activations, k):
    """The k most active classes; the first of equal ones."""
    return {sorted(range(len(activations)), key=lambda o: (-activations[o], o))[place] for place in range(k)}


@pytest.mark.parametrize("k", [1, 2])
def test_score_equals_counts_in_plain_loops(k):
    activations, labels = random_answers(k)
    errors = np.random.default_rng(9).uniform(0, 1, 40).astype(np.float32)
    result = score(Predictions(activations, errors), labels)
    confusion = np.zeros((6, 6), int)
    correct, hits, counts, predicted = 0, [0] * 6, [0] * 6, [0] * 6
    right, runners_up = [], []
    for row, label in zip(activations, labels, strict=True):
        true, best = set(np.atleast_1d(label).tolist()), k_best(row, k)
        correct += true == best
        for o in range(6):
            hits[o] += o in true and o in best
            counts[o] += o in true
            predicted[o] += o in best
        right += [row[o] for o in true]
        runners_up.append(max(row[o] for o in range(6) if o not in true))
        if k == 1:
            confusion[min(true), min(best)] += 1
    assert 0 < correct < 40
    assert (counts[5], predicted[4]) == (0, 0)
    assert (result.num_correct, result.num_images, result.counts) == (correct, 40, tuple(counts))
    assert result.accuracy == correct / 40
    assert result.precision == tuple(h / p if p else None for h, p in zip(hits, predicted, strict=True))
    assert result.recall == tuple(h / c if c else None for h, c in zip(hits, counts, strict=True))
    assert result.right_activation == pytest.approx(np.mean(right), rel=1e-6)
    assert result.runner_up_activation == pytest.approx(np.mean(runners_up), rel=1e-6)
    assert result.reconstruction_error == pytest.approx(np.mean(errors), rel=1e-6)
    if k == 1:
        np.testing.assert_array_equal(result.confusion, confusion)
    else:
        assert result.confusion is None


def test_fields_that_do_not_apply_are_none():
    result = score(Predictions(np.array([[0.25, 0.5]], np.float32), None), np.array([[1, 0]], np.int32))
    assert (result.right_activation, result.runner_up_activation, result.reconstruction_error) == (0.375, None, None)
    assert result.num_correct == 1


@pytest.mark.parametrize("k", [1, 2])
def test_predict_equals_the_model_for_every_image(small_model, k):
    """23 images in batches of 7: the last batch is padded."""
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (23, *IMAGE_SHAPE), dtype=np.uint8)
    labels = np.array([rng.permutation(10)[:k] for _ in images], np.int32)
    got = predict(small_model, images, labels[:, 0] if k == 1 else labels, batch_size=7)
    unit = images.astype(np.float32) / 255
    capsules = nnx.jit(lambda model, images: model.encode(images))(small_model, unit)
    poses = np.zeros_like(capsules.poses)
    for n, of_image in enumerate(labels):
        poses[n, of_image] = capsules.poses[n, of_image]
    reconstructions = np.asarray(nnx.jit(lambda model, poses: model.decoder(poses))(small_model, poses))
    np.testing.assert_allclose(got.activations, capsules.activations, rtol=1e-5)
    np.testing.assert_allclose(got.reconstruction_errors, ((reconstructions - unit) ** 2).mean((1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((0, *IMAGE_SHAPE), np.uint8), "There are no images"),
        (
            np.full((2, *IMAGE_SHAPE), 255.0, np.float32),
            r"from 255\.0 to 255\.0; expected uint8, or floats in \[0, 1\]",
        ),
        (np.full((2, *IMAGE_SHAPE), np.nan, np.float32), "from nan to nan"),
        (np.zeros((2, 9, 12, 1), np.uint8), r"\(9, 12, 1\), and the model was made for \(9, 11, 1\)"),
    ],
)
def test_images_that_do_not_fit_raise(images, message, small_model):
    with pytest.raises(UsageError, match=message):
        predict(small_model, images)


def test_without_a_decoder_there_is_no_reconstruction_error():
    model = CapsNet(IMAGE_SHAPE, 10, **{**SMALL, "decoder_hidden": None}, rngs=nnx.Rngs(0))
    images = np.zeros((2, *IMAGE_SHAPE), np.uint8)
    assert evaluate(model, images, np.zeros(2, np.int32)).reconstruction_error is None


@pytest.mark.parametrize("batch_size", [5, 100, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (1, 22, 23))])
def test_every_image_is_counted_once(batch_size, small_model, small_dataset):
    images, labels = small_dataset.test_images, small_dataset.test_labels
    encode = nnx.jit(lambda model, images: model.encode(images))
    predictions = np.asarray(encode(small_model, images / np.float32(255)).activations.argmax(axis=1))
    # The last image, with which the last batch is padded, is one that the model gets right.
    labels = np.where(np.arange(len(labels)) == len(labels) - 1, predictions, labels).astype(np.int32)
    result = evaluate(small_model, images, labels, batch_size=batch_size)
    assert result[:2] == (np.sum(predictions == labels), 23)
    assert result.accuracy == np.mean(predictions == labels)
    assert result.reconstruction_error > 0.01
    if batch_size == 5:
        without = evaluate(small_model, images, labels, batch_size=batch_size, reconstruct=False)
        assert without == result._replace(reconstruction_error=None)


@pytest.mark.parametrize("batch_size", [7, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (1, 23, 250))])
def test_mean_coupling_entropy_equals_plain_loops(batch_size, small_dataset):
    """Dynamic routing, in batches of which the last is padded."""
    model = CapsNet(IMAGE_SHAPE, 10, **SMALL, rngs=nnx.Rngs(0))
    weight = model.capsule_layers[-1].weight
    weight[...] = 30 * weight[...]  # so that couplings are far from even
    images = small_dataset.test_images
    couplings = np.float64(jax.jit(model.route)(to_unit_range(jnp.asarray(images)))[-1].couplings)
    expected = np.mean([[-(row * np.log(row)).sum() / np.log(10) for row in image] for image in couplings])
    assert 0.1 < expected < 0.99
    assert mean_coupling_entropy(model, images, batch_size=batch_size) == pytest.approx(expected, rel=1e-5)


def test_models_with_other_weights_share_one_compiled_program(small_dataset, monkeypatch):
    """It also serves the last batch, which is padded."""
    evaluation._compiled.cache_clear()
    shapes = []

    def noting(images):
        shapes.append(images.shape)
        return to_unit_range(images)

    monkeypatch.setattr(evaluation, "to_unit_range", noting)
    answers = [
        evaluate(CapsNet(IMAGE_SHAPE, 10, **SMALL, rngs=nnx.Rngs(seed)), *small_dataset[2:4], batch_size=5)
        for seed in (0, 1)
    ]
    assert shapes == [(5, *IMAGE_SHAPE)]
    assert answers[0] != answers[1]


def of_counts(num_correct: int, num_images: int) -> Evaluation:
    """An evaluation of which only these counts matter."""
    return Evaluation(num_correct, num_images, (), (), (), None, 0.0, None, None)


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_equals_published_values(correct, total, low, high):
    """Newcombe, "Two-sided confidence intervals for the single proportion" (1998), table I, method 3."""
    evaluation = of_counts(correct, total)
    assert evaluation.interval == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    mirrored = of_counts(total - correct, total)
    assert mirrored.interval == (pytest.approx(1 - high, abs=5e-5), pytest.approx(1 - low, abs=5e-5))


def test_the_interval_equals_that_of_scipy():
    from scipy.stats import binomtest  # takes seconds to import

    rng = np.random.default_rng(11)
    totals = [*rng.integers(1, 70_000, 60).tolist(), 1, 2, 60_000]
    counts = [(int(rng.integers(0, total + 1)), total) for total in totals] + [(0, 1), (0, 355), (9, 9), (10**7, 10**7)]
    for correct, total in counts:
        expected = binomtest(correct, total).proportion_ci(0.95, method="wilson")
        np.testing.assert_allclose(of_counts(correct, total).interval, expected, rtol=0, atol=1e-12)


def test_the_interval_stays_within_0_and_1():
    for total in (1, 2, 7, 30, 399):
        low, high = of_counts(0, total).interval
        assert low == pytest.approx(0, abs=1e-15)
        assert 0 <= low < high < 1
        low, high = of_counts(total, total).interval
        assert 0 < low < high <= 1
