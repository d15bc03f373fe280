"""Data sets made from MNIST, the same everywhere: two digits over each other, and digits under affine maps."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int, UInt8
from numpy.lib.stride_tricks import sliding_window_view

from capsnet_jax.data.dataset import Dataset, make_dataset
from capsnet_jax.errors import UsageError

DIGIT_SHAPE = (28, 28, 1)
# The legacy generator is the one whose numbers NumPy promises to keep.
TRAIN_SEED, TEST_SEED = 0, 1

# Sabour et al., research/capsules/input_data/mnist/mnist_shift.py: pad, shift.
OVERLAP_PAD, OVERLAP_SHIFT = 4, 6

AFFINE_SIDE, AFFINE_PAD = 40, 6
ROTATION, SHEAR, SCALE = 20.0, 0.2, (0.8, 1.2)  # degrees, pixels per pixel, factors


def multi_mnist(mnist: Dataset) -> Dataset:
    """Images of 36 x 36 that each show two digits of different classes; labels are `[images 2]`.

    For each image of a split there is one in which a second digit, drawn from all those of other classes in the same
    split, is added to it, with 255 as the largest value. Both are padded by 4 pixels first, and shifted apart by whole
    offsets, each uniform in -6 to 6 on both axes; what leaves the image is lost. The first label is that of the image
    itself. An answer is right if both classes are the two most active.

    With a validation split, a digit of a validation image may be in a training image, too, beside another one.

    References:
        Sabour, Frosst, Hinton (2017), section 6, by the authors' code, https://github.com/Sarasra/models,
        research/capsules, which shifts by up to 6 pixels where the paper says 4. Theirs has many pairs for each digit;
        this has one.

    Raises:
        UsageError: the images are not of 28 x 28, or a split has one class only.
    """
    _check_digits("multi_mnist", mnist)
    return make_dataset(
        *overlapping_pairs(mnist.train_images, mnist.train_labels, np.random.RandomState(TRAIN_SEED)),
        *overlapping_pairs(mnist.test_images, mnist.test_labels, np.random.RandomState(TEST_SEED)),
        num_classes=mnist.num_classes,
        class_names=mnist.class_names,
    )


def overlapping_pairs(
    images: UInt8[np.ndarray, "images height width 1"], labels: Int[np.ndarray, " images"], rng: np.random.RandomState
) -> tuple[UInt8[np.ndarray, "images padded_height padded_width 1"], Int[np.ndarray, "images 2"]]:
    """Each image with another one of a different class over it, and both labels.

    Raises:
        UsageError: all images are of one class.
    """
    by_class = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    starts = np.cumsum(counts) - counts
    if counts.max() == len(labels):
        raise UsageError(f"All images of a split are of class {labels[0]}; expected a second class to pair them with.")
    ranks = rng.randint(0, len(labels) - counts[labels])  # among the images of other classes
    seconds = by_class[ranks + (ranks >= starts[labels]) * counts[labels]]
    below, above = (_padded_and_shifted(digits, rng) for digits in (images, images[seconds]))
    return below + np.minimum(above, 255 - below), np.stack([labels, labels[seconds]], axis=1)


def _padded_and_shifted(
    images: UInt8[np.ndarray, "images height width 1"], rng: np.random.RandomState
) -> UInt8[np.ndarray, "images padded_height padded_width 1"]:
    down, right = rng.randint(-OVERLAP_SHIFT, OVERLAP_SHIFT + 1, (2, len(images)))
    margin = OVERLAP_PAD + OVERLAP_SHIFT
    padded = np.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    height, width = (size + 2 * OVERLAP_PAD for size in images.shape[1:3])
    windows = sliding_window_view(padded[..., 0], (height, width), axis=(1, 2))
    return windows[np.arange(len(images)), OVERLAP_SHIFT - down, OVERLAP_SHIFT - right, :, :, None]


def affine_mnist(mnist: Dataset) -> Dataset:
    """Images of 40 x 40: MNIST to train on, and MNIST under random affine maps to be tested on.

    Training images are padded by 6 pixels on each side; the papers train on them shifted by up to 6 pixels. Test images
    are rotated by up to 20 degrees either way, sheared by up to 0.2 either way and scaled by 0.8 to 1.2, vertically and
    horizontally apart, all uniform, and moved to any place, by whole pixels, where the digit is inside.

    This is made in the manner of affNIST and is not affNIST: its files have other digits, drawn by other random numbers
    and interpolation, so that accuracies are close to those on it but not comparable in detail.

    References:
        Tieleman, affNIST, https://www.cs.toronto.edu/~tijmen/affNIST: the ranges.
        Sabour, Frosst, Hinton (2017), section 5.2: training on padded and shifted MNIST only.

    Raises:
        UsageError: the images are not of 28 x 28, or a digit does not fit into 40 x 40 after its map.
    """
    _check_digits("affine_mnist", mnist)
    pad = (AFFINE_PAD, AFFINE_PAD)
    return make_dataset(
        np.pad(mnist.train_images, ((0, 0), pad, pad, (0, 0))),
        mnist.train_labels,
        affine_images(mnist.test_images, np.random.RandomState(TEST_SEED)),
        mnist.test_labels,
        num_classes=mnist.num_classes,
        class_names=mnist.class_names,
    )


def affine_images(
    images: UInt8[np.ndarray, "images height width 1"], rng: np.random.RandomState
) -> UInt8[np.ndarray, "images 40 40 1"]:
    """Each image under its own random linear map, at a random place.

    Raises:
        UsageError: an image does not fit.
    """
    matrices = random_matrices(len(images), rng)
    moved = np.zeros((len(images), AFFINE_SIDE, AFFINE_SIDE, 1), np.uint8)
    canvas = 2 * max(images.shape[1:3])  # more than any of the maps fills
    for number, (image, matrix) in enumerate(zip(images, matrices, strict=True)):
        mapped = mapped_image(image[..., 0], matrix, canvas)
        digit = _without_margins(mapped)
        height, width = digit.shape
        if max(height, width) > AFFINE_SIDE:
            raise UsageError(
                f"Test image {number} of affine_mnist has a digit of {height} x {width} pixels after its map; expected "
                f"one that fits into {AFFINE_SIDE} x {AFFINE_SIDE}."
            )
        top, left = rng.randint(0, AFFINE_SIDE + 1 - np.array([height, width]))
        moved[number, top : top + height, left : left + width, 0] = digit
    return moved


def random_matrices(count: int, rng: np.random.RandomState) -> Float[np.ndarray, "count 2 2"]:
    """Linear maps of (row, column): scaled along both axes, then sheared along rows, then rotated."""
    angle = np.deg2rad(rng.uniform(-ROTATION, ROTATION, count))
    shear = rng.uniform(-SHEAR, SHEAR, count)
    vertical, horizontal = rng.uniform(*SCALE, (2, count))
    zero = np.zeros(count)
    cosine, sine = np.cos(angle), np.sin(angle)
    rotation = np.array([[cosine, -sine], [sine, cosine]])
    sheared_and_scaled = np.array([[vertical, zero], [shear * vertical, horizontal]])
    return np.einsum("abn,bcn->nac", rotation, sheared_and_scaled)


def mapped_image(
    image: UInt8[np.ndarray, "height width"], matrix: Float[np.ndarray, "2 2"], side: int
) -> UInt8[np.ndarray, "side side"]:
    """The image under a linear map of (row, column) about its centre, which becomes that of side x side pixels.

    Bilinear between pixels, and zero outside of the image.
    """
    from scipy import ndimage  # slow to import, and needed here only

    back = np.linalg.inv(matrix)
    centre, new_centre = (np.array(image.shape) - 1) / 2, np.full(2, (side - 1) / 2)
    mapped = ndimage.affine_transform(
        image.astype(np.float64),
        back,
        centre - back @ new_centre,
        output_shape=(side, side),
        order=1,
        mode="grid-constant",
    )
    return np.round(mapped).astype(np.uint8)


def _without_margins(image: UInt8[np.ndarray, "height width"]) -> UInt8[np.ndarray, "inner_height inner_width"]:
    rows, columns = np.nonzero(image)
    if len(rows) == 0:
        return image[:0, :0]
    return image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def _check_digits(name: str, mnist: Dataset) -> None:
    if mnist.image_shape != DIGIT_SHAPE:
        raise UsageError(f"{name} is made from images of {DIGIT_SHAPE}; mnist has {mnist.image_shape}.")


SYNTHETIC_DATASETS: dict[str, Callable[[Dataset], Dataset]] = {"multi_mnist": multi_mnist, "affine_mnist": affine_mnist}
