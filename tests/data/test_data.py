"""Loading data sets by name or path: digits, idx files and tensorflow-datasets."""

import gzip
import importlib.util
import sys

import numpy as np
import pytest

from capsnet_jax import UsageError
from capsnet_jax.config import DataConfig
from capsnet_jax.data import configured_dataset, load_dataset
from tests.conftest import write_idx
from tests.data.tiny_images import write_image_folder

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = (f"{name}.gz" for name in FILES)


def test_digits_are_the_1797_images_of_scikit_learn_split_by_class():
    digits = load_dataset("digits")
    assert digits.image_shape == (8, 8, 1)
    assert len(digits.train_images) + len(digits.test_images) == 1797
    from sklearn.datasets import load_digits

    real = load_digits()
    np.testing.assert_array_equal(np.bincount(digits.test_labels), np.bincount(real.target) // 5)
    both = np.concatenate([digits.train_images, digits.test_images])[..., 0] / 255 * 16
    np.testing.assert_allclose(np.sort(both.ravel()), np.sort(real.images.ravel()), atol=0.04)
    test_images = {image.tobytes() for image in digits.test_images}
    assert not test_images & {image.tobytes() for image in digits.train_images}


def test_idx_files_are_read_as_they_were_written(idx_folder, small_dataset):
    for read, written in zip(load_dataset("mnist", idx_folder), small_dataset, strict=True):
        np.testing.assert_array_equal(read, written)


def test_idx_files_need_not_be_compressed(idx_folder, small_dataset):
    for name in FILES:
        (idx_folder / name).write_bytes(gzip.decompress((idx_folder / f"{name}.gz").read_bytes()))
        (idx_folder / f"{name}.gz").unlink()
    np.testing.assert_array_equal(load_dataset("mnist", idx_folder).test_images, small_dataset.test_images)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-20])


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


def empty(path):
    path.write_bytes(b"")


def shorten(path):
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-3]))


def lengthen(path):
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + b"\0"))


def cut_header(path):
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:9]))


def not_gzip(path):
    path.write_bytes(gzip.decompress(path.read_bytes()))


DAMAGES = [truncate, flip_byte, empty, shorten, lengthen, cut_header, not_gzip]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", [TRAIN_IMAGES, TEST_LABELS])
def test_a_damaged_file_raises_an_error_that_names_it(name, damage, idx_folder):
    damage(idx_folder / name)
    with pytest.raises(UsageError, match=name):
        load_dataset("mnist", idx_folder)


def test_images_in_place_of_labels_raise(idx_folder):
    (idx_folder / TRAIN_LABELS).write_bytes((idx_folder / TRAIN_IMAGES).read_bytes())
    with pytest.raises(UsageError, match=rf"{TRAIN_LABELS} begins with 00000803; expected 00000801"):
        load_dataset("mnist", idx_folder)


def test_a_missing_file_raises_an_error_that_names_it(idx_folder):
    (idx_folder / TEST_LABELS).unlink()
    with pytest.raises(UsageError, match=f"lacks {TEST_LABELS}"):
        load_dataset("mnist", idx_folder)


def test_a_wrong_number_of_labels_raises(idx_folder):
    write_idx(idx_folder / TEST_LABELS, np.zeros(22, np.uint8))
    with pytest.raises(UsageError, match=f"{TEST_LABELS} has 22 labels for 23 images"):
        load_dataset("mnist", idx_folder)


def test_an_unknown_name_for_idx_files_raises_an_error_with_the_known_names(idx_folder):
    with pytest.raises(UsageError, match=r"'mnits'.*mnist, fashion_mnist, kmnist"):
        load_dataset("mnits", idx_folder)


RNG = np.random.default_rng(7)
LETTERS = {
    "train": (RNG.integers(0, 256, (13, 4, 6), dtype=np.uint8), np.array([3, 26, 1, 26, 5, 3, 1, 26, 5, 3, 3, 1, 26])),
    "test": (RNG.integers(0, 256, (7, 4, 6), dtype=np.uint8), np.array([1, 26, 12, 3, 1, 5, 12])),
}


def write_letters(folder, prefix="emnist-letters-", dash="-", splits=("train", "test")):
    """Write files as EMNIST has them, with labels from 1 and a gap."""
    folder.mkdir(exist_ok=True)
    for split in splits:
        images, labels = LETTERS[split]
        write_idx(folder / f"{prefix}{split}-images{dash}idx3-ubyte.gz", images)
        write_idx(folder / f"{prefix}{split}-labels{dash}idx1-ubyte.gz", labels.astype(np.uint8))
    return folder


