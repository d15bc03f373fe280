"""Random changes of training images, asked for by name, drawn and applied on the device.

The functions at the end change a batch, each image by an amount of its own; they are pure, without randomness.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from capsnet_jax.errors import UsageError


class _Name(NamedTuple):
    """An augmentation as it is asked for: by a name, with a value."""

    usage: str
    number: type[float] | type[int] | None
    allowed: str
    fits: Callable[[Any], bool]
    meaning: str


_NAMES = {
    "rotation": _Name(
        "rotation=DEGREES",
        float,
        "from 0 to 180",
        lambda degrees: 0 <= degrees <= 180,
        "turned about the centre by up to so many degrees, either way",
    ),
    "shift": _Name(
        "shift=FRACTION",
        float,
        "at least 0 and less than 1",
        lambda fraction: 0 <= fraction < 1,
        "moved by up to this fraction of the size, in whole pixels",
    ),
    "shift_pixels": _Name(
        "shift_pixels=PIXELS",
        int,
        "a whole number of at least 0",
        lambda pixels: pixels >= 0,
        "in place of shift: up to so many pixels, each offset equally likely",
    ),
    "crop": _Name(
        "crop=SIDE",
        int,
        "a whole number of at least 1",
        lambda side: side is None or side >= 1,
        "a square of so many pixels a side is cut out, anywhere",
    ),
    "flip": _Name("flip", None, "without a value", lambda _: True, "left and right are swapped with probability 1/2"),
    "brightness": _Name(
        "brightness=AMOUNT",
        float,
        "from 0 to 1",
        lambda amount: 0 <= amount <= 1,
        "one number of up to this much is added to or taken from all pixels",
    ),
    "contrast": _Name(
        "contrast=AMOUNT",
        float,
        "from 0 to 1",
        lambda amount: 0 <= amount <= 1,
        "the deviation from the image's mean is multiplied by 1 - AMOUNT to 1 + AMOUNT",
    ),
}


@dataclass(frozen=True)
class Augmentation:
    """Random changes, drawn apart for each image, and applied in the order of these fields, however they were named.

    Each has randomness of its own: what it draws does not depend on which others there are.
    """

    rotation: float = 0.0
    """Turned about the centre by an angle uniform in +-so many degrees; bilinear, and what turns in is zero."""
    shift: float = 0.0
    """Offsets along both axes are uniform in +-this fraction of the size, then rounded; what moves in is zero."""
    shift_pixels: int = 0
    """If not 0, in place of that: every whole offset up to this is as likely as any other."""
    crop: int | None = None
    """Side of the square that is cut out, every position being as likely as any other; None for whole images."""
    flip: bool = False
    """Left and right are swapped with probability 1/2."""
    brightness: float = 0.0
    """A number uniform in +-this is added to all pixels, and the result clipped to [0, 1]."""
    contrast: float = 0.0
    """The deviation from each channel's mean is multiplied by a number uniform in 1 +- this, and the result clipped."""

    def __post_init__(self) -> None:
        for name, known in _NAMES.items():
            value = getattr(self, name)
            if not known.fits(value):
                raise _unfit(f"{name}={value}", known)
        if self.shift and self.shift_pixels:
            raise UsageError(
                f"Got the augmentations shift={self.shift} and shift_pixels={self.shift_pixels}; expected one of them."
            )

    @classmethod
    def parse(cls, names: Iterable[str]) -> "Augmentation":
        """Augmentations by their names, such as `("shift=0.1", "flip")`; `describe_augmentations` tells all of them.

        Raises:
            UsageError: a name is unknown or given twice, a value is missing, superfluous or out of its range, or both
                kinds of shift are given.
        """
        settings: dict[str, Any] = {}
        for text in names:
            name, _, value = text.partition("=")
            if name not in _NAMES:
                every = ", ".join(f"{known.usage} ({known.meaning})" for known in _NAMES.values())
                raise UsageError(f"Unknown augmentation {text!r}; expected any of {every}.")
            if name in settings:
                raise UsageError(f"Got the augmentation {name} twice, again as {text!r}; expected every name once.")
            settings[name] = _read(text, value, _NAMES[name])
        return cls(**settings)

    def __call__(
        self, key: PRNGKeyArray, images: Float[Array, "b height width channels"]
    ) -> Float[Array, "b new_height new_width channels"]:
        """The images, changed.

        Args:
            key: randomness of this batch.
            images: in [0, 1]; zero is the background.

        Returns:
            Images in [0, 1], of the side of `crop` if there is one.

        Raises:
            UsageError: the images are smaller than the crop, or no larger than `shift_pixels`.
        """
        count = len(images)

        def own_key(constant: int) -> PRNGKeyArray:
            return jax.random.fold_in(key, constant)

        def uniform(constant: int, low: float, high: float) -> Float[Array, " b"]:
            return jax.random.uniform(own_key(constant), (count,), images.dtype, low, high)

        # The constants stay as they are whatever is added, so that a run can be repeated.
        if self.rotation:
            limit = math.radians(self.rotation)
            images = rotate(images, uniform(1, -limit, limit))
        if self.shift or self.shift_pixels:
            # By the key itself: runs from when there was no other augmentation can be repeated, too.
            images = random_shift(key, images, fraction=self.shift, pixels=self.shift_pixels)
        if self.crop is not None:
            images = random_crop(own_key(2), images, side=self.crop)
        if self.flip:
            images = flip(images, jax.random.bernoulli(own_key(3), shape=(count,)))
        if self.brightness:
            images = adjust_brightness(images, uniform(4, -self.brightness, self.brightness))
        if self.contrast:
            images = adjust_contrast(images, uniform(5, 1 - self.contrast, 1 + self.contrast))
        return images


