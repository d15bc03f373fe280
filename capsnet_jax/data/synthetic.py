"""Data sets made from MNIST, the same on every machine: overlapping pairs of digits, and affine-transformed digits."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int, UInt8
from numpy.lib.stride_tricks import sliding_window_view

from capsnet_jax.data.dataset import Dataset
from capsnet_jax.errors import UsageError

Digits = UInt8[np.ndarray, "images height width 1"]

DIGIT_SHAPE = (28, 28, 1)
# NumPy promises never to change the numbers of its legacy generator, which is used below.
TRAIN_SEED, TEST_SEED = 0, 1

# Sabour et al., research/capsules/input_data/mnist/mnist_shift.py: pad, shift.
OVERLAP_PAD, OVERLAP_SHIFT = 4, 6

AFFINE_SIDE, AFFINE_PAD = 40, 6
ROTATION, SHEAR, SCALE = 20.0, 0.2, (0.8, 1.2)  # degrees, pixels per pixel, factors


def multi_mnist(mnist: Dataset) -> Dataset:
    """Make images of 36 x 36 that show two overlapping digits of different classes, with labels `[images 2]`.

    Each image of a split is paired with a random image of another class in the same split. Both are padded by 4
    pixels, shifted by whole offsets uniform in -6 to 6 along both axes, and added, with 255 as the largest value;
    pixels shifted out of the image are lost. The first label belongs to the image itself. A prediction is right if
    the two most active classes are both labels.

    A digit may be in a validation image and, paired differently, in a training image.

    References:
        Sabour, Frosst, Hinton, "Dynamic Routing Between Capsules" (2017), section 6.
        The authors' code, https://github.com/Sarasra/models, research/capsules, shifts by up to 6 pixels; the paper
        says 4. The authors make many pairs for each digit; this function makes one.

    Raises:
        UsageError: the images are not 28 x 28, or a split has only one class.
    """
    _check_digits("multi_mnist", mnist)
    train = overlapping_pairs(mnist.train_images, mnist.train_labels, np.random.RandomState(TRAIN_SEED))
    test = overlapping_pairs(mnist.test_images, mnist.test_labels, np.random.RandomState(TEST_SEED))
    return Dataset(*train, *test, mnist.class_names)


def overlapping_pairs(
    images: Digits, labels: Int[np.ndarray, " images"], rng: np.random.RandomState
) -> tuple[UInt8[np.ndarray, "images padded_height padded_width 1"], Int[np.ndarray, "images 2"]]:
    """Overlay each image with another one of a different class, and return the images and both labels.

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
    images: Digits, rng: np.random.RandomState
) -> UInt8[np.ndarray, "images padded_height padded_width 1"]:
    down, right = rng.randint(-OVERLAP_SHIFT, OVERLAP_SHIFT + 1, (2, len(images)))
    margin = OVERLAP_PAD + OVERLAP_SHIFT
    padded = np.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    height, width = (size + 2 * OVERLAP_PAD for size in images.shape[1:3])
    windows = sliding_window_view(padded[..., 0], (height, width), axis=(1, 2))
    return windows[np.arange(len(images)), OVERLAP_SHIFT - down, OVERLAP_SHIFT - right, :, :, None]


def affine_mnist(mnist: Dataset) -> Dataset:
    """Make images of 40 x 40: padded MNIST for training, and MNIST under random affine maps for testing.

    Training images are padded by 6 pixels on each side; the papers train on them shifted by up to 6 pixels. Test
    images are rotated by up to 20 degrees, sheared by up to 0.2 and scaled by 0.8 to 1.2 along each axis, uniformly.
    They are then moved by whole pixels to a uniformly random place where the whole digit is inside.

    This follows affNIST but is not affNIST: other digits, random numbers and interpolation were used for its files.
    Accuracies are close to those on affNIST, but not comparable in detail.

    References:
        Tieleman, affNIST, https://www.cs.toronto.edu/~tijmen/affNIST, for the ranges.
        Sabour, Frosst, Hinton (2017), section 5.2, for training on padded and shifted MNIST only.

    Raises:
        UsageError: the images are not 28 x 28, or a digit does not fit into 40 x 40 after its map.
    """
    _check_digits("affine_mnist", mnist)
    pad = (AFFINE_PAD, AFFINE_PAD)
    train_images = np.pad(mnist.train_images, ((0, 0), pad, pad, (0, 0)))
    test_images = affine_images(mnist.test_images, np.random.RandomState(TEST_SEED))
    return Dataset(train_images, mnist.train_labels, test_images, mnist.test_labels, mnist.class_names)


def affine_images(images: Digits, rng: np.random.RandomState) -> UInt8[np.ndarray, "images 40 40 1"]:
    """Transform each image by a random linear map of its own, and move it to a random place.

    Raises:
        UsageError: a transformed digit does not fit.
    """
    from scipy import ndimage  # slow to import

    matrices = random_matrices(len(images), rng)
    moved = np.zeros((len(images), AFFINE_SIDE, AFFINE_SIDE, 1), np.uint8)
    canvas = 2 * max(images.shape[1:3])  # larger than any transformed image
    for number, (image, matrix) in enumerate(zip(images, matrices, strict=True)):
        mapped = mapped_image(image[..., 0], matrix, canvas)
        digit = mapped[ndimage.find_objects((mapped > 0).astype(int))[0]] if mapped.any() else mapped[:0, :0]
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
    """Draw linear maps of (row, column): scale along both axes, then shear along rows, then rotate."""
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
    """Transform an image by a linear map of (row, column) about its centre, into one of `side` x `side` pixels.

    Interpolation is bilinear, and pixels outside of the image are zero.
    """
    from scipy import ndimage  # slow to import

    back = np.linalg.inv(matrix)
    centre, new_centre = (np.array(image.shape) - 1) / 2, np.full(2, (side - 1) / 2)
    offset, shape = centre - back @ new_centre, (side, side)
    mapped = ndimage.affine_transform(image.astype(float), back, offset, shape, order=1, mode="grid-constant")
    return np.round(mapped).astype(np.uint8)


def _check_digits(name: str, mnist: Dataset) -> None:
    if mnist.image_shape != DIGIT_SHAPE:
        raise UsageError(f"{name} is made from images of {DIGIT_SHAPE}; mnist has {mnist.image_shape}.")


SYNTHETIC_DATASETS: dict[str, Callable[[Dataset], Dataset]] = {"multi_mnist": multi_mnist, "affine_mnist": affine_mnist}
