"""Changes of a batch of images, each image by an amount of its own; pure, without randomness."""

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Bool, Float, Int


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
