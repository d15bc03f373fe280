"""Data sets made from MNIST, against plain loops."""

import zlib
from pathlib import Path

import numpy as np
import pytest

from capsnet_jax import UsageError
from capsnet_jax.data import Dataset, load_dataset, make_dataset
from capsnet_jax.data.synthetic import affine_images, mapped_image, overlapping_pairs, random_matrices
from tests.conftest import write_idx_folder


def tiny_mnist() -> Dataset:
    """Sparse random images with empty margins, as in MNIST, from a generator that NumPy never changes."""
    rng = np.random.RandomState(3)
    splits = []
    for labels in ([7, 0, 0, 3, 9, 7, 0, 3, 3, 0, 7, 9], [2, 2, 5, 2, 8, 5, 2]):
        images = np.zeros((len(labels), 28, 28, 1), np.uint8)
        images[:, 4:24, 4:24] = rng.randint(60, 256, (len(labels), 20, 20, 1)) * (
            rng.rand(len(labels), 20, 20, 1) < 0.1
        )
        splits += [images, np.array(labels)]
    return make_dataset(*splits, num_classes=10)


@pytest.fixture(scope="module")
def mnist() -> Dataset:
    return tiny_mnist()


@pytest.fixture(scope="module")
def mnist_folder(tmp_path_factory, mnist) -> Path:
    return write_idx_folder(tmp_path_factory.mktemp("mnist") / "idx", mnist)


@pytest.fixture(scope="module")
def multi(mnist_folder) -> Dataset:
    return load_dataset("multi_mnist", mnist_folder)


@pytest.fixture(scope="module")
def affine(mnist_folder) -> Dataset:
    return load_dataset("affine_mnist", mnist_folder)


def padded_and_shifted(image, down, right):
    padded = np.zeros((36, 36), np.uint8)
    for row in range(28):
        for column in range(28):
            if 0 <= row + 4 + down < 36 and 0 <= column + 4 + right < 36:
                padded[row + 4 + down, column + 4 + right] = image[row, column, 0]
    return padded


OFFSETS = [(down, right) for down in range(-6, 7) for right in range(-6, 7)]


@pytest.mark.parametrize("split", ["train", "test"])
def test_each_image_is_overlaid_with_one_of_another_class_both_padded_and_shifted(split, mnist, multi):
    images, labels = (mnist.train_images, mnist.train_labels) if split == "train" else mnist[2:4]
    pairs, pair_labels = (multi.train_images, multi.train_labels) if split == "train" else multi[2:4]
    assert pairs.shape == (len(images), 36, 36, 1)
    np.testing.assert_array_equal(pair_labels[:, 0], labels)
    assert (pair_labels[:, 1] != labels).all()
    shifted = [[padded_and_shifted(image, *offset) for offset in OFFSETS] for image in images]
    for number, (pair, (_, second_label)) in enumerate(zip(pairs[..., 0], pair_labels, strict=True)):
        below = [candidate for candidate in shifted[number] if (candidate <= pair).all()]
        above = [
            candidate
            for second in np.flatnonzero(labels == second_label)
            for candidate in shifted[second]
            if (candidate <= pair).all()
        ]
        sums = [np.minimum(one.astype(int) + other, 255) for one in below for other in above]
        assert any((pair == total).all() for total in sums)


def test_offsets_and_other_classes_are_drawn_uniformly():
    labels = np.arange(6000) % 5
    images = np.zeros((6000, 28, 28, 1), np.uint8)
    images[:, 10, 12, 0] = labels + 1
    pairs, pair_labels = overlapping_pairs(images, labels, np.random.RandomState(5))
    apart = [(pair[..., 0], both) for pair, both in zip(pairs, pair_labels, strict=True) if (pair > 0).sum() == 2]
    for which in (0, 1):
        places = np.array([np.argwhere(pair == both[which] + 1)[0] for pair, both in apart])
        offsets, counts = np.unique(places - (10 + 4, 12 + 4), axis=0, return_counts=True)
        np.testing.assert_array_equal(offsets, OFFSETS)
        assert 10 < counts.min() < counts.max() < 70  # 35 each
    first, second = np.array([both for _, both in apart]).T
    counts = np.histogram2d(first, second, bins=5)[0]
    assert (np.diag(counts) == 0).all()
    assert 200 < counts[~np.eye(5, dtype=bool)].min() < counts.max() < 400  # 300 each


