"""Data sets from .npz files, and the errors for invalid or damaged files."""

import io
import re
import zipfile

import numpy as np
import pytest

from capsnet_jax import UsageError
from capsnet_jax.data import load_dataset

RNG = np.random.default_rng(0)
ARRAYS = {
    "x_train": RNG.integers(0, 256, (6, 5, 7), dtype=np.uint8),
    "y_train": np.array([30, -1, 4, 4, 30, -1]),
    "x_test": RNG.integers(0, 256, (3, 5, 7), dtype=np.uint8),
    "y_test": np.array([9, -1, 30], np.int8),
}


def save(folder, **changes) -> str:
    path = folder / "mine.npz"
    np.savez_compressed(path, **{name: array for name, array in (ARRAYS | changes).items() if array is not None})
    return str(path)


def test_grey_images_with_any_integers_as_labels(tmp_path):
    dataset = load_dataset(save(tmp_path))
    np.testing.assert_array_equal(dataset.train_images, ARRAYS["x_train"][..., None])
    np.testing.assert_array_equal(dataset.test_images, ARRAYS["x_test"][..., None])
    assert dataset.class_names == ("-1", "4", "9", "30")
    np.testing.assert_array_equal(dataset.train_labels, [3, 0, 1, 1, 3, 0])
    np.testing.assert_array_equal(dataset.test_labels, [2, 0, 3])


def test_colour_images_as_floats_with_strings_as_labels(tmp_path):
    images = RNG.random((6, 5, 7, 3))
    labels = np.array(["cow", "ant", "bee", "bee", "cow", "ant"])
    dataset = load_dataset(save(tmp_path, x_train=images, y_train=labels, x_test=images[:2], y_test=labels[2:4]))
    np.testing.assert_array_equal(dataset.train_images, images.astype(np.float32))
    assert dataset.test_images.dtype == np.float32
    assert dataset.class_names == ("ant", "bee", "cow")
    np.testing.assert_array_equal(dataset.train_labels, [2, 0, 1, 1, 2, 0])
    np.testing.assert_array_equal(dataset.test_labels, [1, 1])


def test_without_training_arrays_the_test_images_can_be_loaded(tmp_path):
    path = save(tmp_path, x_train=None, y_train=None)
    with pytest.raises(UsageError, match="lacks the array x_train"):
        load_dataset(path)
    dataset = load_dataset(path, test_only=True)
    assert dataset.class_names == ("-1", "9", "30")
    np.testing.assert_array_equal(dataset.test_images, ARRAYS["x_test"][..., None])
    np.testing.assert_array_equal(dataset.test_labels, [1, 0, 2])
    assert (dataset.train_images.shape, dataset.train_labels.shape) == ((0, 5, 7, 1), (0,))
    pairs = np.array([[8, 3], [3, 5], [5, 8]])
    dataset = load_dataset(save(tmp_path, x_train=None, y_train=None, y_test=pairs), test_only=True)
    np.testing.assert_array_equal(dataset.test_labels, [[2, 0], [0, 1], [1, 2]])
    with pytest.raises(UsageError, match=r"lacks the array y_test; expected x_test, y_test, found x_test"):
        load_dataset(save(tmp_path, x_train=None, y_train=None, y_test=None), test_only=True)
    with pytest.raises(UsageError, match=r"The labels y_test in .*npz are all \[9\]; expected two"):
        load_dataset(save(tmp_path, y_test=np.full(3, 9)), test_only=True)


def test_several_labels_per_image(tmp_path):
    pairs = np.array([[8, 3], [3, 5], [5, 8], [8, 5], [3, 8], [5, 3]], np.uint64)
    dataset = load_dataset(save(tmp_path, y_train=pairs, y_test=pairs[:3].astype(np.int64)))
    assert dataset.class_names == ("3", "5", "8")
    np.testing.assert_array_equal(dataset.train_labels, [[2, 0], [0, 1], [1, 2], [2, 1], [0, 2], [1, 0]])
    np.testing.assert_array_equal(dataset.test_labels, [[2, 0], [0, 1], [1, 2]])


def test_a_column_of_labels_is_one_label_per_image(tmp_path):
    columns = {name: ARRAYS[name][:, None] for name in ("y_train", "y_test")}
    np.testing.assert_array_equal(load_dataset(save(tmp_path, **columns)).train_labels, [3, 0, 1, 1, 3, 0])


