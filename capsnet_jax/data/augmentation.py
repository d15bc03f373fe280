"""Random changes of training images, drawn and applied on the device."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


def random_shift(
    key: PRNGKeyArray, images: Float[Array, "b height width channels"], *, fraction: float, pixels: int = 0
) -> Float[Array, "b height width channels"]:
    """Shifts each image by whole pixels, drawn apart for each image and axis; what moves in is zero.

    Args:
        key: randomness of this batch.
        images: of any range; zero is the background.
        fraction: largest shift as a fraction of the image's size: offsets are uniform in +-fraction, then rounded.
        pixels: if not 0, in place of that: every whole offset up to this is as likely as any other.
    """
    batch, height, width, channels = images.shape
    vertical, horizontal = (pixels, pixels) if pixels else (round(fraction * height), round(fraction * width))
    if vertical == horizontal == 0:
        return images
    if pixels:
        offsets = jax.random.randint(key, (batch, 2), -pixels, pixels + 1)
    else:
        limits = jnp.array([fraction * height, fraction * width])
        offsets = jnp.round(jax.random.uniform(key, (batch, 2), minval=-limits, maxval=limits)).astype(jnp.int32)
    padded = jnp.pad(images, ((0, 0), (vertical, vertical), (horizontal, horizontal), (0, 0)))

    def crop(image: Float[Array, "..."], offset: Int[Array, "2"]) -> Float[Array, "height width channels"]:
        start = (vertical - offset[0], horizontal - offset[1], 0)
        return jax.lax.dynamic_slice(image, start, (height, width, channels))

    return jax.vmap(crop)(padded, offsets)