def test_images_of_other_classes_are_drawn_uniformly():
    labels = np.array([4, 0, 0, 7, 4, 0])
    images = np.zeros((6, 28, 28, 1), np.uint8)
    images[:, 10, 12, 0] = 1 << np.arange(6)
    counts = np.zeros((6, 6), int)
    for seed in range(300):
        pairs, _ = overlapping_pairs(images, labels, np.random.RandomState(seed))
        drawn = np.bitwise_or.reduce(pairs, axis=(1, 2, 3)) - (1 << np.arange(6))
        counts[np.arange(6), np.log2(drawn).astype(int)] += 1
    for number in range(6):
        others = np.flatnonzero(labels != labels[number])
        np.testing.assert_allclose(counts[number, others], 300 / len(others), atol=45)  # 5 deviations
        assert counts[number].sum() == counts[number, others].sum()


def test_pixels_shifted_out_of_the_image_are_lost():
    labels = np.arange(400) % 2
    pairs, pair_labels = overlapping_pairs(
        np.ones((400, 28, 28, 1), np.uint8) << labels[:, None, None, None].astype(np.uint8),
        labels,
        np.random.RandomState(0),
    )
    boxes = {padded_and_shifted(np.ones((28, 28, 1)), *offset).tobytes() for offset in OFFSETS}
    for which in (0, 1):
        found = (pairs[..., 0] >> pair_labels[:, which, None, None].astype(np.uint8)) & 1
        assert {box.tobytes() for box in found} <= boxes
        assert found.sum(axis=(1, 2)).min() == 26 * 26


def test_the_data_sets_are_the_same_on_every_machine(multi, affine, mnist_folder):
    assert zlib.crc32(multi.train_images.tobytes()) == 885522605
    assert zlib.crc32(multi.test_images.tobytes()) == 1019037818
    again = load_dataset("affine_mnist", mnist_folder)
    np.testing.assert_array_equal(again.test_images, affine.test_images)


def test_affine_mnist_has_padded_training_images(mnist, affine):
    assert affine.image_shape == (40, 40, 1)
    np.testing.assert_array_equal(affine.train_images[:, 6:34, 6:34], mnist.train_images)
    assert affine.train_images.sum() == mnist.train_images.sum()
    np.testing.assert_array_equal(affine.train_labels, mnist.train_labels)
    np.testing.assert_array_equal(affine.test_labels, mnist.test_labels)
    assert affine.class_names == mnist.class_names == tuple("0123456789")


def test_an_affine_map_is_bilinear_about_the_centre():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (7, 10), dtype=np.uint8)
    matrix = np.array([[0.9, 0.3], [-0.4, 1.2]])
    mapped = mapped_image(image, matrix, 13)
    for row in range(13):
        for column in range(13):
            source_row, source_column = np.linalg.solve(matrix, [row - 6, column - 6]) + np.array([3, 4.5])
            expected = sum(
                max(0, 1 - abs(source_row - r)) * max(0, 1 - abs(source_column - c)) * float(image[r, c])
                for r in range(7)
                for c in range(10)
            )
            assert abs(mapped[row, column] - expected) <= 0.5 + 1e-9
    assert len(np.unique(mapped)) > 50


def test_identity_quarter_turn_and_shear():
    image = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    np.testing.assert_array_equal(mapped_image(image, np.eye(2), 12), np.pad(image, 2))
    quarter = np.array([[0.0, -1.0], [1.0, 0.0]])  # (row, column) to (-column, row)
    np.testing.assert_array_equal(mapped_image(image, quarter, 8), np.rot90(image))
    sheared = mapped_image(image, np.array([[1.0, 0.0], [2.0, 1.0]]), 30)
    for row in range(8):
        start = 11 + 2 * row - 7
        np.testing.assert_array_equal(sheared[11 + row, start : start + 8], image[row])


