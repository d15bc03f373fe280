"""Figures show the images and names that are passed to them."""

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from capsnet_jax.figures import (
    Curves,
    Mistakes,
    activations_figure,
    comparison_figure,
    confusion_figure,
    convergence_figure,
    couplings_figure,
    learning_curves_figure,
    perturbations_figure,
    reconstructions_figure,
    separations_figure,
)
from capsnet_jax.figures.style import WRONG

DIGITS = tuple("0123456789")


def test_images_stand_above_their_reconstructions():
    rng = np.random.default_rng(0)
    images, reconstructions = rng.random((2, 3, 8, 9, 1)).astype(np.float32)
    figure = reconstructions_figure(images, reconstructions, np.array([4, 5, 6]), np.array([4, 7, 6]), DIGITS)
    axes = np.array(figure.axes).reshape(2, 3)
    for column in range(3):
        np.testing.assert_array_equal(axes[0, column].images[0].get_array(), images[column, ..., 0])
        np.testing.assert_array_equal(axes[1, column].images[0].get_array(), reconstructions[column, ..., 0])
        assert axes[0, column].images[0].get_clim() == (0, 1)
    assert [axis.get_title() for axis in axes[0]] == ["4", "5", "6"]
    labels = [axis.xaxis.label for axis in axes[1]]
    assert [label.get_weight() for label in labels] == ["normal", "bold", "normal"]  # also seen in grey
    assert [(label.get_text(), label.get_color()) for label in labels] == [("4", "black"), ("7", WRONG), ("6", "black")]


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_images_of_three_channels_are_in_colour_and_others_are_their_mean_in_grey(channels):
    images = np.random.default_rng(1).random((1, 4, 5, channels)).astype(np.float32)
    figure = reconstructions_figure(images, images, np.array([0]), np.array([0]), DIGITS)
    expected = images[0] if channels == 3 else images[0].mean(axis=-1)
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), expected)


def tiles_of(ax, height: int, width: int) -> np.ndarray:
    """Cut the image that is drawn in axes into `[rows columns height width ...]`, without the gaps of one pixel."""
    image = np.asarray(ax.images[0].get_array())
    rows, columns = (image.shape[0] + 1) // (height + 1), (image.shape[1] + 1) // (width + 1)
    padded = np.pad(image, ((0, 1), (0, 1), *((0, 0) for _ in image.shape[2:])))
    tiles = padded.reshape(rows, height + 1, columns, width + 1, *image.shape[2:]).swapaxes(1, 2)
    return tiles[:, :, :-1, :-1]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_row_of_the_perturbation_grid_has_the_changes_of_one_dimension(channels):
    reconstructions = np.random.default_rng(2).random((4, 5, 6, 7, channels)).astype(np.float32)
    changes = np.array([-0.25, -0.1, 0, 0.05, 0.25])
    (ax,) = perturbations_figure(reconstructions, changes).axes
    drawn = tiles_of(ax, 6, 7)
    np.testing.assert_array_equal(drawn.reshape(4, 5, 6, 7, channels), reconstructions)
    assert ax.images[0].get_clim() == (0, 1)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["-0.25", "-0.10", "0", "+0.05", "+0.25"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "1", "2", "3"]
    np.testing.assert_array_equal(ax.get_yticks(), [2.5, 9.5, 16.5, 23.5])  # at the middle of each row
    np.testing.assert_array_equal(ax.get_xticks(), [3, 11, 19, 27, 35])


def test_couplings_are_drawn_by_iteration_class_group_and_position():
    rng = np.random.default_rng(3)
    couplings, activations = rng.random((2, 3, 4, 5, 6)), rng.random((2, 6))  # 3 x 4 positions, 5 groups, 6 classes
    image = rng.random((8, 9, 1))
    figure = couplings_figure(couplings, activations, image, DIGITS[:6])
    original, *panels, colorbar = figure.axes
    np.testing.assert_array_equal(original.images[0].get_array(), image[..., 0])
    assert len(panels) == 2
    for iteration, panel in enumerate(panels):
        drawn = tiles_of(panel, 3, 4)
        for group in range(5):
            for label in range(6):
                np.testing.assert_array_equal(drawn[label, group], couplings[iteration, :, :, group, label])
        assert panel.get_title() == f"iteration {iteration + 1}"
        assert [text.get_text() for text in panel.get_yticklabels()] == [
            f"{label}  {activations[iteration, label]:.2f}" for label in range(6)
        ]
        assert panel.images[0].get_clim() == (0, couplings.max())  # the same in all panels
    assert colorbar.get_ylabel() == "coupling"


