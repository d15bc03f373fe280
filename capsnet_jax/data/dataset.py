"""Data sets in memory: their arrays, splits and checks."""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Shaped
from numpy.typing import ArrayLike

from capsnet_jax.errors import UsageError

VALIDATION_SEED = 0
SPLIT_ARRAYS = ("training images", "training labels", "test images", "test labels")


class Dataset(NamedTuple):
    """Labelled images for training, test and, optionally, validation; `make_dataset` makes one from your own arrays.

    Images are uint8, or float32 in [0, 1]. Labels are class indices: one for each image, or k different ones. All
    images have the same shape, except that training images may be larger if crops are drawn from them.

    Attributes:
        train_images: training images.
        train_labels: their labels, `[train]` or `[train k]`.
        test_images: test images.
        test_labels: their labels.
        class_names: name of each class.
        validation_images: images held out of the training images; None without a validation split.
        validation_labels: their labels, or None.

    Examples:
        >>> import numpy as np
        >>> from capsnet_jax.data import make_dataset
        >>> images, labels = np.zeros((6, 8, 8, 1), np.uint8), np.array([0, 1, 2, 0, 1, 2])
        >>> dataset = make_dataset(images, labels, images[:3], labels[:3], num_classes=3)
        >>> dataset.image_shape, dataset.num_classes
        ((8, 8, 1), 3)
        >>> np.bincount(dataset.with_validation(0.5).validation_labels)  # stratified
        array([1, 1, 1])
    """

    train_images: Shaped[np.ndarray, "train train_height train_width channels"]
    train_labels: Int32[np.ndarray, "train *k"]
    test_images: Shaped[np.ndarray, "test height width channels"]
    test_labels: Int32[np.ndarray, "test *k"]
    class_names: tuple[str, ...]
    validation_images: Shaped[np.ndarray, "validation height width channels"] | None = None
    validation_labels: Int32[np.ndarray, "validation *k"] | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images that a model sees, which are those of the test images."""
        height, width, channels = self.test_images.shape[1:]
        return height, width, channels

    def checksum(self) -> int:
        """Compute a CRC-32 of all images and labels, in their order."""
        checksum = 0
        for array in self[:4] + self[5:]:
            if array is not None:
                checksum = zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data, checksum)
        return checksum

    def limited(self, train_limit: int | None) -> "Dataset":
        """Keep only the first `train_limit` training images; None keeps all.

        Raises:
            UsageError: there are fewer training images.
        """
        if train_limit is not None and train_limit > len(self.train_images):
            raise UsageError(f"train_limit is {train_limit}, with only {len(self.train_images)} training images.")
        return self._replace(train_images=self.train_images[:train_limit], train_labels=self.train_labels[:train_limit])

    def with_validation(self, fraction: float) -> "Dataset":
        """Hold out a fraction of the training images as validation split; 0 for none.

        The choice is random but always the same, and keeps the order of the images. With one label per image it is
        stratified: each class gives the same fraction of its images, to within one.

        Raises:
            UsageError: the fraction is not in [0, 1), or either split would be empty.
        """
        if not 0 <= fraction < 1:
            raise UsageError(f"validation is {fraction}, and must be at least 0 and less than 1.")
        if fraction == 0:
            return self
        total = len(self.train_images)
        num_held_out = round(fraction * total)
        if not 0 < num_held_out < total:
            raise UsageError(
                f"validation is {fraction}, which makes {num_held_out} of {total} training images the validation "
                "images; expected some of them, and not all."
            )
        # NumPy promises never to change the numbers of this legacy generator.
        order = np.random.RandomState(VALIDATION_SEED).permutation(total)
        if self.train_labels.ndim == 1:
            order = order[np.argsort(self.train_labels[order], kind="stable")]
        is_held_out = np.zeros(total, bool)
        evenly_spaced = (2 * np.arange(num_held_out) + 1) * total // (2 * num_held_out)
        is_held_out[order[evenly_spaced]] = True
        return self._replace(
            train_images=self.train_images[~is_held_out],
            train_labels=self.train_labels[~is_held_out],
            validation_images=self.train_images[is_held_out],
            validation_labels=self.train_labels[is_held_out],
        )

    def transposed(self) -> "Dataset":
        """Swap rows and columns of all images."""
        validation = self.validation_images
        return self._replace(
            train_images=_transposed(self.train_images),
            test_images=_transposed(self.test_images),
            validation_images=None if validation is None else _transposed(validation),
        )

    def cropped(self, side: int | None) -> "Dataset":
        """Crop test and validation images to their central `side` x `side` pixels; None crops nothing.

        Training images stay whole, so that random crops can be drawn from them.

        Raises:
            UsageError: the images are smaller.
        """
        if side is None:
            return self
        validation = self.validation_images
        return self._replace(
            test_images=central_crop(self.test_images, side),
            validation_images=None if validation is None else central_crop(validation, side),
        )


def make_dataset(
    train_images: ArrayLike,
    train_labels: ArrayLike,
    test_images: ArrayLike,
    test_labels: ArrayLike,
    *,
    num_classes: int,
    class_names: Sequence[str] | None = None,
    described: Sequence[str] = SPLIT_ARRAYS,
) -> Dataset:
    """Make a data set from your own arrays, and check them.

    Args:
        train_images: images `[images height width channels]`, in uint8 or as floats in [0, 1]; none of them, with the
            shape and dtype of test images, for a data set that is only evaluated.
        train_labels: class indices `[images]`, or `[images k]` for k different classes in each image.
        test_images: images of the same shape and dtype.
        test_labels: class indices, as many for each image as in `train_labels`.
        num_classes: number of classes, at least 2.
        class_names: names of the classes, of printable characters; by default "0", "1" ...
        described: names of the four arrays in error messages.

    Raises:
        UsageError: shapes, dtypes or counts do not match, labels are out of range or repeated in an image, images are
            not in [0, 1], or a class name is not printable.
    """
    if num_classes < 2:
        raise UsageError(f"The number of classes is {num_classes}, and must be at least 2.")
    class_names = tuple(map(str, range(num_classes)) if class_names is None else class_names)
    if len(class_names) != num_classes or len(set(class_names)) != num_classes:
        raise UsageError(f"The class names are {', '.join(class_names)}; expected {num_classes} different ones.")
    if odd := [name for name in class_names if not name.isprintable()]:  # would be refused in the config of a run
        raise UsageError(f"A class is called {odd[0]!a}; expected a name of printable characters.")
    train_images, train_labels, test_images, test_labels = map(
        np.asarray, (train_images, train_labels, test_images, test_labels)
    )
    splits = ((described[:2], train_images, train_labels), (described[2:], test_images, test_labels))
    for (images_name, labels_name), images, labels in splits:
        if images.ndim != 4 or images.shape[1:] != train_images.shape[1:] or 0 in images.shape[1:]:
            raise UsageError(
                f"The {images_name} are {images.shape}; expected [images height width channels], of one size in "
                "both splits."
            )
        if len(train_images) == 0 and images is train_images:
            continue
        _check_labels(labels, labels_name, num_images=len(images), class_names=class_names)
        if labels.shape[1:] != train_labels.shape[1:]:
            raise UsageError(f"The {labels_name} are {labels.shape}; expected as many for each image in both splits.")
        is_float = np.issubdtype(images.dtype, np.floating)
        if images.dtype != train_images.dtype or not (is_float or images.dtype == np.uint8):
            raise UsageError(
                f"The {images_name} are {images.dtype}; expected uint8, or floats in [0, 1], the same in both splits."
            )
        if is_float and not (images.min() >= 0 and images.max() <= 1):  # also refuses NaN
            raise UsageError(f"The {images_name} are from {images.min()} to {images.max()}; expected floats in [0, 1].")
    if train_images.dtype != np.uint8:
        train_images, test_images = (images.astype(np.float32, copy=False) for images in (train_images, test_images))
    return Dataset(train_images, train_labels.astype(np.int32), test_images, test_labels.astype(np.int32), class_names)


def _check_labels(labels: np.ndarray, name: str, *, num_images: int, class_names: Sequence[str]) -> None:
    if num_images == 0 or labels.shape[:1] != (num_images,) or labels.ndim > 2 or labels.shape[1:] in ((0,), (1,)):
        raise UsageError(
            f"The {name} are {labels.shape} for {num_images} images; expected one for each, or [images k] with k > 1."
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise UsageError(f"The {name} are {labels.dtype}; expected integers.")
    if labels.min() < 0 or labels.max() >= len(class_names):
        raise UsageError(f"The {name} are {labels.min()} to {labels.max()}; expected 0 to {len(class_names) - 1}.")
    ordered = np.sort(labels.reshape(num_images, -1), axis=1)
    images, places = np.nonzero(ordered[:, 1:] == ordered[:, :-1])
    if len(images):
        twice = class_names[ordered[images[0], places[0]]]
        raise UsageError(f"The {name} give image {images[0]} the class {twice!r} twice; expected different ones.")


def _transposed(
    images: Shaped[np.ndarray, "images height width channels"],
) -> Shaped[np.ndarray, "images width height channels"]:
    return np.ascontiguousarray(images.swapaxes(1, 2))


def central_crop(
    images: Shaped[np.ndarray, "images height width channels"], side: int
) -> Shaped[np.ndarray, "images side side channels"]:
    """Crop images to their central `side` x `side` pixels; if margins differ by one, the upper or left is smaller.

    Raises:
        UsageError: the images are smaller, or `side` is not positive.
    """
    height, width = images.shape[1:3]
    if not 1 <= side <= min(height, width):
        raise UsageError(f"The crop is {side} x {side}; expected 1 to {min(height, width)}, of {height} x {width}.")
    top, left = (height - side) // 2, (width - side) // 2
    return images[:, top : top + side, left : left + side]
