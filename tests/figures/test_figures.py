"""Figures show the images that are passed to them."""

import numpy as np

from capsnet_jax.figures import reconstructions_figure


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
