"""Evaluation against counts in plain loops, and the command `capsnet evaluate`."""

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
from capsnet_jax.train import evaluation
from capsnet_jax.train.evaluation import (
    Evaluation,
    Predictions,
    evaluate,
    mean_coupling_entropy,
    predict,
    score,
)
from tests.conftest import IMAGE_SHAPE, SMALL, write_idx_folder


@pytest.fixture
def run_dir(idx_folder, tmp_path, small_dataset, small_model):
    """A run folder whose best weights are not the last ones."""
    config = Config(ModelConfig(**SMALL), DataConfig("mnist", idx_folder, train_limit=10, validation=0.3))
    run = Run.of(tmp_path / "run", config, small_dataset)
    run.write_config()
    save_weights(run.folder / WEIGHTS, small_model)
    save_weights(run.folder / BEST, CapsNet(IMAGE_SHAPE, 10, **SMALL, rngs=nnx.Rngs(1)))
    return run.folder


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
    couplings = np.float64(model.route(to_unit_range(jnp.asarray(images)))[-1].couplings)
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


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_equals_published_values(correct, total, low, high):
    """Newcombe, "Two-sided confidence intervals for the single proportion" (1998), table I, method 3."""
    evaluation = TINY._replace(num_correct=correct, num_images=total)
    assert evaluation.interval == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    mirrored = evaluation._replace(num_correct=total - correct)
    assert mirrored.interval == (pytest.approx(1 - high, abs=5e-5), pytest.approx(1 - low, abs=5e-5))


def test_the_interval_stays_within_0_and_1():
    for total in (1, 2, 7, 30, 399):
        low, high = TINY._replace(num_correct=0, num_images=total).interval
        assert low == pytest.approx(0, abs=1e-15)
        assert 0 <= low < high < 1
        low, high = TINY._replace(num_correct=total, num_images=total).interval
        assert 0 < low < high <= 1


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
    activations = small_model.encode(to_unit_range(jnp.asarray(data[0]))).activations
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


def test_another_data_set_is_evaluated_if_it_has_the_same_classes_and_size(run_dir, tmp_path, small_dataset, capsys):
    """Its number of training images does not matter."""
    train_images, train_labels, test_images, test_labels, *_ = small_dataset
    splits = train_images[:1], train_labels[:1], test_images[5:], test_labels[5:]
    folder = write_idx_folder(tmp_path / "other", make_dataset(*splits, num_classes=10))
    Evaluate(run_dir, dataset="kmnist", data_dir=folder).run()
    assert " on 18 images " in capsys.readouterr().out.splitlines()[-1]
    names = ("x_train", "y_train", "x_test", "y_test")
    arrays = dict(zip(names, small_dataset[:4], strict=True))
    arrays["y_test"] = np.arange(23) % 10  # all classes
    np.savez(tmp_path / "few.npz", **arrays | {name: arrays[name] % 4 for name in names[1::2]})
    with pytest.raises(UsageError, match=r"few.npz' has 4 classes, and the model was made for 10;"):
        Evaluate(run_dir, dataset=str(tmp_path / "few.npz")).run()
    np.savez(tmp_path / "wide.npz", **arrays | {name: arrays[name][:, :, :10] for name in names[::2]})
    with pytest.raises(UsageError, match=r"\(9, 10, 1\), and the model was made for \(9, 11, 1\)"):
        Evaluate(run_dir, dataset=str(tmp_path / "wide.npz")).run()
    assert capsys.readouterr().out == ""


def test_images_of_several_classes_have_no_confusion_matrix(run_dir, tmp_path, small_dataset, monkeypatch, capsys):
    labels = np.stack([small_dataset.test_labels, (small_dataset.test_labels + 1) % 10], axis=1)
    images = small_dataset.test_images
    pairs = make_dataset(images, labels, images, labels, num_classes=10)
    monkeypatch.setattr("capsnet_jax.cli.evaluate.configured_dataset", lambda data: pairs)
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
