"""Random augmentation of training images, written as options such as `shift=0.1`, and applied on the device."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from capsnet_jax.errors import UsageError

Images = Float[Array, "b height width channels"]

_USAGE = {
    "rotation": "rotation=DEGREES (from 0 to 180): rotate about the centre by up to DEGREES, in either direction",
    "shift": "shift=FRACTION (at least 0 and less than 1): shift by up to FRACTION of the size, in whole pixels",
    "shift_pixels": "shift_pixels=PIXELS (a whole number of at least 0): shift by up to PIXELS, in place of shift",
    "crop": "crop=SIDE (a whole number of at least 1): cut out a square of SIDE pixels at a random position",
    "flip": "flip (without a value): swap left and right with probability 1/2",
    "brightness": "brightness=AMOUNT (from 0 to 1): add a number between -AMOUNT and AMOUNT to all pixels",
    "contrast": "contrast=AMOUNT (from 0 to 1): scale deviations from the mean by 1 - AMOUNT to 1 + AMOUNT",
}


@dataclass(frozen=True)
class Augmentation:
    """Random augmentations, drawn independently for each image and applied in the order of these fields.

    Each augmentation has its own random key, so what it draws does not depend on which others are used.

    Raises:
        UsageError: a value is out of its range, or both kinds of shift are given.
    """

    rotation: float = 0.0
    """Rotate about the centre by an angle uniform in +-`rotation` degrees, bilinearly; the background is zero."""
    shift: float = 0.0
    """Shift each axis by an offset uniform in +-`shift` times the size, rounded to pixels, and fill with zeros."""
    shift_pixels: int = 0
    """If not 0, used in place of `shift`: every whole offset up to this one is equally likely."""
    crop: int | None = None
    """Side of a square cut out at a uniformly random position; None keeps the whole image."""
    flip: bool = False
    """Swap left and right with probability 1/2."""
    brightness: float = 0.0
    """Add a number uniform in +-`brightness` to all pixels, and clip to [0, 1]."""
    contrast: float = 0.0
    """Multiply deviations from each channel's mean by a number uniform in 1 +- `contrast`, and clip to [0, 1]."""

    def __post_init__(self) -> None:
        in_range = {
            "rotation": 0 <= self.rotation <= 180,
            "shift": 0 <= self.shift < 1,
            "shift_pixels": self.shift_pixels >= 0,
            "crop": self.crop is None or self.crop >= 1,
            "brightness": 0 <= self.brightness <= 1,
            "contrast": 0 <= self.contrast <= 1,
        }
        for name, fits in in_range.items():
            if not fits:
                raise UsageError(f"Got the augmentation '{name}={getattr(self, name)}'; expected {_USAGE[name]}.")
        if self.shift and self.shift_pixels:
            raise UsageError(
                f"Got the augmentations shift={self.shift} and shift_pixels={self.shift_pixels}; expected one of them."
            )

    @classmethod
    def parse(cls, options: Iterable[str]) -> "Augmentation":
        """Read augmentations from options such as `("shift=0.1", "flip")`, listed by `describe_augmentations`.

        Raises:
            UsageError: a name is unknown or repeated, a value is missing, superfluous or out of its range, or both
                kinds of shift are given.
        """
        settings: dict[str, Any] = {}
        for option in options:
            name, _, value = option.partition("=")
            if name not in _USAGE or option.startswith("flip="):
                known = ", ".join(usage.split(" ")[0] for usage in _USAGE.values())
                raise UsageError(f"Unknown augmentation {option!r}; expected any of {known}.")
            if name in settings:
                raise UsageError(f"Got the augmentation {name} twice, again as {option!r}; expected every name once.")
            number = {"shift_pixels": int, "crop": int}.get(name, float)
            try:
                settings[name] = True if option == "flip" else number(value)
            except ValueError:
                raise UsageError(f"Got the augmentation {option!r}; expected {_USAGE[name]}.") from None
        return cls(**settings)

    @jax.named_scope("augmentation")
    def __call__(self, key: PRNGKeyArray, images: Images) -> Float[Array, "b new_height new_width channels"]:
        """Augment a batch of images.

        Args:
            key: random key of this batch.
            images: pixels in [0, 1]; zero is the background.

        Returns:
            Images in [0, 1], of the same size, or squares of the side `crop`.

        Raises:
            UsageError: the images are smaller than the crop, or no larger than `shift_pixels`.
        """

        def own_key(constant: int) -> PRNGKeyArray:
            return jax.random.fold_in(key, constant)

        def uniform(constant: int, low: float, high: float) -> Float[Array, " b"]:
            return jax.random.uniform(own_key(constant), (len(images),), images.dtype, low, high)

        # These constants must never change, so that earlier runs can be repeated.
        if self.rotation:
            limit = math.radians(self.rotation)
            images = rotate(images, uniform(1, -limit, limit))
        if self.shift or self.shift_pixels:
            # Shifts use the key itself, as they did when there was no other augmentation.
            images = random_shift(key, images, fraction=self.shift, pixels=self.shift_pixels)
        if self.crop is not None:
            images = random_crop(own_key(2), images, side=self.crop)
        if self.flip:
            images = flip(images, jax.random.bernoulli(own_key(3), shape=(len(images),)))
        if self.brightness:
            images = adjust_brightness(images, uniform(4, -self.brightness, self.brightness))
        if self.contrast:
            images = adjust_contrast(images, uniform(5, 1 - self.contrast, 1 + self.contrast))
        return images