def test_convergence_shows_means_and_a_band_that_holds_most_images():
    rng = np.random.default_rng(4)
    entropies, right, wrong = rng.random((3, 4, 50))
    left, beside = convergence_figure(entropies, right, wrong).axes
    lines = [*left.lines, *beside.lines]
    for line, values, band in zip(
        lines, (entropies, right, wrong), [*left.collections, *beside.collections], strict=True
    ):
        np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3, 4])
        np.testing.assert_allclose(line.get_ydata(), values.mean(axis=1))
        low, high = np.sort(values, axis=1)[:, [4, 45]].T  # about a tenth of the images is outside on either side
        vertices = band.get_paths()[0].vertices
        for number in range(4):
            ends = np.unique(vertices[vertices[:, 0] == number + 1, 1])
            assert low[number] <= ends.min() < np.median(values[number]) < ends.max() <= high[number]
    assert [text.get_text() for text in beside.get_legend().get_texts()] == ["right class", "most active wrong class"]
    assert len({line.get_linestyle() for line in beside.lines}) == 2  # told apart in grey


def test_the_confusion_matrix_shows_counts_and_the_mistakes_beside_it():
    confusion = np.array([[7, 0, 2], [1, 5, 0], [0, 0, 9]])
    images = np.random.default_rng(5).random((3, 4, 5, 1))
    mistakes = Mistakes(images, np.array([0, 1, 0]), np.array([2, 0, 2]), np.array([0.9, 0.75, 0.5]))
    figure = confusion_figure(confusion, ("a", "b", "c"), mistakes)
    axes = [ax for ax in figure.axes if ax.images]
    (matrix,) = (ax for ax in axes if ax.get_xlabel() == "predicted")
    drawn = {text.get_position()[::-1]: text.get_text() for text in matrix.texts}
    assert drawn == {(true, label): str(confusion[true, label]) for true, label in np.argwhere(confusion)}
    np.testing.assert_allclose(matrix.images[0].get_array(), confusion / confusion.sum(axis=1, keepdims=True))
    shown = [(ax.get_title(), ax.images[0].get_array()) for ax in axes if ax.get_title()]
    assert [title for title, _ in sorted(shown, key=lambda pair: pair[0][-4:], reverse=True)] == [
        "a as c, 0.90",
        "b as a, 0.75",
        "a as c, 0.50",
    ]
    np.testing.assert_array_equal(
        [pixels for _, pixels in sorted(shown, key=lambda pair: -float(pair[0][-4:]))], images[..., 0]
    )


def test_a_matrix_without_mistakes_stands_alone_and_in_axes_of_the_user():
    confusion = np.array([[7, 0], [1, 5]])
    none = Mistakes(np.zeros((0, 4, 5, 1)), *np.zeros((2, 0), int), np.zeros(0))
    assert len(confusion_figure(np.diag([3, 4]), ("a", "b"), none).axes) == 2  # matrix and colour bar
    figure = Figure()
    other, ax = figure.subplots(1, 2)
    assert confusion_figure(confusion, ("a", "b"), ax=ax) is figure
    assert [text.get_text() for text in ax.texts] == ["7", "1", "5"]
    assert not other.has_data()


def test_histograms_count_every_activation_once():
    rng = np.random.default_rng(6)
    right, wrong = rng.beta(8, 1, 200), rng.beta(1, 8, 300)
    figure = Figure()
    ax = figure.subplots()
    assert activations_figure(right, wrong, ax=ax) is figure
    for patch, values in zip(ax.patches, (right, wrong), strict=True):
        counts, _ = np.histogram(values, 40, (0, 1))
        np.testing.assert_array_equal(patch.get_xy()[1:81:2, 1], counts)  # two corners at the top of each bin
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["right class", "most active wrong class"]
    assert [bool(patch.get_hatch()) for patch in ax.patches] == [False, True]  # told apart in grey


