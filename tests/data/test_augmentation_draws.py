"""Augmentations against plain NumPy implementations; the random amounts are recovered from the results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capsnet_jax.data.augmentation import Augmentation, rotate

COUNT, HEIGHT, WIDTH, SIDE = 400, 20, 30, 18
IMAGES = np.random.default_rng(0).uniform(0.1, 1, size=(COUNT, HEIGHT, WIDTH, 2)).astype(np.float32)
# Brightness increases from left to right, so that the gradient after a rotation reveals the angle.
RAMPS = np.tile(np.linspace(0.2, 0.8, WIDTH, dtype=np.float32)[:, None], (COUNT, HEIGHT, 1, 1))


def augmented(*names: str, images: np.ndarray = IMAGES, seed: int = 1) -> np.ndarray:
    return np.asarray(jax.jit(Augmentation.parse(names))(jax.random.key(seed), jnp.asarray(images)))


def shifted(image: np.ndarray, down: int, right: int) -> np.ndarray:
    result = np.zeros_like(image)
    height, width, _ = image.shape
    for row in range(height):
        for column in range(width):
            if 0 <= row - down < height and 0 <= column - right < width:
                result[row, column] = image[row - down, column - right]
    return result


def rotated(image: np.ndarray, radians: float) -> np.ndarray:
    """Rotate pixel by pixel in float64, interpolating the four pixels around the source of each."""
    result = np.zeros(image.shape)
    height, width, _ = image.shape
    turn = np.exp(-1j * float(radians))
    for row in range(height):
        for column in range(width):
            point = turn * complex(column - (width - 1) / 2, (height - 1) / 2 - row)
            source_row, source_column = (height - 1) / 2 - point.imag, point.real + (width - 1) / 2
            for near_row in (int(np.floor(source_row)), int(np.floor(source_row)) + 1):
                for near_column in (int(np.floor(source_column)), int(np.floor(source_column)) + 1):
                    if 0 <= near_row < height and 0 <= near_column < width:
                        weight = (1 - abs(source_row - near_row)) * (1 - abs(source_column - near_column))
                        result[row, column] += weight * image[near_row, near_column]
    return result


def find_shift(image: np.ndarray, result: np.ndarray) -> tuple[int, int]:
    """Find the shift that turns the image into the result."""
    rows, columns = (np.flatnonzero(result.any(axis=axes)) for axes in ((1, 2), (0, 2)))
    down, right = rows[0] - (HEIGHT - 1 - rows[-1]), columns[0] - (WIDTH - 1 - columns[-1])
    np.testing.assert_array_equal(shifted(image, down, right), result)
    return int(down), int(right)


def find_corner(image: np.ndarray, result: np.ndarray) -> tuple[int, int]:
    """Find the only position of the result in the image."""
    (corner,) = (
        (row, column)
        for row in range(HEIGHT - SIDE + 1)
        for column in range(WIDTH - SIDE + 1)
        if np.array_equal(image[row : row + SIDE, column : column + SIDE], result)
    )
    return corner


def find_angle(result: np.ndarray) -> float:
    """Find the angle in radians by which a ramp was rotated, from its gradient in the middle."""
    by_row, by_column = (slopes.mean() for slopes in np.gradient(result[6:14, 11:19, 0].astype(float)))
    return float(np.arctan2(-by_row, by_column))


@pytest.fixture(scope="module")
def drawn() -> dict[str, np.ndarray]:
    """Amounts that each augmentation alone draws for each image from key 1."""
    shifts = [find_shift(*pair) for pair in zip(IMAGES, augmented("shift=0.1"), strict=True)]
    corners = [find_corner(*pair) for pair in zip(IMAGES, augmented(f"crop={SIDE}"), strict=True)]
    flips = []
    for image, result in zip(IMAGES, augmented("flip"), strict=True):
        flips.append(not np.array_equal(result, image))
        np.testing.assert_array_equal(result, image[:, ::-1] if flips[-1] else image)
    # Pixels that cannot be clipped: the one nearest to a half, and the darkest.
    pixels = IMAGES.reshape(COUNT, -1)
    middle = np.arange(COUNT), abs(pixels - 0.5).argmin(axis=1)
    brightness = augmented("brightness=0.2").reshape(COUNT, -1)[middle] - pixels[middle].astype(float)
    first = IMAGES[..., 0].reshape(COUNT, -1).astype(float)
    darkest, means = (np.arange(COUNT), first.argmin(axis=1)), first.mean(axis=1)
    contrast = (augmented("contrast=0.2")[..., 0].reshape(COUNT, -1)[darkest] - means) / (first[darkest] - means)
    return {
        "rotation": np.array([find_angle(result) for result in augmented("rotation=30", images=RAMPS)]),
        **dict(zip(("down", "right"), np.array(shifts).T, strict=True)),
        **dict(zip(("row", "column"), np.array(corners).T, strict=True)),
        "flip": np.array(flips),
        "brightness": brightness,
        "contrast": contrast,
    }


def contrasted(image: np.ndarray, factor: float) -> np.ndarray:
    result = np.empty(image.shape)
    for channel in range(image.shape[-1]):
        mean = image[..., channel].astype(float).mean()
        result[..., channel] = np.clip(mean + factor * (image[..., channel] - mean), 0, 1)
    return result


def assert_uniform(draws: np.ndarray, low: float, high: float) -> None:
    """Apply the Kolmogorov-Smirnov test, which 999 of 1000 uniform samples pass; no two images may share a draw."""
    edge = (high - low) / 50  # a uniform sample of 400 comes closer to both bounds, 999 times of 1000
    assert low <= draws.min() < low + edge
    assert high - edge < draws.max() <= high
    assert len(np.unique(draws)) > 0.99 * len(draws)  # float32 has few numbers near 1
    expected = (np.sort(draws) - low) / (high - low)
    assert abs(expected - (np.arange(len(draws)) + 0.5) / len(draws)).max() < 1.95 / np.sqrt(len(draws))


def test_shifts_are_all_whole_offsets_up_to_the_largest(drawn):
    assert set(drawn["down"]) == set(range(-2, 3))
    assert set(drawn["right"]) == set(range(-3, 4))
    # Offsets are rounded from a uniform one, so the largest are half as frequent as the others.
    counts = np.bincount(drawn["right"] + 3, minlength=7) / COUNT
    np.testing.assert_allclose(counts, np.array([1, 2, 2, 2, 2, 2, 1]) / 12, atol=0.06)


def test_shifts_are_drawn_from_the_key_itself(drawn):
    """As in version 0.1.0, so that its runs can be repeated."""
    limits = np.array([2, 3], np.float32)
    offsets = np.round(jax.random.uniform(jax.random.key(1), (COUNT, 2), minval=-limits, maxval=limits))
    np.testing.assert_array_equal(np.stack([drawn["down"], drawn["right"]], axis=1), offsets)


def test_a_fraction_of_less_than_half_a_pixel_shifts_nothing():
    np.testing.assert_array_equal(augmented("shift=0.016"), IMAGES)


def test_shift_pixels_draws_every_offset_with_equal_probability():
    """There are 25 shifts of up to 2 pixels, each expected 16 times in 400 images."""
    shifts = [find_shift(*pair) for pair in zip(IMAGES, augmented("shift_pixels=2", seed=5), strict=True)]
    counts = {(down, right): shifts.count((down, right)) for down in range(-2, 3) for right in range(-2, 3)}
    assert sum(counts.values()) == COUNT
    # Chi-squared of 24 degrees of freedom: below 51 in 999 of 1000 draws. Rounded offsets would give about 150.
    assert sum((count - 16) ** 2 / 16 for count in counts.values()) < 51


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-14)])
def test_rotation_is_bilinear_about_the_centre(dtype, tolerance):
    rng = np.random.default_rng(3)
    images, radians = rng.uniform(size=(5, 8, 11, 2)).astype(dtype), rng.uniform(-np.pi, np.pi, 5).astype(dtype)
    with jax.enable_x64(dtype == "float64"):
        results = rotate(jnp.asarray(images), jnp.asarray(radians))
    assert results.dtype == dtype
    expected = np.stack([rotated(*pair) for pair in zip(images, radians, strict=True)])
    np.testing.assert_allclose(results, expected, rtol=0, atol=tolerance * expected.max())


@pytest.mark.parametrize("shape", [(8, 8), (9, 9), (8, 11)])
def test_quarter_turns_are_counter_clockwise(shape):
    """Images that are not square make half turns only."""
    image = np.random.default_rng(4).uniform(size=(*shape, 2)).astype(np.float32)
    quarters = np.arange(-2, 3) if shape[0] == shape[1] else np.array([-2, 0, 2])
    results = rotate(jnp.asarray(np.stack([image] * len(quarters))), jnp.float32(quarters * np.pi / 2))
    for result, turns in zip(results, quarters, strict=True):
        np.testing.assert_allclose(result, np.rot90(image, turns), rtol=0, atol=2e-6)


def test_angles_are_uniform(drawn):
    assert_uniform(np.degrees(drawn["rotation"]), -30, 30)


def test_every_position_of_a_crop_is_equally_likely(drawn):
    """There are 3 x 13, each expected 10 times; chi-squared of 38 degrees of freedom is below 70 in 999 of 1000."""
    counts = np.zeros((HEIGHT - SIDE + 1, WIDTH - SIDE + 1))
    for row, column in zip(drawn["row"], drawn["column"], strict=True):
        counts[row, column] += 1
    assert counts.min() > 0
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 70


def test_a_crop_of_the_full_size_changes_nothing():
    square = IMAGES[:3, :, :HEIGHT]
    np.testing.assert_array_equal(augmented("crop=20", images=square), square)


def test_half_of_the_images_are_flipped(drawn):
    assert abs(drawn["flip"].sum() - COUNT / 2) < 33  # true for 999 of 1000 draws


def test_brightness_adds_one_uniform_number_to_all_pixels(drawn):
    assert_uniform(drawn["brightness"], -0.2, 0.2)
    results = augmented("brightness=0.2")
    np.testing.assert_allclose(
        results, np.clip(IMAGES + drawn["brightness"][:, None, None, None], 0, 1), rtol=0, atol=1e-6
    )
    assert (results.min(), results.max()) == (0, 1)


def test_contrast_multiplies_the_deviation_from_each_channels_mean(drawn):
    assert_uniform(drawn["contrast"], 0.8, 1.2)
    results = augmented("contrast=0.2")
    expected = np.stack([contrasted(*pair) for pair in zip(IMAGES, drawn["contrast"], strict=True)])
    np.testing.assert_allclose(results, expected, rtol=0, atol=1e-6)
    assert results.max() == 1


def test_augmentations_draw_independently_of_each_other(drawn):
    correlations = np.corrcoef(np.stack(list(drawn.values())).astype(float))
    assert abs(correlations - np.eye(len(drawn))).max() < 0.2  # four standard deviations


def test_all_together_draw_the_same_amounts_and_are_applied_in_the_order_of_the_fields(drawn):
    names = ("contrast=0.2", "flip", f"crop={SIDE}", "shift=0.1", "brightness=0.2", "rotation=30")
    results = augmented(*names)
    for index in range(0, COUNT, 50):
        draw = {name: draws[index] for name, draws in drawn.items()}
        image = shifted(rotated(IMAGES[index], draw["rotation"]), draw["down"], draw["right"])
        image = image[draw["row"] :, draw["column"] :][:SIDE, :SIDE]
        image = image[:, ::-1] if draw["flip"] else image
        image = contrasted(np.clip(image + draw["brightness"], 0, 1), draw["contrast"])
        np.testing.assert_allclose(results[index], image, rtol=0, atol=1e-5)  # the angle was recovered from an image
