"""The command `evaluate`: tables, the last line, the picture of confusions, and other data sets."""

import shutil

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
import tyro
from flax import nnx

from capsnet_jax import CapsNet, UsageError
from capsnet_jax.cli.evaluate import Evaluate, describe, describe_confusion
from capsnet_jax.config import Config, DataConfig, ModelConfig
from capsnet_jax.data import make_dataset
from capsnet_jax.figures import confusion_figure
from capsnet_jax.interchange.weights import save_weights
from capsnet_jax.ops import to_unit_range
from capsnet_jax.runs.folder import BEST, WEIGHTS, Run
from capsnet_jax.train.evaluation import Evaluation, evaluate
from tests.conftest import IMAGE_SHAPE, SMALL, write_idx, write_idx_folder

TINY = Evaluation(
    num_correct=353,
    num_images=355,
    counts=(200, 155, 0),
    precision=(0.995, 0.99, None),
    recall=(1.0, 0.9871, None),
    confusion=((200, 0, 0), (1, 153, 1), (0, 0, 0)),
    right_activation=0.91234,
    runner_up_activation=0.1,
    reconstruction_error=0.0213456,
)
PER_CLASS = """\
| class | images | precision | recall |
| ----- | -----: | --------: | -----: |
| cat   |    200 |    0.9950 | 1.0000 |
| dog   |    155 |    0.9900 | 0.9871 |
| ox    |      0 |         - |      - |
"""
MATRIX = """
| true \\ predicted | cat | dog | ox |
| ---------------- | --: | --: | -: |
| cat              | 200 |   . |  . |
| dog              |   1 | 153 |  1 |
| ox               |   . |   . |  . |
"""


@pytest.fixture
def run_dir(idx_folder, tmp_path, small_dataset, small_model):
    """A run folder whose best weights are not the last ones."""
    config = Config(ModelConfig(**SMALL), DataConfig("mnist", idx_folder, train_limit=10, validation=0.3))
    run = Run.of(tmp_path / "run", config, small_dataset)
    run.write_config()
    save_weights(run.folder / WEIGHTS, small_model)
    save_weights(run.folder / BEST, CapsNet(IMAGE_SHAPE, 10, **SMALL, rngs=nnx.Rngs(1)))
    return run.folder


def test_describe_prints_tables_means_and_interval():
    assert describe(TINY, ("cat", "dog", "ox")) == (
        PER_CLASS
        + MATRIX
        + """
mean activation of the right capsule 0.912, of the most active wrong one 0.100
mean squared error of a reconstructed pixel 0.02135
95 % interval of the error 0.15 to 2.03 %
test accuracy 0.9944 on 355 images (error 0.56 %)"""
    )


def test_describe_omits_fields_that_are_none():
    bare = TINY._replace(confusion=None, runner_up_activation=None, reconstruction_error=None)
    assert describe(bare, ("cat", "dog", "ox")) == (
        PER_CLASS
        + """
mean activation of the right capsule 0.912
95 % interval of the error 0.15 to 2.03 %
test accuracy 0.9944 on 355 images (error 0.56 %)"""
    )


def test_long_class_names_become_numbers_in_the_column_heads():
    assert describe_confusion(np.array([[12, 3], [0, 4]]), ("T-shirt/top", "coat")) == (
        "| true \\ predicted |  0 |  1 |\n"
        "| ---------------- | -: | -: |\n"
        "| 0 T-shirt/top    | 12 |  3 |\n"
        "| 1 coat           |  . |  4 |"
    )


def test_for_many_classes_the_most_frequent_confusions_are_listed():
    names = [f"class {number}" for number in range(13)]
    confusion = 50 * np.eye(13, dtype=int)
    assert describe_confusion(confusion, names) == "most frequent confusions:\nnone"
    confusion[2, 7], confusion[12, 0] = 1, 5
    assert describe_confusion(confusion, names).splitlines()[1:] == [
        "class 12 taken for class 0: 5 times",
        "class 2 taken for class 7: 1 time",
    ]
    confusion[3, :] = 9
    assert len(describe_confusion(confusion, names).splitlines()) == 11