def test_separations_are_drawn_in_two_colours_that_add_up_to_white():
    rng = np.random.default_rng(7)
    images, separations = rng.random((3, 4, 5, 1)), rng.random((3, 2, 4, 5, 1))
    separations[0, 0], separations[0, 1], separations[1] = 1, 0, 1  # only the first capsule, and both
    labels, predictions = np.array([[1, 2], [3, 4], [5, 6]]), np.array([[1, 2], [4, 3], [5, 0]])
    (ax,) = separations_figure(images, separations, labels, predictions, DIGITS).axes
    image, both, first, second = tiles_of(ax, 4, 5)
    np.testing.assert_allclose(image, images * np.ones(3))
    orange, blue = np.array([1, 0.65, 0]), np.array([0, 0.35, 1])
    np.testing.assert_allclose(first, separations[:, 0] * orange)
    np.testing.assert_allclose(second, separations[:, 1] * blue)
    np.testing.assert_allclose(both, first + second)
    assert (both[0] == orange).all()
    assert (both[1] == 1).all()
    assert orange.mean() != blue.mean()
    ticks = ax.get_xticklabels()
    assert [tick.get_text() for tick in ticks] == ["1 2\n1 2", "4 3\n3 4", "5 0\n5 6"]
    assert [tick.get_weight() for tick in ticks] == ["normal", "normal", "bold"]


def test_seeds_are_a_mean_and_a_band_from_the_lowest_to_the_highest():
    rng = np.random.default_rng(8)
    seeds = []
    for epochs in (3, 3, 2):  # one was stopped
        chunks, losses, validation, test = (np.c_[np.arange(1.0, epochs + 1), rng.random(epochs)] for _ in range(4))
        seeds.append(Curves(chunks, losses, validation, test))
    losses, errors = learning_curves_figure({"one": seeds, "alone": seeds[:1]}).axes
    for ax, lines, fields in ((losses, losses.lines[3:4], (1,)), (errors, errors.lines[:2], (2, 3))):
        for line, band, field in zip(lines, ax.collections, fields, strict=True):
            values = np.array([curves[field][:2, 1] for curves in seeds])
            np.testing.assert_array_equal(line.get_xdata(), [1, 2])
            np.testing.assert_allclose(line.get_ydata(), values.mean(axis=0))
            vertices = band.get_paths()[0].vertices
            for number in (1, 2):
                ends = vertices[vertices[:, 0] == number, 1]
                assert (ends.min(), ends.max()) == (values[:, number - 1].min(), values[:, number - 1].max())
    for points, line in zip([curves.chunk_losses for curves in seeds], losses.lines, strict=False):
        np.testing.assert_array_equal(line.get_xydata(), points)


NAME = r"$\foo$ [/x]"  # no formula, and not one that matplotlib could draw


def learning_curves() -> Figure:
    points = np.array([[1.0, 2.0], [2.0, 1.0]])
    return learning_curves_figure({NAME: [Curves(points, points, points[:0], points)]})


@pytest.mark.parametrize(
    "draw",
    [
        learning_curves,
        lambda: comparison_figure({NAME: np.array([[3.0, 2.0], [4.0, 1.0]])}, {}),
        lambda: comparison_figure({"a": np.array([[3.0, 2.0]])}, {NAME: "diverged at step 7"}),
        lambda: confusion_figure(np.array([[3, 1], [0, 2]]), ("a", NAME)),
        lambda: couplings_figure(np.ones((1, 2, 2, 3, 1)), np.ones((1, 1)), np.ones((4, 4, 1)), (NAME,)),
        lambda: separations_figure(
            np.ones((1, 4, 4, 1)), np.ones((1, 2, 4, 4, 1)), np.array([[0, 1]]), np.array([[0, 1]]), ("a", NAME)
        ),
    ],
)
def test_names_are_drawn_as_they_are(draw):
    figure = draw()
    figure.savefig(io.BytesIO(), format="svg")
    drawn = [text for text in figure.findobj(Text) if NAME in text.get_text()]
    assert drawn
    assert not any(text.get_parse_math() for text in drawn)
