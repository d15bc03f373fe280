"""Data sets of arrays: checks, limits, validation splits and crops."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from capsnet_jax import UsageError
from capsnet_jax.data import Dataset, central_crop, make_dataset
from capsnet_jax.ops import to_unit_range

IMAGES, LABELS = np.zeros((4, 5, 6, 1), np.float32), np.array([0, 1, 2, 1])
PAIRS = np.array([[0, 1], [1, 2], [2, 1], [0, 2]])
WRONG = {
    "nan": ({"train_images": np.where(IMAGES == 0, np.nan, IMAGES)}, "training images are from nan"),
    "range": ({"test_images": IMAGES + 255}, "test images are from 255.0 to 255.0"),
    "label": ({"test_labels": LABELS + 1}, "test labels are 1 to 3; expected 0 to 2"),
    "negative label": ({"train_labels": LABELS - 1}, "training labels are -1 to 1"),
    "float labels": ({"train_labels": LABELS / 2}, "training labels are float64"),
    "count": ({"test_labels": LABELS[:3]}, r"test labels are \(3,\) for 4 images"),
    "shape": ({"test_images": IMAGES[:, :4]}, r"test images are \(4, 4, 6, 1\)"),
    "no channels": ({"train_images": IMAGES[..., 0]}, r"training images are \(4, 5, 6\)"),
    "dtype": ({"test_images": IMAGES.astype(np.int64)}, "test images are int64"),
    "dtypes": ({"test_images": IMAGES.astype(np.uint8)}, "test images are uint8; .* the same in both splits"),
    "no pixels": ({"train_images": IMAGES[:, :0]}, r"training images are \(4, 0, 6, 1\)"),
    "three axes": ({"train_labels": PAIRS[..., None]}, r"training labels are \(4, 2, 1\) for 4 images"),
    "lists of one": ({"train_labels": PAIRS[:, :1]}, r"training labels are \(4, 1\) for 4 images"),
    "two and one": ({"train_labels": PAIRS}, r"test labels are \(4,\); expected as many for each image"),
    "a class twice": (
        {"train_labels": PAIRS, "test_labels": np.array([[0, 1], [1, 2], [2, 2], [0, 0]])},
        "test labels give image 2 the class '2' twice; expected different",
    ),
    "none": ({"test_images": IMAGES[:0], "test_labels": LABELS[:0]}, "for 0 images"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_invalid_arrays_raise(change, message):
    arrays = {"train_images": IMAGES, "train_labels": LABELS, "test_images": IMAGES, "test_labels": LABELS}
    make_dataset(**arrays, num_classes=3)
    with pytest.raises(UsageError, match=message):
        make_dataset(**(arrays | change), num_classes=3)


def test_a_data_set_for_evaluation_only_has_no_training_images():
    dataset = make_dataset(IMAGES[:0], LABELS[:0], IMAGES, LABELS, num_classes=3)
    assert (len(dataset.train_images), len(dataset.train_labels)) == (0, 0)
    np.testing.assert_array_equal(dataset.test_labels, LABELS)
    with pytest.raises(UsageError, match=r"test images are \(4, 4, 6, 1\); expected .* of one size in both splits"):
        make_dataset(IMAGES[:0], LABELS[:0], IMAGES[:, :4], LABELS, num_classes=3)


def test_transposed_images_have_swapped_rows_and_columns():
    dataset = numbered_dataset(LABELS, 3)._replace(test_images=np.arange(80).reshape(1, 5, 8, 2))
    for whole in (dataset, dataset.with_validation(0.5)):
        swapped = whole.transposed()
        assert swapped.image_shape == (8, 5, 2)
        assert swapped.test_images[0, 6, 3, 1] == whole.test_images[0, 3, 6, 1]
        assert (swapped.validation_images is None) == (whole.validation_images is None)
        np.testing.assert_array_equal(swapped.transposed().train_images, whole.train_images)


def test_several_labels_per_image_are_kept():
    dataset = make_dataset(IMAGES, PAIRS, IMAGES, PAIRS[::-1], num_classes=3)
    np.testing.assert_array_equal(dataset.train_labels, [[0, 1], [1, 2], [2, 1], [0, 2]])
    assert dataset.test_labels.dtype == np.int32


def test_lists_are_arrays_too():
    expected = make_dataset(IMAGES, LABELS, IMAGES, LABELS, num_classes=3)
    dataset = make_dataset(IMAGES.tolist(), [0, 1, 2, 1], IMAGES.tolist(), LABELS.tolist(), num_classes=3)
    assert dataset.checksum() == expected.checksum()
    assert dataset.train_images.dtype == np.float32


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "\udcff"])
def test_a_class_name_that_run_folders_could_not_be_read_with_raises(name):
    with pytest.raises(UsageError, match=rf"A class is called {re.escape(ascii(name))}; expected .* printable"):
        make_dataset(IMAGES, LABELS, IMAGES, LABELS, num_classes=3, class_names=["ant", name, "cat"])


def test_class_names_are_numbers_by_default():
    arrays = IMAGES, LABELS, IMAGES, LABELS
    assert make_dataset(*arrays, num_classes=3).class_names == ("0", "1", "2")
    named = make_dataset(*arrays, num_classes=3, class_names=["ant", "bee", "cat"])
    assert (named.class_names, named.num_classes) == (("ant", "bee", "cat"), 3)
    for names in (["ant", "bee"], ["ant", "bee", "ant"]):
        with pytest.raises(UsageError, match=f"{', '.join(names)}; expected 3 different"):
            make_dataset(*arrays, num_classes=3, class_names=names)
    with pytest.raises(UsageError, match="number of classes is 1, and must be at least 2"):
        make_dataset(IMAGES, LABELS * 0, IMAGES, LABELS * 0, num_classes=1)


def numbered_dataset(labels, num_classes) -> Dataset:
    """A data set whose training images are filled with their numbers."""
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None] + np.zeros((5, 8, 2), np.uint8)
    return make_dataset(images, labels, images[:1] + 100, labels[:1], num_classes=num_classes)


def test_the_validation_split_is_stratified_and_disjoint_from_the_training_images():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), [20, 10, 20, 30]))
    dataset = numbered_dataset(labels, 4)
    split = dataset.with_validation(0.2)
    train, validation = split.train_images[:, 0, 0, 0], split.validation_images[:, 0, 0, 0]
    assert sorted([*train, *validation]) == list(range(80))
    np.testing.assert_array_equal(np.bincount(split.validation_labels), [4, 2, 4, 6])
    np.testing.assert_array_equal(split.validation_labels, labels[validation])
    np.testing.assert_array_equal(split.train_labels, labels[train])
    np.testing.assert_array_equal(validation, dataset.with_validation(0.2).validation_images[:, 0, 0, 0])
    assert (np.diff(train.astype(int)) > 0).all()
    np.testing.assert_array_equal(split.test_images, dataset.test_images)
    np.testing.assert_array_equal(split.test_labels, dataset.test_labels)


def test_the_choice_of_validation_images_never_changes():
    """Or else a run that is resumed with another version would be validated on images that it was trained on."""
    dataset = numbered_dataset(np.repeat([0, 1, 2], [9, 6, 3]), 3)
    assert dataset.with_validation(1 / 3).validation_images[:, 0, 0, 0].tolist() == [0, 2, 6, 11, 14, 17]


def test_held_out_images_are_chosen_at_random():
    held_out = numbered_dataset(np.repeat([0, 1], 30), 2).with_validation(0.2).validation_images[:, 0, 0, 0]
    assert len(set(np.diff(held_out.astype(int)))) > 3


@pytest.mark.parametrize(("fraction", "expected"), [(0.05, 1), (0.1, 2), (0.29, 7), (0.96, 23)])
def test_the_size_of_the_validation_split_is_rounded_to_the_nearest_image(fraction, expected):
    split = numbered_dataset(np.arange(24) % 13, 13).with_validation(fraction)
    assert (len(split.validation_images), len(split.train_images)) == (expected, 24 - expected)


def test_validation_images_may_have_several_labels():
    pairs = np.stack([np.arange(30) % 5, 5 + np.arange(30) % 3], axis=1)
    split = numbered_dataset(pairs, 8).with_validation(0.3)
    np.testing.assert_array_equal(split.validation_labels, pairs[split.validation_images[:, 0, 0, 0]])
    assert len(split.validation_labels) == 9


def test_no_validation_split_changes_nothing():
    dataset = numbered_dataset(LABELS, 3)
    assert dataset.with_validation(0.0) is dataset
    assert dataset.validation_images is None
    assert dataset.validation_labels is None


@pytest.mark.parametrize(
    ("fraction", "message"),
    [
        (0.1, "makes 0 of 4 training images"),
        (0.9, "makes 4 of 4 training images"),
        (1.0, "must be at least 0 and less than 1"),
        (-0.1, "must be at least 0 and less than 1"),
        (float("nan"), "must be at least 0 and less than 1"),
    ],
)
def test_an_empty_split_raises(fraction, message):
    with pytest.raises(UsageError, match=f"validation is {fraction}.*{message}"):
        numbered_dataset(LABELS, 3).with_validation(fraction)


def test_test_and_validation_images_are_cut_to_their_centres_and_training_images_are_not():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 9, 12, 2), dtype=np.uint8)
    labels = np.arange(20) % 2
    whole = make_dataset(images, labels, images[::-1], labels, num_classes=2).with_validation(0.25)
    cut = whole.cropped(6)
    np.testing.assert_array_equal(cut.test_images, images[::-1, 1:7, 3:9])
    np.testing.assert_array_equal(cut.validation_images, whole.validation_images[:, 1:7, 3:9])
    np.testing.assert_array_equal(cut.train_images, whole.train_images)
    assert cut.image_shape == (6, 6, 2)
    assert whole.cropped(None) is whole
    assert whole._replace(validation_images=None).cropped(6).validation_images is None


@pytest.mark.parametrize("side", [10, 0, -1])
def test_a_crop_larger_than_the_images_raises(side):
    with pytest.raises(UsageError, match=f"crop is {side} x {side}; expected 1 to 9, of 9 x 12"):
        central_crop(np.zeros((3, 9, 12, 1), np.uint8), side)


def test_a_limit_larger_than_the_data_set_raises(small_dataset):
    np.testing.assert_array_equal(small_dataset.limited(7).train_labels, small_dataset.train_labels[:7])
    with pytest.raises(UsageError, match="train_limit is 51, with only 50 training images"):
        small_dataset.limited(51)


def test_bytes_become_floats_and_floats_stay():
    floats = to_unit_range(jnp.array([0, 51, 255], jnp.uint8).reshape(1, 1, 3, 1))
    np.testing.assert_allclose(floats.ravel(), [0, 0.2, 1], rtol=1e-6)
    assert to_unit_range(floats) is floats
