"""Figures show the images and names that are passed to them."""

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from capsnet_jax.figures import (
    Curves,
    comparison_figure,
    confusion_figure,
    learning_curves_figure,
    reconstructions_figure,
)


def test_images_stand_above_their_reconstructions():
    rng = np.random.default_rng(0)
    images, reconstructions = rng.random((2, 3, 8, 9, 1)).astype(np.float32)
    figure = reconstructions_figure(images, reconstructions, np.array([4, 5, 6]), np.array([4, 7, 6]))
    axes = np.array(figure.axes).reshape(2, 3)
    for column in range(3):
        np.testing.assert_array_equal(axes[0, column].images[0].get_array(), images[column, ..., 0])
        np.testing.assert_array_equal(axes[1, column].images[0].get_array(), reconstructions[column, ..., 0])
        assert axes[0, column].images[0].get_clim() == (0, 1)
    assert [axis.get_title() for axis in axes[0]] == ["4", "5", "6"]
    labels = [axis.xaxis.label for axis in axes[1]]
    assert [(label.get_text(), label.get_color()) for label in labels] == [("4", "black"), ("7", "red"), ("6", "black")]


def test_colour_images_keep_their_channels():
    images = np.random.default_rng(1).random((1, 4, 5, 3)).astype(np.float32)
    figure = reconstructions_figure(images, images, np.array([0]), np.array([0]))
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), images[0])


NAME = r"$\foo$ [/x]"  # no formula, and not one that matplotlib could draw


def learning_curves() -> Figure:
    points = np.array([[1.0, 2.0], [2.0, 1.0]])
    return learning_curves_figure({NAME: Curves(points, points, points[:0], points)})


@pytest.mark.parametrize(
    "draw",
    [
        learning_curves,
        lambda: comparison_figure({NAME: np.array([[3.0, 2.0], [4.0, 1.0]])}, {}),
        lambda: comparison_figure({"a": np.array([[3.0, 2.0]])}, {NAME: "diverged at step 7"}),
        lambda: confusion_figure(np.array([[3, 1], [0, 2]]), ("a", NAME)),
    ],
)
def test_names_are_drawn_as_they_are(draw):
    figure = draw()
    figure.savefig(io.BytesIO(), format="svg")
    drawn = [text for text in figure.findobj(Text) if NAME in text.get_text()]
    assert drawn
    assert not any(text.get_parse_math() for text in drawn)