OBJECTS = np.array([{"a": 1}, None, 3, 4, 5, 6], object)
FLOATS = {"x_train": np.full((6, 5, 7), 0.5), "x_test": np.full((3, 5, 7), 0.5)}
WRONG = {
    "pickled images": ({"x_train": OBJECTS}, "FILE cannot be read, at x_train .*allow_pickle=False.*write it again"),
    "pickled labels": ({"y_test": OBJECTS[:3]}, "FILE cannot be read, at y_test .*allow_pickle=False"),
    "missing": ({"y_test": None}, "FILE lacks the array y_test; expected x_train, .*, found x_train, y_train, x_test"),
    "other names": (dict.fromkeys(ARRAYS) | {"images": OBJECTS}, "FILE lacks the array x_train; .* found images"),
    "empty": (dict.fromkeys(ARRAYS), "FILE lacks the array x_train; .* found nothing"),
    "two axes": ({"x_train": ARRAYS["x_train"][0]}, r"images x_train in FILE are \(5, 7\); expected \[images height"),
    "five axes": ({"x_test": np.zeros((3, 5, 7, 1, 1))}, r"images x_test in FILE are \(3, 5, 7, 1, 1\)"),
    "another size": ({"x_test": ARRAYS["x_test"][:, 1:]}, r"images x_test in FILE are \(3, 4, 7, 1\)"),
    "no images": ({"x_test": ARRAYS["x_test"][:0]}, r"labels y_test in FILE are \(3,\) for 0 images"),
    "dtype": ({"x_train": ARRAYS["x_train"].astype(np.int32)}, "images x_train in FILE are int32; expected uint8"),
    "dtypes": (
        FLOATS | {"x_test": ARRAYS["x_test"]},
        "images x_test in FILE are uint8; expected .* the same in both splits",
    ),
    "range": (FLOATS | {"x_test": FLOATS["x_test"] * 4}, "images x_test in FILE are from 2.0 to 2.0; expected floats"),
    "nan": (FLOATS | {"x_train": FLOATS["x_train"] * np.nan}, "images x_train in FILE are from nan to nan"),
    "length": ({"y_train": ARRAYS["y_train"][:5]}, r"labels y_train in FILE are \(5,\) for 6 images"),
    "scalar": ({"y_test": np.array(3)}, r"labels y_test in FILE are \(\) for 3 images"),
    "float labels": ({"y_test": np.array([1.0, 2, 3])}, "labels y_test in FILE are float64; expected integers or str"),
    "bytes": ({"y_train": np.array([b"a"] * 6)}, r"labels y_train in FILE are \|S1; expected integers or strings"),
    "mixed labels": (
        {"y_test": np.array(["9", "4", "4"])},
        "labels y_test in FILE are <U1; expected .* the same in both",
    ),
    "one class": ({"y_train": np.full(6, 4), "y_test": np.full(3, 4)}, r"y_train and y_test in FILE are all \[4\]"),
    "a class twice": (
        {"y_train": np.array([[8, 3]] * 6), "y_test": np.array([[3, 8], [3, 3], [8, 3]])},
        "labels y_test in FILE give image 1 the class '3' twice; expected different",
    ),
    "pairs and single": ({"y_train": np.array([[30, -1]] * 6)}, r"labels y_test in FILE are \(3,\); expected as many"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_an_invalid_array_raises_an_error_with_file_and_array(changes, message, tmp_path):
    path = save(tmp_path, **changes)
    with pytest.raises(UsageError, match=message.replace("FILE", re.escape(path))):
        load_dataset(path)


def truncated(path):
    return path.read_bytes()[:-100]


def with_a_byte_flipped(path):
    content = bytearray(path.read_bytes())
    content[100] ^= 0xFF
    return bytes(content)


def single_array(path):
    content = io.BytesIO()
    np.save(content, np.zeros(3))
    return content.getvalue()


def text_in_the_place_of_an_array(path):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("x_train.npy", "5, 7, 8")
    return content.getvalue()


def text(path):
    return b"x_train = 5"


def nothing(path):
    return b""


DAMAGES = [truncated, with_a_byte_flipped, single_array, text_in_the_place_of_an_array, text, nothing]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_file_raises_an_error_that_names_it(damage, tmp_path):
    path = save(tmp_path)
    (tmp_path / "mine.npz").write_bytes(damage(tmp_path / "mine.npz"))
    with pytest.raises(UsageError, match=f"^{path} (cannot be read|is truncated|lacks)"):
        load_dataset(path)


def test_a_file_of_another_format_raises(tmp_path):
    (tmp_path / "images.tar").touch()
    with pytest.raises(UsageError, match=r"images.tar is neither a folder of images nor an .npz file"):
        load_dataset(str(tmp_path / "images.tar"))