def describe_augmentations() -> str:
    """A line for each name: its value, what that may be, and what it does to an image."""
    return "\n".join(f"{known.usage} ({known.allowed}): {known.meaning}" for known in _NAMES.values())


def random_shift(
    key: PRNGKeyArray, images: Float[Array, "b height width channels"], *, fraction: float, pixels: int = 0
) -> Float[Array, "b height width channels"]:
    """Shifts each image by whole pixels, drawn apart for each image and axis; what moves in is zero.

    Args:
        key: randomness of this batch.
        images: of any range; zero is the background.
        fraction: largest shift as a fraction of the image's size: offsets are uniform in +-fraction, then rounded.
        pixels: if not 0, in place of that: every whole offset up to this is as likely as any other.

    Raises:
        UsageError: so many pixels could move an image out of sight.
    """
    count, height, width, _ = images.shape
    if pixels >= min(height, width):
        raise UsageError(
            f"shift_pixels is {pixels} for images of {height} x {width}; expected less than {min(height, width)}."
        )
    largest = (pixels, pixels) if pixels else (round(fraction * height), round(fraction * width))
    if largest == (0, 0):
        return images
    if pixels:
        offsets = jax.random.randint(key, (count, 2), -pixels, pixels + 1)
    else:
        limits = jnp.array([fraction * height, fraction * width])
        offsets = jnp.round(jax.random.uniform(key, (count, 2), minval=-limits, maxval=limits)).astype(jnp.int32)
    return shift(images, offsets, largest=largest)


def random_crop(
    key: PRNGKeyArray, images: Float[Array, "b height width channels"], *, side: int
) -> Float[Array, "b {side} {side} channels"]:
    """Cuts a square out of each image, every position being as likely as any other.

    Args:
        key: randomness of this batch.
        images: of any range.
        side: of the square, in pixels.

    Raises:
        UsageError: the images are smaller.
    """
    count, height, width, _ = images.shape
    if side > min(height, width):
        raise UsageError(f"crop is {side} for images of {height} x {width}; expected at most {min(height, width)}.")
    corners = jax.random.randint(key, (count, 2), 0, jnp.array([height, width]) - side + 1)
    return crop(images, corners, side=side)


