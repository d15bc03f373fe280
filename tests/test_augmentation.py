"""Random shifts against a plain NumPy implementation."""

import jax
import jax.numpy as jnp
import numpy as np

from capsnet_jax.data.augmentation import random_shift

IMAGES = np.random.default_rng(0).uniform(0.1, 1, size=(400, 20, 30, 2)).astype(np.float32)


def shifted(image: np.ndarray, down: int, right: int) -> np.ndarray:
    result = np.zeros_like(image)
    height, width, _ = image.shape
    for row in range(height):
        for column in range(width):
            if 0 <= row - down < height and 0 <= column - right < width:
                result[row, column] = image[row - down, column - right]
    return result


def find_shift(image: np.ndarray, result: np.ndarray) -> tuple[int, int]:
    """The one shift that makes the result of the image."""
    rows, columns = (np.flatnonzero(result.any(axis=axes)) for axes in ((1, 2), (0, 2)))
    candidates = [(rows[0] - (19 - rows[-1]), columns[0] - (29 - columns[-1]))]
    ((down, right),) = candidates
    np.testing.assert_array_equal(shifted(image, down, right), result)
    return int(down), int(right)


def test_images_are_shifted_by_whole_pixels_of_every_allowed_size():
    results = np.asarray(random_shift(jax.random.key(1), jnp.asarray(IMAGES), fraction=0.1))
    shifts = [find_shift(image, result) for image, result in zip(IMAGES, results, strict=True)]
    assert {down for down, _ in shifts} == set(range(-2, 3))
    assert {right for _, right in shifts} == set(range(-3, 4))
    # Offsets are rounded from a uniform one, so the largest are half as frequent as the others; both axes apart.
    counts = np.bincount([right + 3 for _, right in shifts], minlength=7) / len(shifts)
    np.testing.assert_allclose(counts, np.array([1, 2, 2, 2, 2, 2, 1]) / 12, atol=0.06)
    assert abs(np.corrcoef(np.array(shifts).T)[0, 1]) < 0.2


def test_the_key_decides():
    one, same, other = (random_shift(jax.random.key(seed), jnp.asarray(IMAGES), fraction=0.1) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_no_fraction_is_no_shift():
    np.testing.assert_array_equal(random_shift(jax.random.key(1), jnp.asarray(IMAGES), fraction=0.0), IMAGES)


def test_a_fraction_of_less_than_half_a_pixel_is_no_shift():
    np.testing.assert_array_equal(random_shift(jax.random.key(1), jnp.asarray(IMAGES), fraction=0.016), IMAGES)


def test_every_whole_offset_up_to_some_pixels_is_as_likely_as_any_other():
    """The 25 shifts of up to 2 pixels; each expected 16 times in 400 images."""
    results = np.asarray(random_shift(jax.random.key(5), jnp.asarray(IMAGES), fraction=0.0, pixels=2))
    shifts = [find_shift(image, result) for image, result in zip(IMAGES, results, strict=True)]
    counts = {(down, right): shifts.count((down, right)) for down in range(-2, 3) for right in range(-2, 3)}
    assert sum(counts.values()) == 400
    # Chi-squared of 24 degrees of freedom: below 51 in 999 of 1000 draws. Rounded offsets would give about 150.
    assert sum((count - 16) ** 2 / 16 for count in counts.values()) < 51