@pytest.mark.parametrize(
    ("prefix", "name"), [("emnist-letters-", "emnist-letters"), ("", "kmnist"), ("a-b.c-", "a-b.c")]
)
@pytest.mark.parametrize("dash", "-.")
def test_idx_files_with_a_prefix_are_a_data_set_whose_classes_are_its_labels(prefix, name, dash, tmp_path):
    dataset = load_dataset(name, write_letters(tmp_path / "emnist", prefix, dash))
    assert dataset.class_names == ("1", "3", "5", "12", "26")
    for images, labels, split in (
        (dataset.train_images, dataset.train_labels, "train"),
        (dataset.test_images, dataset.test_labels, "test"),
    ):
        np.testing.assert_array_equal(images[..., 0], LETTERS[split][0])
        np.testing.assert_array_equal(np.array([1, 3, 5, 12, 26])[labels], LETTERS[split][1])


def test_of_several_data_sets_of_idx_files_the_name_chooses(idx_folder, small_dataset):
    write_letters(idx_folder)
    write_letters(idx_folder, "emnist-", splits=("train",))
    (idx_folder / "letters-train-images-idx3-ubyte").mkdir()  # as some archives are unpacked
    assert load_dataset("emnist-letters", idx_folder).image_shape == (4, 6, 1)
    np.testing.assert_array_equal(load_dataset("mnist", idx_folder).test_images, small_dataset.test_images)
    with pytest.raises(
        UsageError, match=r"'letters' .* expected mnist, fashion_mnist, kmnist, emnist, emnist-letters\."
    ):
        load_dataset("letters", idx_folder)
    with pytest.raises(
        UsageError, match=r"lacks emnist-test-images-idx3-ubyte\.gz; expected .* training and test images"
    ):
        load_dataset("emnist", idx_folder)


def test_without_a_training_split_test_images_can_be_loaded(tmp_path):
    folder = write_letters(tmp_path / "emnist", splits=("test",))
    with pytest.raises(UsageError, match=r"lacks emnist-letters-train-images-idx3-ubyte\.gz"):
        load_dataset("emnist-letters", folder)
    dataset = load_dataset("emnist-letters", folder, test_only=True)
    assert dataset.class_names == ("1", "3", "5", "12", "26")
    np.testing.assert_array_equal(dataset.test_images[..., 0], LETTERS["test"][0])
    assert (dataset.train_images.shape, dataset.train_labels.shape) == ((0, 4, 6, 1), (0,))
    (folder / "emnist-letters-test-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(
        UsageError, match=r"lacks emnist-letters-test-labels-.* expected files of test images and their"
    ):
        load_dataset("emnist-letters", folder, test_only=True)


def test_idx_files_of_one_class_raise(tmp_path):
    folder = write_letters(tmp_path / "emnist")
    for split, count in (("train", 13), ("test", 7)):
        write_idx(folder / f"emnist-letters-{split}-labels-idx1-ubyte.gz", np.full(count, 2, np.uint8))
    with pytest.raises(UsageError, match=r"labels of 'emnist-letters' in .*emnist are all \[2\]; expected two"):
        load_dataset("emnist-letters", folder)


def test_images_are_transposed_by_an_option(tmp_path):
    data = DataConfig("emnist-letters", write_letters(tmp_path / "emnist"), transpose=True, validation=0.3)
    dataset = configured_dataset(data)
    assert dataset.image_shape == (6, 4, 1)
    np.testing.assert_array_equal(dataset.test_images[..., 0], LETTERS["test"][0].transpose(0, 2, 1))
    both = {image.tobytes() for image in [*dataset.train_images, *dataset.validation_images]}
    assert both == {image.T.tobytes() for image in LETTERS["train"][0]}
    test = configured_dataset(data, test_only=True)
    np.testing.assert_array_equal(test.test_images, dataset.test_images)
    assert (len(test.train_images), test.validation_images) == (0, None)


def test_a_folder_that_does_not_exist_raises(tmp_path):
    with pytest.raises(UsageError, match="nowhere does not exist"):
        load_dataset("mnist", tmp_path / "nowhere")


def test_names_and_folders_may_be_text_or_paths(idx_folder, small_dataset, tmp_path):
    assert load_dataset("mnist", str(idx_folder)).checksum() == small_dataset.checksum()
    folder = write_image_folder(tmp_path / "set", "ab", 4, 3, per_class=5)
    assert load_dataset(folder).checksum() == load_dataset(str(folder)).checksum()
    with pytest.raises(UsageError, match=f"The data set {folder.parent}/none does not exist"):
        load_dataset(folder.parent / "none")


def test_train_limit_applies_before_the_validation_split(idx_folder, small_dataset):
    config = DataConfig(dataset="mnist", data_dir=idx_folder, train_limit=40, validation=0.25)
    dataset = configured_dataset(config)
    assert (len(dataset.train_images), len(dataset.validation_images)) == (30, 10)
    both = {image.tobytes() for image in [*dataset.train_images, *dataset.validation_images]}
    assert both == {image.tobytes() for image in small_dataset.train_images[:40]}