def _read(text: str, value: str, known: _Name) -> float | int | bool:
    if known.number is None:
        if text != known.usage:
            raise _unfit(text, known)
        return True
    try:
        return known.number(value)
    except ValueError:
        raise _unfit(text, known) from None


def _unfit(text: str, known: _Name) -> UsageError:
    return UsageError(f"Got the augmentation {text!r}; expected {known.usage}, {known.allowed}.")


def rotate(
    images: Float[Array, "b height width channels"], radians: Float[Array, " b"]
) -> Float[Array, "b height width channels"]:
    """Turns each image about its centre, anticlockwise as one sees it, with bilinear interpolation.

    Args:
        images: zero is the background: it surrounds the image, and is interpolated with at the border.
        radians: pi / 2 is `np.rot90` of a square image.
    """
    _, height, width, _ = images.shape
    middle_row, middle_column = (height - 1) / 2, (width - 1) / 2
    down = rearrange(jnp.arange(height, dtype=images.dtype) - middle_row, "height -> height 1")
    right = jnp.arange(width, dtype=images.dtype) - middle_column

    def turn(
        image: Float[Array, "height width channels"], angle: Float[Array, ""]
    ) -> Float[Array, "height width channels"]:
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        sources = [cos * down + sin * right + middle_row, cos * right - sin * down + middle_column]
        return jax.vmap(lambda channel: map_coordinates(channel, sources, order=1, mode="constant"), -1, -1)(image)

    return jax.vmap(turn)(images, radians)


def shift(
    images: Float[Array, "b height width channels"], offsets: Int[Array, "b 2"], *, largest: tuple[int, int]
) -> Float[Array, "b height width channels"]:
    """Moves each image by whole pixels; what moves in is zero.

    Args:
        images: zero is the background.
        offsets: pixels down and to the right.
        largest: the offsets are at most this large, either way.
    """
    _, height, width, _ = images.shape
    vertical, horizontal = largest
    padded = jnp.pad(images, ((0, 0), (vertical, vertical), (horizontal, horizontal), (0, 0)))
    return _windows(padded, jnp.array(largest) - offsets, height, width)


def crop(
    images: Float[Array, "b height width channels"], corners: Int[Array, "b 2"], *, side: int
) -> Float[Array, "b {side} {side} channels"]:
    """Cuts a square out of each image.

    Args:
        images: at least as large as the square.
        corners: row and column of the square's first pixel.
        side: of the square, in pixels.
    """
    return _windows(images, corners, side, side)


def flip(
    images: Float[Array, "b height width channels"], flipped: Bool[Array, " b"]
) -> Float[Array, "b height width channels"]:
    """Swaps left and right of the images for which this is asked."""
    return jnp.where(rearrange(flipped, "b -> b 1 1 1"), images[:, :, ::-1], images)


def adjust_brightness(
    images: Float[Array, "b height width channels"], amounts: Float[Array, " b"]
) -> Float[Array, "b height width channels"]:
    """Adds a number to all pixels of each image, and clips to [0, 1]."""
    return jnp.clip(images + rearrange(amounts, "b -> b 1 1 1"), 0, 1)


def adjust_contrast(
    images: Float[Array, "b height width channels"], factors: Float[Array, " b"]
) -> Float[Array, "b height width channels"]:
    """Multiplies the deviation of each channel from its mean over the image, and clips to [0, 1].

    References:
        The same as `tf.image.adjust_contrast`, which does not clip floats.
    """
    means = reduce(images, "b height width channels -> b 1 1 channels", "mean")
    return jnp.clip(means + rearrange(factors, "b -> b 1 1 1") * (images - means), 0, 1)


def _windows(
    images: Float[Array, "b _ _ channels"], corners: Int[Array, "b 2"], height: int, width: int
) -> Float[Array, "b {height} {width} channels"]:
    size = (height, width, images.shape[-1])
    return jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), size))(images, corners)