def test_the_command_prints_counts_and_accuracy_of_last_or_best_weights(
    run_dir, tmp_path, small_dataset, small_model, capsys
):
    data = small_dataset.test_images, small_dataset.test_labels
    activations = jax.jit(small_model.encode)(to_unit_range(jnp.asarray(data[0]))).activations
    num_correct = int((np.argmax(activations, axis=1) == data[1]).sum())
    picture = tmp_path / "confusion.png"
    tyro.cli(Evaluate, args=[str(run_dir), "--confusion", str(picture)]).run()
    lines = capsys.readouterr().out.splitlines()
    share = num_correct / 23
    assert lines[-1] == f"test accuracy {share:.4f} on 23 images (error {100 * (1 - share):.2f} %)"
    assert lines[2].startswith("| 0 ")
    counts = [int(line.split("|")[2]) for line in lines[2:12]]
    assert counts == np.bincount(small_dataset.test_labels, minlength=10).tolist()
    assert len(np.unique(matplotlib.image.imread(picture))) > 20
    Evaluate(run_dir, best=True).run()
    best = CapsNet(IMAGE_SHAPE, 10, **SMALL, rngs=nnx.Rngs(1))
    text = describe(evaluate(best, *data), small_dataset.class_names)
    assert capsys.readouterr().out == text + "\n"
    assert text != describe(evaluate(small_model, *data), small_dataset.class_names)


def counts_of(lines) -> dict[str, str]:
    """Number of images of each class, in the table that the command prints."""
    return {line.split("|")[1].strip(): line.split("|")[2].strip() for line in lines[2:12]}


def test_another_data_set_is_evaluated_without_its_training_images(run_dir, tmp_path, small_dataset, capsys):
    train_images, train_labels, test_images, test_labels, *_ = small_dataset
    splits = train_images[:1], train_labels[:1], test_images[5:], test_labels[5:]
    folder = write_idx_folder(tmp_path / "other", make_dataset(*splits, num_classes=10))
    for name in ("images-idx3", "labels-idx1"):
        (folder / f"train-{name}-ubyte.gz").unlink()
    Evaluate(run_dir, dataset="kmnist", data_dir=folder).run()
    lines = capsys.readouterr().out.splitlines()
    assert " on 18 images " in lines[-1]
    expected = np.bincount(test_labels[5:], minlength=10)
    assert counts_of(lines) == {str(label): str(count) for label, count in enumerate(expected)}
    wide = {"x_test": test_images[:, :, :10], "y_test": test_labels}
    np.savez(tmp_path / "wide.npz", **wide)
    with pytest.raises(UsageError, match=r"\(9, 10, 1\), and the model was made for \(9, 11, 1\)"):
        Evaluate(run_dir, dataset=str(tmp_path / "wide.npz")).run()
    np.savez(tmp_path / "transposed.npz", x_test=test_images.swapaxes(1, 2), y_test=test_labels)
    Evaluate(run_dir, dataset=str(tmp_path / "transposed.npz"), transpose=True).run()
    transposed = capsys.readouterr().out
    Evaluate(run_dir).run()
    assert transposed == capsys.readouterr().out


WORDS = tuple("zero one two three four five six seven eight nine".split())  # noqa: SIM905


def test_classes_are_matched_by_name_in_any_order(run_dir, tmp_path, small_dataset, monkeypatch, capsys):
    """Here the sets have the same images, under labels in another order, only of some classes, or with other names."""
    images, labels = small_dataset.test_images, small_dataset.test_labels

    def evaluated(class_names, kept=slice(None), **options) -> str:
        numbers = np.array([class_names.index(str(label)) for label in labels[kept]])
        given = options.pop("names", class_names)
        other = make_dataset(
            images[:0], numbers[:0], images[kept], numbers, num_classes=len(class_names), class_names=given
        )
        monkeypatch.setattr("capsnet_jax.cli.evaluate.configured_dataset", lambda data, test_only: other)
        Evaluate(run_dir, dataset="other", **options).run()
        return capsys.readouterr().out

    ordered, shuffled = list("0123456789"), list("3195720468")
    expected = evaluated(ordered)
    assert evaluated(shuffled) == expected
    assert evaluated(ordered, match="order") == expected
    assert evaluated(ordered, names=WORDS, match="order") == expected
    assert evaluated(shuffled, match="order") != expected
    kept = np.flatnonzero(np.isin(labels, [2, 5, 7]))
    lines = evaluated(["7", "5", "2"], kept).splitlines()
    assert counts_of(lines) == {name: str(np.sum(labels[kept] == int(name))) for name in "0123456789"}
    for class_names, options, message in (
        (ordered, {"names": WORDS}, r"has the classes 'zero', 'one', .*'nine', .* its own are '0', '1', .*'9'"),
        ([*ordered, "ten"], {}, r"'other' has the classes 'ten', which the model does not .* or --match order"),
        (["7", "5", "2"], {"kept": kept, "match": "order"}, r"'other' has 3 classes, and the model was made for 10"),
    ):
        with pytest.raises(UsageError, match=message):
            evaluated(class_names, **options)