def test_image_size_resizes_a_folder(tmp_path):
    folder = write_image_folder(tmp_path / "set", "ab", 9, 13, per_class=5)
    assert configured_dataset(DataConfig(dataset=str(folder), image_size=(6, 7))).image_shape == (6, 7, 3)


def test_a_path_takes_precedence_over_tensorflow_datasets_but_not_over_built_in_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cifar10", "digits"):
        write_image_folder(tmp_path / name, "ab", 4, 3, per_class=5)
    assert load_dataset("cifar10").class_names == ("a", "b")
    assert load_dataset("digits").num_classes == 10
    assert load_dataset("./digits").class_names == ("a", "b")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_dataset("~/digits").class_names == ("a", "b")


@pytest.mark.parametrize("name", ["mine.npz", "mine/", "./mine", "../mine", "/mine", "~/mine", "~nobody/mine"])
def test_a_path_that_does_not_exist_raises(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UsageError, match=f"data set {name} does not exist; expected a folder of images or an .npz"):
        load_dataset(name)


@pytest.mark.parametrize("name", ["digits", "multi_mnist", "cifar10", "set.npz"])
def test_image_size_for_anything_but_a_folder_raises(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set.npz").touch()
    with pytest.raises(UsageError, match=rf"image_size is \(8, 9\), but only folders of images.*{name} is not one"):
        load_dataset(name, image_size=(8, 9))


@pytest.mark.filterwarnings("ignore")  # of tensorflow-datasets and what it imports
class TestTensorflowDatasets:
    """The real library with a tiny data set, without TensorFlow."""

    @pytest.fixture(autouse=True)
    def _library(self):
        pytest.importorskip("tensorflow_datasets")
        if importlib.util.find_spec("tensorflow"):
            pytest.skip("TensorFlow is installed; these tests need its absence")

    @pytest.fixture
    def prepared(self, tmp_path):
        from tests.data.tiny_tfds import TinyImages

        TinyImages(data_dir=tmp_path, file_format="array_record").download_and_prepare()
        return tmp_path

    def test_a_prepared_data_set_is_read_without_tensorflow(self, prepared):
        from tests.data.tiny_tfds import examples

        dataset = load_dataset("tiny_images", prepared)
        assert dataset.class_names == ("ant", "bee", "cat", "dog")
        assert dataset.image_shape == (12, 10, 3)
        for split, images, labels in (
            ("train", dataset.train_images, dataset.train_labels),
            ("test", dataset.test_images, dataset.test_labels),
        ):
            written = {(image.tobytes(), label) for image, label in examples(split)}
            read = {(image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)}
            assert read == written
            assert len(images) == len(written)
        test = load_dataset("tiny_images", prepared, test_only=True)
        np.testing.assert_array_equal(test.test_images, dataset.test_images)
        assert (len(test.train_images), test.class_names) == (0, dataset.class_names)
        assert "tensorflow" not in sys.modules

    def test_a_data_set_that_is_not_prepared_raises_an_error_with_the_extra(self, tmp_path):
        with pytest.raises(UsageError, match=r"'mnist' is not prepared.*TensorFlow: pip install 'capsnet-jax\[tfds\]'"):
            load_dataset("mnist", tmp_path)

    def test_an_unknown_name_raises_an_error_with_similar_names(self):
        with pytest.raises(UsageError, match=r"Unknown data set 'fashion_mnits'.*fashion_mnist"):
            load_dataset("fashion_mnits")

    @pytest.mark.parametrize("name", ["My-Photos", "my photos", "photos:1", "a/b/c", "mnist/large", "mnist:9.9.9"])
    def test_a_name_that_the_library_cannot_parse_is_unknown_too(self, name):
        with pytest.raises(UsageError, match=f"Unknown data set '{name}'; expected digits, .* the path of a folder"):
            load_dataset(name)

    def test_a_data_set_without_labelled_images_raises(self):
        with pytest.raises(UsageError, match="'ag_news_subset' "):
            load_dataset("ag_news_subset")


def test_without_tensorflow_datasets_the_error_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UsageError, match=r"'cifar10'.*pip install 'capsnet-jax\[tfds\]'"):
        load_dataset("cifar10")
    for name in ("mnist", "multi_mnist"):
        with pytest.raises(
            UsageError, match=r"^Data set 'mnist' needs its four idx files in --data-dir, or tensorflow"
        ):
            load_dataset(name)
    with pytest.raises(
        UsageError, match=rf"needs its four idx files in --data-dir \({tmp_path} has none\), or tensorf"
    ):
        load_dataset("kmnist", tmp_path)
    with pytest.raises(UsageError, match=r"a data set of idx files in --data-dir \(.* has none\)"):
        load_dataset("emnist-letters", tmp_path)