def describe_augmentations() -> str:
    """Describe each option in a line: its value, the allowed range, and what it does to an image."""
    return "\n".join(_USAGE.values())


def rotate(images: Images, radians: Float[Array, " b"]) -> Images:
    """Rotate each image about its centre by its own angle, with bilinear interpolation.

    Args:
        images: images on a background of zeros, which also surrounds them.
        radians: angles, counter-clockwise as displayed; pi / 2 is `np.rot90` of a square image.
    """
    _, height, width, _ = images.shape
    middle_row, middle_column = (height - 1) / 2, (width - 1) / 2
    down = rearrange(jnp.arange(height, dtype=images.dtype) - middle_row, "height -> height 1")
    right = jnp.arange(width, dtype=images.dtype) - middle_column

    def rotate_one(image: Float[Array, "height width channels"], angle: Float[Array, ""]) -> Array:
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        sources = [cos * down + sin * right + middle_row, cos * right - sin * down + middle_column]
        return jax.vmap(lambda channel: map_coordinates(channel, sources, order=1, mode="constant"), -1, -1)(image)

    return jax.vmap(rotate_one)(images, radians)


def random_shift(key: PRNGKeyArray, images: Images, *, fraction: float, pixels: int = 0) -> Images:
    """Shift each image by a random number of whole pixels along both axes, and fill with zeros.

    Args:
        key: random key of this batch.
        images: pixels of any range; zero is the background.
        fraction: offsets are uniform in +-`fraction` times the size, then rounded.
        pixels: if not 0, used in place of `fraction`: every whole offset up to this one is equally likely.

    Raises:
        UsageError: a shift by `pixels` could move an image out of sight.
    """
    count, height, width, _ = images.shape
    if pixels >= min(height, width):
        raise UsageError(
            f"shift_pixels is {pixels} for images of {height} x {width}; expected less than {min(height, width)}."
        )
    down, right = (pixels, pixels) if pixels else (round(fraction * height), round(fraction * width))
    if (down, right) == (0, 0):
        return images
    if pixels:
        offsets = jax.random.randint(key, (count, 2), -pixels, pixels + 1)
    else:
        limits = jnp.array([fraction * height, fraction * width])
        offsets = jnp.round(jax.random.uniform(key, (count, 2), minval=-limits, maxval=limits)).astype(jnp.int32)
    padded = jnp.pad(images, ((0, 0), (down, down), (right, right), (0, 0)))
    return _cut_out(padded, jnp.array((down, right)) - offsets, height, width)


def random_crop(key: PRNGKeyArray, images: Images, *, side: int) -> Float[Array, "b {side} {side} channels"]:
    """Cut a square of `side` pixels out of each image, at a uniformly random position.

    Raises:
        UsageError: the images are smaller than the square.
    """
    count, height, width, _ = images.shape
    if side > min(height, width):
        raise UsageError(f"crop is {side} for images of {height} x {width}; expected at most {min(height, width)}.")
    corners = jax.random.randint(key, (count, 2), 0, jnp.array([height, width]) - side + 1)
    return _cut_out(images, corners, side, side)


def flip(images: Images, flipped: Bool[Array, " b"]) -> Images:
    """Swap left and right of the images for which `flipped` is true."""
    return jnp.where(rearrange(flipped, "b -> b 1 1 1"), images[:, :, ::-1], images)


def adjust_brightness(images: Images, amounts: Float[Array, " b"]) -> Images:
    """Add a number to all pixels of each image, and clip to [0, 1]."""
    return jnp.clip(images + rearrange(amounts, "b -> b 1 1 1"), 0, 1)


def adjust_contrast(images: Images, factors: Float[Array, " b"]) -> Images:
    """Multiply the deviation of each channel from its mean over the image by a factor, and clip to [0, 1].

    This is `tf.image.adjust_contrast`, which does not clip floats.
    """
    means = reduce(images, "b height width channels -> b 1 1 channels", "mean")
    return jnp.clip(means + rearrange(factors, "b -> b 1 1 1") * (images - means), 0, 1)


def _cut_out(
    images: Float[Array, "b _ _ channels"], corners: Int[Array, "b 2"], height: int, width: int
) -> Float[Array, "b {height} {width} channels"]:
    """Cut a rectangle out of each image, given the row and column of its first pixel."""
    size = (height, width, images.shape[-1])
    return jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), size))(images, corners)
