"""Data sets from folders of images: formats, modes, and the errors for invalid folders."""

import numpy as np
import pytest
from PIL import Image

from capsnet_jax import UsageError
from capsnet_jax.data import load_dataset
from capsnet_jax.data.folder import load_image_folder
from tests.conftest import write_idx_folder
from tests.data.tiny_images import class_image, write_image_folder

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (5, 7, 1), dtype=np.uint8)


def read_one(tmp_path, image: Image.Image, suffix=".png", **options) -> np.ndarray:
    """Write copies of an image to a folder, load it, and return the first test image."""
    for name in "ab":
        (tmp_path / name).mkdir()
        for number in range(5):
            image.save(tmp_path / name / f"{number}{suffix}", **options)
    return load_image_folder(tmp_path).test_images[0]


def assert_off_by_at_most_one(read, expected):
    assert read.dtype == np.uint8
    np.testing.assert_allclose(read.astype(float), expected, atol=1)


def test_without_a_test_folder_every_fifth_image_of_a_class_is_for_testing(tmp_path):
    folder = write_image_folder(tmp_path / "set", ["zebra", "ant", "10"], 6, 5, per_class=11)
    dataset = load_dataset(str(folder))
    assert dataset.class_names == ("10", "ant", "zebra")
    assert dataset.image_shape == (6, 5, 3)
    rng = np.random.default_rng(0)
    written = {
        name: [class_image(label, 3, 6, 5, rng) for _ in range(11)] for label, name in enumerate(["zebra", "ant", "10"])
    }
    for images, labels, numbers in (
        (dataset.train_images, dataset.train_labels, [0, 1, 2, 3, 5, 6, 7, 8, 10]),
        (dataset.test_images, dataset.test_labels, [4, 9]),
    ):
        expected = [
            (written[name][number], label) for number in numbers for label, name in enumerate(dataset.class_names)
        ]
        np.testing.assert_array_equal(images, [image for image, _ in expected])
        np.testing.assert_array_equal(labels, [label for _, label in expected])


def test_train_and_test_folders_are_the_splits(tmp_path):
    folder = write_image_folder(tmp_path, "ab", 6, 5, per_class=3, test_per_class=2)
    Image.fromarray(COLOUR[:, :5]).resize((5, 6)).save(folder / "train" / "a" / "more.bmp")
    dataset = load_dataset(f"{folder}/")
    rng = np.random.default_rng(0)
    a, b, test_a, test_b = ([class_image(label, 2, 6, 5, rng) for _ in range(n)] for n in (3, 2) for label in (0, 1))
    np.testing.assert_array_equal(dataset.train_images[:-1], [a[0], b[0], a[1], b[1], a[2], b[2]])
    np.testing.assert_array_equal(dataset.train_labels, [0, 1, 0, 1, 0, 1, 0])
    np.testing.assert_array_equal(dataset.test_images, [test_a[0], test_b[0], test_a[1], test_b[1]])
    np.testing.assert_array_equal(dataset.test_labels, [0, 1, 0, 1])


def test_without_a_train_folder_the_test_images_can_be_loaded(tmp_path):
    folder = write_image_folder(tmp_path, "abc", 6, 5, per_class=3, test_per_class=2)
    whole = load_image_folder(folder, test_only=True)
    rename(folder, "train", "elsewhere")
    dataset = load_image_folder(folder, test_only=True)
    rename(folder, "elsewhere", "train")
    for test in (whole, dataset):
        assert test.class_names == ("a", "b", "c")
        np.testing.assert_array_equal(test.test_images, load_image_folder(folder).test_images)
        np.testing.assert_array_equal(test.test_labels, [0, 1, 2, 0, 1, 2])
        assert (test.train_images.shape, test.train_labels.shape) == ((0, 6, 5, 3), (0,))


def test_training_images_are_not_decoded_for_the_test_images_but_count_for_their_channels(tmp_path):
    for split, pixels in (("train", COLOUR), ("test", GREY)):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / split / name / "0.png")
    damaged = tmp_path / "train/a/0.png"
    damaged.write_bytes(damaged.read_bytes()[:-40])
    assert load_image_folder(tmp_path, test_only=True).test_images.shape == (2, 5, 7, 3)


def test_a_class_may_be_called_train_or_test(tmp_path):
    folder = write_image_folder(tmp_path, ["plane", "train"], 6, 5, per_class=5)
    assert load_dataset(str(folder)).class_names == ("plane", "train")
    rename(folder, "train", "test")
    assert load_dataset(str(folder), test_only=True).class_names == ("plane", "test")