def test_affine_maps_are_drawn_uniformly_from_their_ranges():
    matrices = random_matrices(3000, np.random.RandomState(0))
    angle = np.arctan2(-matrices[:, 0, 1], matrices[:, 1, 1])
    horizontal = np.hypot(matrices[:, 0, 1], matrices[:, 1, 1])
    back = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    vertical, sheared = np.einsum("abn,nb->an", back, matrices[:, :, 0])
    for drawn, low, high in (
        (np.rad2deg(angle), -20, 20),
        (sheared / vertical, -0.2, 0.2),
        (vertical, 0.8, 1.2),
        (horizontal, 0.8, 1.2),
    ):
        assert low <= drawn.min() < low + 0.01 * (high - low)
        assert high >= drawn.max() > high - 0.01 * (high - low)
        np.testing.assert_allclose(drawn.mean(), (low + high) / 2, atol=0.03 * (high - low))
    parameters = np.corrcoef([angle, sheared / vertical, vertical, horizontal])
    np.testing.assert_allclose(parameters, np.eye(4), atol=0.06)


def without_margins(image):
    rows, columns = np.nonzero(image)
    return image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def test_each_test_image_is_a_whole_digit_under_its_own_map(mnist):
    digits = np.repeat(mnist.test_images, 20, axis=0)
    images = affine_images(digits, np.random.RandomState(4))
    matrices = random_matrices(len(digits), np.random.RandomState(4))  # drawn before anything else
    corners = []
    for digit, matrix, image in zip(digits[..., 0], matrices, images[..., 0], strict=True):
        np.testing.assert_array_equal(without_margins(image), without_margins(mapped_image(digit, matrix, 80)))
        corners.append(np.argwhere(image).min(axis=0))
    assert len({tuple(corner) for corner in corners}) > 70


def test_a_digit_is_placed_wherever_it_fits():
    images = np.zeros((2000, 28, 28, 1), np.uint8)
    images[:, 11:17, 12:16] = 255
    moved = affine_images(images, np.random.RandomState(0))
    occupied = (moved > 0).mean(axis=0)[..., 0]
    for margin in (occupied[0], occupied[-1], occupied[:, 0], occupied[:, -1]):
        assert margin.sum() > 0.05
    first_rows, first_columns = (np.argmax((moved > 0).any(axis=axis)[..., 0], axis=1) for axis in (2, 1))
    assert set(range(30)) <= set(first_rows.tolist())
    assert set(range(30)) <= set(first_columns.tolist())
    assert abs(np.corrcoef(first_rows, first_columns)[0, 1]) < 0.06


def test_an_empty_image_stays_empty():
    assert affine_images(np.zeros((3, 28, 28, 1), np.uint8), np.random.RandomState(0)).sum() == 0


def test_a_digit_that_does_not_fit_raises():
    with pytest.raises(UsageError, match=r"Test image \d+ of affine_mnist has a digit of \d+ x \d+ .* 40 x 40"):
        affine_images(np.full((60, 28, 28, 1), 9, np.uint8), np.random.RandomState(0))


@pytest.mark.parametrize("name", ["multi_mnist", "affine_mnist"])
def test_images_of_another_size_raise(name, idx_folder):
    with pytest.raises(UsageError, match=rf"{name} is made from images of \(28, 28, 1\); mnist has \(9, 11, 1\)"):
        load_dataset(name, idx_folder)


def test_a_single_class_raises(tmp_path, mnist):
    folder = write_idx_folder(tmp_path / "idx", mnist._replace(test_labels=np.full(7, 6)))
    with pytest.raises(UsageError, match="All images of a split are of class 6; expected a second class"):
        load_dataset("multi_mnist", folder)
