"""Values and gradients of the operations, from zero to 1e15."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from capsnet_jax.ops import answers_right, capsule_norm, mask_by_label, squash, standardize, standardize_images

SCALES = [1e-30, 1e-20, 1e-10, 1e-3, 1.0, 1e3, 1e10, 1e15]
POSES = np.random.default_rng(0).normal(size=(4, 7))
POSES[3] = -np.abs(POSES[3])  # its largest component is negative


def exact_squash(poses: np.ndarray) -> np.ndarray:
    """The plain formula, which neither overflows nor underflows in float64."""
    norm = np.linalg.norm(poses, axis=-1, keepdims=True)
    return norm * poses / (1 + norm**2)


def exact_squash_pullback(poses: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(poses, axis=-1, keepdims=True)
    along = np.sum(cotangent * poses, axis=-1, keepdims=True) / norm
    return norm / (1 + norm**2) * cotangent + (1 - norm**2) / (1 + norm**2) ** 2 * along * poses


@pytest.mark.parametrize("scale", SCALES)
def test_norm_and_its_gradient_are_accurate_at_any_scale(scale):
    poses = (scale * POSES).astype(np.float32)
    norm, pull = jax.vjp(capsule_norm, jnp.asarray(poses))
    expected = np.linalg.norm(poses.astype(np.float64), axis=-1)
    np.testing.assert_allclose(norm, expected, rtol=1e-6)
    np.testing.assert_allclose(pull(jnp.ones(4))[0], poses / expected[:, None], rtol=1e-6)


@pytest.mark.parametrize("scale", SCALES)
def test_squash_and_its_gradient_are_accurate_at_any_scale(scale):
    poses = (scale * POSES).astype(np.float32)
    cotangent = np.random.default_rng(1).normal(size=poses.shape).astype(np.float32)
    squashed, pull = jax.vjp(squash, jnp.asarray(poses))
    exact = exact_squash(poses.astype(np.float64))
    exact_grad = exact_squash_pullback(poses.astype(np.float64), cotangent.astype(np.float64))
    # Below 1e-38, float32 has only zero.
    np.testing.assert_allclose(squashed, exact, rtol=2e-6, atol=1e-37)
    np.testing.assert_allclose(
        pull(jnp.asarray(cotangent))[0], exact_grad, rtol=2e-6, atol=1e-6 * np.abs(exact_grad).max()
    )


@pytest.mark.parametrize("function", [capsule_norm, squash])
def test_zero_poses_give_zero_and_zero_gradients(function):
    poses = jnp.asarray(POSES, jnp.float32).at[2].set(0)
    values, pull = jax.vjp(function, poses)
    grads = pull(jnp.ones_like(values))[0]
    assert np.all(values[2] == 0)
    assert np.all(grads[2] == 0)
    assert np.all(np.isfinite(grads))
    assert np.all(grads[jnp.array([0, 1, 3])] != 0)


@settings(deadline=None, max_examples=50)
@given(arrays(np.float32, (5,), elements=st.floats(-1e6, 1e6, width=32)))
def test_squash_shortens_and_keeps_the_direction(pose):
    squashed, norm = np.asarray(squash(jnp.asarray(pose)), np.float64), np.linalg.norm(pose.astype(np.float64))
    assert np.linalg.norm(squashed) <= 1 + 1e-6
    np.testing.assert_allclose(squashed * (1 + norm**2), pose * norm, rtol=1e-4, atol=1e-6 * norm**2 + 1e-30)


def test_mask_by_label_keeps_the_capsule_of_the_label_only():
    poses = jnp.asarray(np.random.default_rng(2).normal(size=(3, 4, 2)))
    masked = mask_by_label(poses, jnp.array([1, 3, 0]))
    for example, label in enumerate([1, 3, 0]):
        np.testing.assert_array_equal(masked[example, label], poses[example, label])
        assert np.count_nonzero(masked[example]) == 2


def test_mask_by_label_keeps_the_capsules_of_all_labels():
    poses = jnp.asarray(np.random.default_rng(2).normal(size=(3, 5, 2)))
    labels = [[4, 1], [0, 3], [2, 4]]
    masked = mask_by_label(poses, jnp.array(labels))
    for example, of_example in enumerate(labels):
        for label in range(5):
            expected = poses[example, label] if label in of_example else np.zeros(2)
            np.testing.assert_array_equal(masked[example, label], expected)


def test_answers_right_compares_the_most_active_capsule_with_the_label():
    activations = np.random.default_rng(8).uniform(size=(40, 5)).astype(np.float32)
    labels = np.random.default_rng(9).integers(0, 5, 40)
    right = answers_right(jnp.asarray(activations), jnp.asarray(labels, jnp.int32))
    expected = [
        max(range(5), key=lambda o, row=row: row[o]) == label for row, label in zip(activations, labels, strict=True)
    ]
    assert 0 < sum(expected) < 40
    np.testing.assert_array_equal(right, expected)


@pytest.mark.parametrize("num_labels", [2, 3])
def test_answers_right_needs_all_of_several_labels(num_labels):
    rng = np.random.default_rng(num_labels)
    # Few different values, so that there are ties.
    activations = rng.integers(0, 4, (200, 4)) / 4
    labels = np.stack([rng.permutation(4)[:num_labels] for _ in range(200)])
    right = answers_right(jnp.asarray(activations, jnp.float32), jnp.asarray(labels, jnp.int32))
    expected, partly = [], 0
    for row, of_example in zip(activations, labels, strict=True):
        ranking = sorted(range(4), key=lambda o, row=row: (-row[o], o))
        hits = sum(int(label in ranking[:num_labels]) for label in of_example)
        expected.append(hits == num_labels)
        partly += 0 < hits < num_labels
    assert 0 < sum(expected) < 200
    assert partly > 0
    np.testing.assert_array_equal(right, expected)


def test_answers_right_resolves_ties_by_class_index():
    even = jnp.full((4, 4), 0.5)
    np.testing.assert_array_equal(answers_right(even, jnp.array([0, 1, 2, 3])), [True, False, False, False])
    labels = jnp.array([[1, 0], [0, 2], [2, 3], [0, 1]])
    np.testing.assert_array_equal(answers_right(even, labels), [True, False, False, True])


def test_each_image_is_standardized_separately():
    """Compared with explicit loops, for images with full contrast, with almost none, and with none."""
    images = np.random.default_rng(10).random((3, 4, 5, 2)).astype(np.float32)
    images[1] = 0.5 + 0.01 * images[1]
    images[2] = 0.25
    standardized, pull = jax.vjp(standardize_images, jnp.asarray(images))
    for image, ours in zip(images.astype(np.float64), standardized, strict=True):
        mean = sum(image.flat) / 40
        deviation = (sum((pixel - mean) ** 2 for pixel in image.flat) / 40) ** 0.5
        np.testing.assert_allclose(ours, (image - mean) / max(deviation, 40**-0.5), atol=1e-5)
    np.testing.assert_array_equal(standardized[2], 0)
    np.testing.assert_allclose([standardized[0].std(), standardized[1].std() < 0.1], [1, True], rtol=1e-5)
    assert np.all(np.isfinite(pull(jnp.asarray(np.random.default_rng(11).normal(size=images.shape), jnp.float32))[0]))


def test_standardize_is_accurate_far_from_zero():
    """The variance as a difference of two means would be off by a tenth here."""
    values = 1000 + np.random.default_rng(6).normal(size=(3, 7))
    values = values.astype(np.float32)
    exact = values.astype(np.float64)
    centered = exact - exact.mean(axis=1, keepdims=True)
    expected = centered / np.sqrt((centered**2).mean(axis=1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(standardize(jnp.asarray(values)), expected, atol=1e-3)