def test_hidden_and_other_files_are_skipped(tmp_path):
    write_image_folder(tmp_path, "ab", 6, 5, per_class=5)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "README.md").touch()
    for name in (".DS_Store", "._0.png", "Thumbs.db", "notes.txt"):
        (tmp_path / "a" / name).touch()
    (tmp_path / "a" / "more.png").mkdir()
    dataset = load_image_folder(tmp_path)
    assert (len(dataset.train_images), len(dataset.test_images)) == (8, 2)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".tiff", ".ppm", ".PNG"])
def test_colours_are_read_as_they_were_written(suffix, tmp_path):
    np.testing.assert_array_equal(read_one(tmp_path, Image.fromarray(COLOUR), suffix), COLOUR)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".pgm"])
def test_grey_images_have_one_channel(suffix, tmp_path):
    np.testing.assert_array_equal(read_one(tmp_path, Image.fromarray(GREY), suffix), GREY[..., None])


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp"])
def test_compressed_images_are_read(suffix, tmp_path):
    smooth = np.add.outer(np.arange(24), np.arange(16))[..., None] * np.array([5, 3, 2])
    read = read_one(tmp_path, Image.fromarray(smooth.astype(np.uint8)), suffix, quality=95)
    np.testing.assert_allclose(read.astype(float), smooth, atol=8)


def test_one_bit_images_are_black_and_white(tmp_path):
    np.testing.assert_array_equal(read_one(tmp_path, Image.fromarray(GREY > 99))[..., 0], np.where(GREY > 99, 255, 0))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_sixteen_bits_are_scaled_to_eight(suffix, tmp_path):
    deep = np.random.default_rng(0).integers(0, 65536, (5, 7)).astype(np.uint16)
    deep[0, :2] = 0, 65535
    np.testing.assert_array_equal(
        read_one(tmp_path, Image.fromarray(deep), suffix)[..., 0], np.round(deep / 65535 * 255)
    )


def test_palettes_become_colours(tmp_path):
    image = Image.fromarray(GREY % 3, mode=None)
    image.putpalette([10, 20, 30, 255, 0, 9, 77, 88, 99])
    expected = np.array([[10, 20, 30], [255, 0, 9], [77, 88, 99]])[GREY % 3]
    np.testing.assert_array_equal(read_one(tmp_path, image), expected)


def test_transparent_pixels_become_black(tmp_path):
    read = read_one(tmp_path, Image.fromarray(np.concatenate([COLOUR, ALPHA], axis=2)))
    assert_off_by_at_most_one(read, COLOUR * (ALPHA / 255))


def test_grey_images_stay_grey_under_transparency(tmp_path):
    read = read_one(tmp_path, Image.fromarray(np.concatenate([GREY[..., None], ALPHA], axis=2)))
    assert_off_by_at_most_one(read, GREY[..., None] * (ALPHA / 255))


@pytest.mark.parametrize("mode", ["L", "P"])
def test_one_transparent_colour_is_black(mode, tmp_path):
    image = Image.fromarray(GREY % 3)
    if mode == "P":
        image.putpalette([10, 20, 30, 255, 0, 9, 77, 88, 99])
    values = np.array([[10, 20, 30], [255, 0, 9], [77, 88, 99]]) if mode == "P" else np.array([[0], [1], [2]])
    values[1] = 0
    np.testing.assert_array_equal(read_one(tmp_path, image, transparency=1), values[GREY % 3])


def test_one_colour_image_makes_all_of_them_coloured(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for number in range(5):
            Image.fromarray(GREY).save(tmp_path / name / f"{number}.png")
    Image.fromarray(COLOUR).save(tmp_path / "b" / "4.png")
    dataset = load_image_folder(tmp_path)
    np.testing.assert_array_equal(dataset.test_images, [np.stack([GREY] * 3, axis=2), COLOUR])
    np.testing.assert_array_equal(dataset.train_images[3], dataset.test_images[0])


def test_an_animation_is_its_first_frame(tmp_path):
    frames = [Image.fromarray(np.full((5, 7), value, np.uint8)) for value in (40, 80, 120)]
    read = read_one(tmp_path, frames[0], ".gif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(read, np.full((5, 7, 3), 40))  # its palette counts as colours


def test_images_of_any_size_are_resized_antialiased(tmp_path):
    write_image_folder(tmp_path, "ab", 6, 5, per_class=5)
    stripes = np.tile(np.array([0, 240], np.uint8), (40, 20))  # a pixel wide
    Image.fromarray(stripes).save(tmp_path / "b" / "004.png")
    dataset = load_image_folder(tmp_path, (8, 10))
    assert dataset.train_images.shape == (8, 8, 10, 3)
    np.testing.assert_allclose(dataset.test_images[1].astype(float), 120, atol=25)


def rename(folder, name, new_name):
    (folder / name).rename(folder / new_name)


def keep_only(folder, name, count):
    for number in range(count, 5):
        (folder / name / f"{number:03}.png").unlink()


def write(folder, name, content):
    (folder / name).write_bytes(content)


def truncate(folder, name, suffix):
    path = (folder / name).with_suffix(suffix)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-30])