def test_a_run_on_transposed_files_transposes_its_own_data_set_only(
    run_dir, idx_folder, tmp_path, small_dataset, capsys
):
    (tmp_path / "published").mkdir()
    images, labels = small_dataset.test_images[..., 0], small_dataset.test_labels
    write_idx(tmp_path / "published/emnist-mnist-test-images-idx3-ubyte.gz", images.swapaxes(1, 2))
    write_idx(tmp_path / "published/emnist-mnist-test-labels-idx1-ubyte.gz", labels.astype(np.uint8))
    config = Config(ModelConfig(**SMALL), DataConfig("emnist-mnist", tmp_path / "published", transpose=True))
    run = Run.of(tmp_path / "transposed", config, small_dataset)
    run.write_config()
    shutil.copy(run_dir / WEIGHTS, run.folder)
    Evaluate(run_dir).run()
    expected = capsys.readouterr().out
    for options in ({}, {"dataset": "emnist-mnist"}, {"dataset": "mnist", "data_dir": idx_folder}):
        Evaluate(run.folder, **options).run()
        assert capsys.readouterr().out == expected


def test_a_folder_with_the_name_of_a_built_in_data_set_does_not_hide_it(
    run_dir, idx_folder, tmp_path, small_dataset, monkeypatch, capsys
):
    """The run is of a folder of images, which were resized."""
    config = Config(ModelConfig(**SMALL), DataConfig("photos", image_size=IMAGE_SHAPE[:2]))
    run = Run.of(tmp_path / "resized", config, small_dataset)
    run.write_config()
    shutil.copy(run_dir / WEIGHTS, run.folder)
    Evaluate(run_dir).run()
    expected = capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mnist").mkdir()
    Evaluate(run.folder, dataset="mnist", data_dir=idx_folder).run()
    assert capsys.readouterr().out == expected


def test_a_limit_uses_the_first_test_images(run_dir, small_dataset, small_model, capsys):
    Evaluate(run_dir, limit=7).run()
    first = small_dataset.test_images[:7], small_dataset.test_labels[:7]
    assert capsys.readouterr().out == describe(evaluate(small_model, *first), small_dataset.class_names) + "\n"
    for limit, message in ((0, "limit is 0, and must be at least 1"), (24, "limit is 24, with only 23 test images")):
        with pytest.raises(UsageError, match=message):
            Evaluate(run_dir, limit=limit).run()


def test_images_of_several_classes_have_no_confusion_matrix(run_dir, tmp_path, small_dataset, monkeypatch, capsys):
    labels = np.stack([small_dataset.test_labels, (small_dataset.test_labels + 1) % 10], axis=1)
    images = small_dataset.test_images
    pairs = make_dataset(images, labels, images, labels, num_classes=10)
    monkeypatch.setattr("capsnet_jax.cli.evaluate.configured_dataset", lambda data, test_only: pairs)
    with pytest.raises(UsageError, match=r"Images of 'mnist' have several classes each, .* expected no --confusion"):
        Evaluate(run_dir, confusion=tmp_path / "confusion.png").run()
    Evaluate(run_dir).run()
    lines = capsys.readouterr().out.splitlines()
    assert sum(int(line.split("|")[2]) for line in lines[2:12]) == 2 * 23
    assert not any("predicted" in line for line in lines)


@pytest.mark.parametrize("name", ["nowhere/confusion.png", "confusion.docx"])
def test_a_picture_that_cannot_be_written_raises_an_error_with_its_name(run_dir, tmp_path, name):
    with pytest.raises(UsageError, match=f"The picture .*{name} cannot be written: "):
        Evaluate(run_dir, confusion=tmp_path / name).run()


def test_the_confusion_figure_shows_counts_and_fractions():
    confusion = np.array([[3, 1], [0, 0]])
    (axis, _) = confusion_figure(confusion, ("a", "bcd")).axes
    np.testing.assert_array_equal(axis.images[0].get_array(), [[0.75, 0.25], [0, 0]])
    assert {text.get_position(): text.get_text() for text in axis.texts} == {(0, 0): "3", (1, 0): "1"}
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "bcd"]
    assert (axis.get_ylabel(), axis.get_xlabel()) == ("true", "predicted")
