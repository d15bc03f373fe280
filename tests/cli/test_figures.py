"""The command `figures`: the figures of a run show what its model computes, or are left out with the reason."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from flax import nnx
from matplotlib.figure import Figure

from capsnet_jax.cli.figures import FIGURES, Figures, Subject
from capsnet_jax.cli.main import main
from capsnet_jax.cli.report import runs_of
from capsnet_jax.config import Config, DataConfig, ModelConfig
from capsnet_jax.data import load_dataset
from capsnet_jax.ops import to_unit_range
from capsnet_jax.runs.folder import Run, load_run
from capsnet_jax.runs.metrics import read_metrics
from capsnet_jax.train.evaluation import evaluate, mean_coupling_entropy, predict
from tests.conftest import SMALL
from tests.tiny_run import printed

PAGE = Path(__file__).parents[2] / "docs" / "figures.md"
IMAGE = 3


@pytest.fixture(scope="module")
def drawn(tiny_run, tmp_path_factory):
    """Folder of all figures of the tiny run, and what the command printed."""
    output = tmp_path_factory.mktemp("drawn") / "new" / "$x_{$"
    return output, printed("figures", str(tiny_run.folder), "--output", str(output))


@pytest.fixture(scope="module")
def subject(tiny_run):
    return Subject([tiny_run.folder], Figures(tiny_run.folder, image=IMAGE))


def write_run(folder, model: ModelConfig, images, labels) -> str:
    """Write a run with random weights and without metrics, on a data set in an .npz file."""
    np.savez(folder / "data.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    dataset = load_dataset(folder / "data.npz")
    run = Run.of(folder / "run", Config(model, DataConfig(str(folder / "data.npz"))), dataset)
    run.write_config()
    run.save_weights(run.new_model())
    return str(run.folder)


def test_every_figure_is_written_as_png_and_svg_or_left_out_with_the_reason(drawn):
    output, lines = drawn
    expected = {name: f"{output / name}.png and .svg" for name in FIGURES}
    expected["separations"] = "No separations: images have 1 label each, and two colours show two labels."
    assert lines == list(expected.values())
    names = set(FIGURES) - {"separations"}
    assert {path.name for path in output.iterdir()} == {
        f"{name}{suffix}" for name in names for suffix in (".png", ".svg")
    }
    for name in names:
        assert len(np.unique(matplotlib.image.imread(output / f"{name}.png"))) > 20
        assert ElementTree.parse(output / f"{name}.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_couplings_are_those_of_route_and_the_image_is_the_chosen_one(subject, small_dataset):
    figure = FIGURES["couplings"](subject)
    image = to_unit_range(jnp.asarray(small_dataset.test_images[IMAGE : IMAGE + 1]))
    routed = nnx.jit(lambda model, images: model.route(images)[-1])(subject.model, image)
    original, *panels, _ = figure.axes
    np.testing.assert_allclose(original.images[0].get_array(), image[0, ..., 0])
    assert len(panels) == 3
    last = np.asarray(panels[-1].images[0].get_array())  # 10 classes x 2 groups, of 3 x 4 positions
    tiles = np.pad(last, ((0, 1), (0, 1))).reshape(10, 4, 2, 5)[:, :3, :, :4]
    expected = np.asarray(routed.couplings).reshape(3, 4, 2, 10)  # as docs/python.md says
    np.testing.assert_allclose(tiles, expected.transpose(3, 0, 2, 1), rtol=1e-4)
    labels = [text.get_text() for text in panels[-1].get_yticklabels()]
    assert labels == [f"{label}  {float(routed.activations[0, label]):.2f}" for label in range(10)]


def test_convergence_ends_at_the_entropy_and_the_activations_of_the_model(subject, small_dataset):
    entropies, activations = FIGURES["convergence"](subject).axes
    values = entropies.lines[0].get_ydata()
    np.testing.assert_allclose(
        values[[0, -1]], [1, mean_coupling_entropy(subject.model, small_dataset.test_images)], rtol=1e-5
    )
    evaluation = evaluate(subject.model, small_dataset.test_images, small_dataset.test_labels)
    right, wrong = (line.get_ydata()[-1] for line in activations.lines)
    assert (right, wrong) == pytest.approx((evaluation.right_activation, evaluation.runner_up_activation), rel=1e-4)


def test_the_perturbation_grid_has_the_reconstruction_of_the_image_in_its_middle_column(subject):
    (ax,) = FIGURES["perturbations"](subject).axes
    tiles = np.pad(np.asarray(ax.images[0].get_array()), ((0, 1), (0, 1))).reshape(5, 10, 11, 12)[:, :9, :, :11]
    output = nnx.jit(subject.model)(to_unit_range(jnp.asarray(subject.image)))
    for row in range(5):
        np.testing.assert_allclose(tiles[row, :, 5], output.reconstructions[0, ..., 0], rtol=1e-4)
    ticks = [text.get_text() for text in ax.get_xticklabels()]
    assert ticks == ["-0.25", "-0.20", "-0.15", "-0.10", "-0.05", "0", "+0.05", "+0.10", "+0.15", "+0.20", "+0.25"]


def test_confusions_and_the_worst_mistakes_are_those_of_evaluate(subject, small_dataset):
    axes = [ax for ax in FIGURES["confusion"](subject).axes if ax.images]
    images, labels = small_dataset.test_images, small_dataset.test_labels
    activations = predict(subject.model, images).activations
    confusion = evaluate(subject.model, images, labels).confusion
    (matrix,) = (ax for ax in axes if ax.get_xlabel() == "predicted")
    counts = np.zeros((10, 10), int)
    for text in matrix.texts:
        counts[text.get_position()[::-1]] = int(text.get_text())
    np.testing.assert_array_equal(counts, confusion)
    lead = activations.max(axis=1) - activations[np.arange(23), labels]
    worst = np.argsort(-lead)[: min(12, np.sum(lead > 0))]
    expected = {
        f"{labels[index]} as {activations[index].argmax()}, {activations[index].max():.2f}": images[index, ..., 0] / 255
        for index in worst
    }
    shown = {ax.get_title(): ax.images[0].get_array() for ax in axes if ax is not matrix and ax.get_title()}
    assert set(shown) == set(expected)
    assert len(shown) > 3
    for title, image in expected.items():
        np.testing.assert_allclose(shown[title], image, rtol=1e-6)


def test_histograms_are_of_all_test_images(subject, small_dataset):
    (ax,) = FIGURES["activations"](subject).axes
    assert [patch.get_xy()[1:81:2, 1].sum() for patch in ax.patches] == [23, 23]


def test_learning_curves_of_several_seeds_have_a_band(tiny_run, tmp_path):
    for seed in (0, 1):
        shutil.copytree(tiny_run.folder, tmp_path / "runs" / f"seed-{seed}")
    lines = printed("figures", str(tmp_path / "runs"), "--only", "learning_curves")
    assert lines == [f"{tmp_path / 'runs' / 'figures' / 'learning_curves'}.png and .svg"]
    assert (tmp_path / "runs" / "figures" / "learning_curves.png").exists()
    folders = runs_of(tmp_path / "runs")
    losses, errors = FIGURES["learning_curves"](Subject(folders, Figures(tmp_path / "runs"))).axes
    epochs = read_metrics(tiny_run.folder, "epoch")
    np.testing.assert_allclose(losses.lines[2].get_ydata(), [line["loss"] for line in epochs])
    np.testing.assert_allclose(errors.lines[1].get_ydata(), [100 * (1 - line["test_accuracy"]) for line in epochs])
    assert len(losses.collections) == 1


def test_images_of_two_classes_are_separated_and_have_no_confusion_matrix(tmp_path):
    """By a model without iterations, from a run without metrics."""
    rng = np.random.default_rng(0)
    labels = np.array([[0, 1], [1, 2], [2, 0], [1, 0], [0, 2]])
    folder = write_run(
        tmp_path, ModelConfig(**SMALL, routing="uniform"), rng.integers(0, 256, (5, 9, 11), np.uint8), labels
    )
    names = ("separations", "confusion", "convergence", "learning_curves")
    assert printed("figures", folder, "--only", *names, "--output", str(tmp_path / "drawn")) == [
        f"{tmp_path / 'drawn' / 'separations'}.png and .svg",
        "No confusion: images have 2 labels each, for which there is no confusion matrix.",
        "No convergence: routing uniform has no option num_iterations.",
        f"No learning_curves: {folder} has no metrics.jsonl.",
    ]
    _, model = load_run(tmp_path / "run")
    subject = Subject([tmp_path / "run"], Figures(tmp_path / "run"))
    (ax,) = FIGURES["separations"](subject).axes
    tiles = np.pad(np.asarray(ax.images[0].get_array()), ((0, 1), (0, 1), (0, 0))).reshape(4, 10, 5, 12, 3)[
        :, :9, :, :11
    ]
    output = nnx.jit(model)(to_unit_range(jnp.asarray(subject.dataset.test_images)))  # of the most active class
    orange = np.array([1, 0.65, 0])
    np.testing.assert_allclose(tiles[2].transpose(1, 0, 2, 3), output.reconstructions * orange, rtol=1e-4)
    np.testing.assert_allclose(tiles[1], tiles[2] + tiles[3], rtol=1e-5)
    right = FIGURES["activations"](subject).axes[0].patches[0]
    assert right.get_xy()[1:81:2, 1].sum() == 10


def test_what_does_not_suit_a_model_is_left_out(tmp_path):
    images = np.random.default_rng(0).random((3, 9, 11, 2)).astype(np.float32)
    config = replace(ModelConfig(**SMALL), decoder_hidden=None, num_iterations=1)
    folder = write_run(tmp_path, config, images, np.arange(3))
    assert printed("figures", folder, "--only", "reconstructions", "perturbations", "separations", "convergence") == [
        "No reconstructions: the model has no decoder.",
        "No perturbations: the model has no decoder.",
        "No separations: the model has no decoder.",
        "No convergence: routing dynamic has only one iteration.",
    ]


def test_the_code_of_the_page_draws_the_figures(tiny_run, small_dataset, tmp_path, monkeypatch):
    """On the tiny run, whose programs are compiled already."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_run.folder, "runs/digits")
    monkeypatch.setattr("capsnet_jax.load_dataset", lambda name: small_dataset)
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    *lines, last = code.strip().splitlines()
    values: dict = {}
    exec(compile("\n".join([*lines, f"figure = {last}"]), PAGE.name, "exec"), values)
    assert values["iterations"].couplings.shape == (8, 3, 3, 4, 2, 10)
    assert isinstance(values["figure"], Figure)
    drawn = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), flags=re.MULTILINE)
    assert drawn == list(FIGURES)


def fails(capsys, *arguments: str) -> str:
    assert main(["figures", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("capsnet: error: ")
    assert error.count("\n") == 1
    return error


def test_mistakes_are_answered_in_a_sentence(tiny_run, tmp_path, capsys):
    run = str(tiny_run.folder)
    assert "nowhere is not the folder of a run" in fails(capsys, str(tmp_path / "nowhere"))
    assert list(tmp_path.iterdir()) == []
    error = fails(capsys, run, "--only", "pictures")
    assert "only" in error
    assert "pictures" in error
    assert all(name in error for name in FIGURES)
    (tmp_path / "file").touch()
    assert f"The output folder {tmp_path / 'file'} cannot be written: File exists." in fails(
        capsys, run, "--output", str(tmp_path / "file")
    )
    error = fails(capsys, run, "--image", "23", "--only", "couplings", "--output", str(tmp_path / "new"))
    assert "image is 23; expected 0 to 22, as there are 23 test images." in error
    assert "does not exist" in fails(
        capsys, run, "--data-dir", str(tmp_path / "none"), "--output", str(tmp_path / "new")
    )