def resize(folder, name):
    Image.open(folder / name).resize((8, 9)).save(folder / name)  # width, height


def remove_classes(folder, *names):
    for name in names:
        for path in (folder / name).iterdir():
            path.unlink()
        (folder / name).rmdir()


WRONG = {
    "no folder": (lambda f: remove_classes(f, *"abc"), "FOLDER has no folder in it; expected a folder of images for"),
    "one class": (lambda f: remove_classes(f, *"ac"), "FOLDER has only the folder b in it; .* two or more classes"),
    "no image": (
        lambda f: keep_only(f, "b", 0),
        r"FOLDER/b has 0 images \(.png .jpg .* in it; expected 5 or more in each class folder",
    ),
    "few images": (
        lambda f: keep_only(f, "b", 4),
        r"FOLDER/b has 4 images .* in it; expected 5 or more in .* every fifth image of a class is for testing",
    ),
    "empty file": (lambda f: write(f, "b/001.png", b""), "FOLDER/b/001.png cannot be read as an image .* replace or"),
    "no picture": (lambda f: write(f, "a/004.png", b"<html>"), "FOLDER/a/004.png cannot be read as an image"),
    "truncated png": (lambda f: truncate(f, "c/003", ".png"), "FOLDER/c/003.png cannot be read as an image"),
    "truncated jpg": (
        lambda f: truncate(f, "c/003", ".jpg"),
        "FOLDER/c/003.jpg cannot be read as an image .*truncated",
    ),
    "mixed sizes": (
        lambda f: resize(f, "b/002.png"),
        "FOLDER/b/002.png is 9 x 8 pixels, .* FOLDER/a/000.png is 6 x 5; .* --image-size H W in training",
    ),
    "32 bits": (
        lambda f: Image.fromarray(np.full((6, 5), 70000, np.int32)).save(f / "a" / "000.tif"),
        r"FOLDER/a/000.tif cannot be read as an image \(its pixels are from 70000 to 70000; expected at most 16 bits\)",
    ),
    "floats": (
        lambda f: Image.fromarray(np.ones((6, 5), np.float32)).save(f / "a" / "000.tif"),
        r"FOLDER/a/000.tif cannot .* \(its pixels are floating-point numbers; expected whole numbers of 8 or 16 bits\)",
    ),
}


@pytest.mark.parametrize(("damage", "message"), WRONG.values(), ids=WRONG)
def test_an_invalid_folder_raises_an_error_with_its_path(damage, message, tmp_path):
    write_image_folder(tmp_path, "abc", 6, 5, per_class=5)
    damage(tmp_path)
    with pytest.raises(UsageError, match="^" + message.replace("FOLDER", str(tmp_path))):
        load_dataset(str(tmp_path))


@pytest.mark.parametrize(
    ("renamed", "message"),
    [
        ("test/b", "FOLDER/test lacks the class 'b'; expected the same classes in train and test"),
        ("train/b", "FOLDER/train lacks the class 'b'; expected the same classes"),
    ],
)
def test_a_class_in_only_one_split_raises(renamed, message, tmp_path):
    write_image_folder(tmp_path, "abc", 6, 5, per_class=2, test_per_class=1)
    rename(tmp_path, renamed, f"{renamed[:-1]}d")
    with pytest.raises(UsageError, match=message.replace("FOLDER", str(tmp_path))):
        load_dataset(str(tmp_path))


def test_a_test_folder_without_a_train_folder_raises_an_error_with_both_layouts(tmp_path):
    write_image_folder(tmp_path, "ab", 6, 5, per_class=2, test_per_class=1)
    rename(tmp_path, "train", "training")
    with pytest.raises(
        UsageError, match=f"{tmp_path}/test has 0 images .* or in both {tmp_path}/train and {tmp_path}/test"
    ):
        load_dataset(str(tmp_path))


def test_a_decompression_bomb_raises(tmp_path, monkeypatch):
    write_image_folder(tmp_path, "ab", 60, 50, per_class=5)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1400)
    with pytest.raises(UsageError, match=r"a/000.png cannot be read as an image .*3000 pixels"):
        load_image_folder(tmp_path)


def test_an_image_size_that_is_not_positive_raises(tmp_path):
    with pytest.raises(UsageError, match=r"image_size is \(8, 0\), and must be at least 1"):
        load_image_folder(tmp_path, (8, 0))


def test_a_folder_of_idx_files_raises_an_error_with_the_options_for_it(tmp_path, small_dataset):
    folder = write_idx_folder(tmp_path / "idx", small_dataset)
    with pytest.raises(
        UsageError, match=f"no folder in it; .*, or --dataset mnist --data-dir {folder} for its idx files"
    ):
        load_dataset(str(folder))
