"""Augmentation options: parsing, errors, and randomness that depends on the key alone."""

from dataclasses import FrozenInstanceError

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capsnet_jax.data.augmentation import Augmentation, describe_augmentations
from capsnet_jax.errors import UsageError

IMAGES = np.random.default_rng(0).uniform(0.1, 1, size=(6, 20, 30, 2)).astype(np.float32)
ALL = ("contrast=0.2", "flip", "crop=18", "shift=0.1", "brightness=0.2", "rotation=30")


def test_jit_and_vmap_over_keys_give_the_same_images():
    augmentation, images = Augmentation.parse(ALL), jnp.asarray(IMAGES)
    keys = jax.random.split(jax.random.key(7), 3)
    at_once = jax.jit(jax.vmap(augmentation, in_axes=(0, None)))(keys, images)
    for key, results in zip(keys, at_once, strict=True):
        # Compilation may change the last bit of a coordinate of up to 30, which is 2e-6 of a pixel: 3e-6 measured.
        np.testing.assert_allclose(results, augmentation(key, images), rtol=0, atol=1e-5)
    assert len({result.tobytes() for result in np.asarray(at_once).reshape(18, -1)}) == 18
    same_image = np.asarray(augmentation(keys[0], jnp.stack([images[0]] * 6)))
    assert len({result.tobytes() for result in same_image}) == 6


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_the_dtype_of_images_is_kept(dtype):
    with jax.enable_x64(True):
        images = jax.ShapeDtypeStruct(IMAGES.shape, dtype)
        for name in ALL:
            assert jax.eval_shape(Augmentation.parse((name,)), jax.random.key(1), images).dtype == dtype


def test_no_augmentation_returns_the_same_array():
    images = jnp.asarray(IMAGES)
    assert Augmentation.parse(())(jax.random.key(1), images) is images
    assert Augmentation.parse(("shift=0", "rotation=0", "contrast=0"))(jax.random.key(1), images) is images


def test_an_augmentation_is_hashable_and_immutable():
    augmentation = Augmentation.parse(ALL)
    assert augmentation == Augmentation.parse(ALL[::-1])
    assert hash(augmentation) == hash(Augmentation.parse(ALL[::-1]))
    assert augmentation.crop == 18
    assert Augmentation().crop is None
    with pytest.raises(FrozenInstanceError):
        augmentation.flip = False


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("zoom=2",), "Unknown augmentation 'zoom=2'; expected any of rotation=DEGREES, .*flip, .*contrast=AMOUNT"),
        (("",), "Unknown augmentation ''"),
        (("flip", "rotation"), r"'rotation'; expected rotation=DEGREES \(from 0 to 180\): rotate"),
        (("rotation=",), r"'rotation='; expected rotation=DEGREES \(from 0 to 180\)"),
        (("rotation=far",), r"'rotation=far'; expected rotation=DEGREES \(from 0 to 180\)"),
        (("rotation=181",), r"'rotation=181.0'; expected rotation=DEGREES \(from 0 to 180\)"),
        (("shift=1",), r"'shift=1.0'; expected shift=FRACTION \(at least 0 and less than 1\)"),
        (("shift=-0.1",), "'shift=-0.1'"),
        (("shift=nan",), "'shift=nan'"),
        (("shift_pixels=1.5",), r"'shift_pixels=1.5'; expected shift_pixels=PIXELS \(a whole number"),
        (("shift_pixels=-1",), "'shift_pixels=-1'"),
        (("crop=0",), r"'crop=0'; expected crop=SIDE \(a whole number of at least 1\)"),
        (("flip=1",), "Unknown augmentation 'flip=1'; expected any of .* flip, "),
        (("brightness=1.1",), r"'brightness=1.1'; expected brightness=AMOUNT \(from 0 to 1\)"),
        (("contrast=-1",), r"'contrast=-1.0'; expected contrast=AMOUNT \(from 0 to 1\)"),
        (("shift=0.1", "flip", "shift=0.2"), "augmentation shift twice, again as 'shift=0.2'"),
        (("shift_pixels=2", "shift=0.1"), "shift=0.1 and shift_pixels=2; expected one of them"),
    ],
)
def test_invalid_options_raise(names, message):
    with pytest.raises(UsageError, match=message):
        Augmentation.parse(names)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("crop=21", "crop is 21 for images of 20 x 30; expected at most 20"),
        ("shift_pixels=20", "shift_pixels is 20 for images of 20 x 30; expected less than 20"),
    ],
)
def test_images_that_are_too_small_raise(name, message):
    with pytest.raises(UsageError, match=message):
        Augmentation.parse((name,))(jax.random.key(1), jnp.asarray(IMAGES))


def test_every_augmentation_is_described_in_a_line():
    lines = describe_augmentations().splitlines()
    assert [line.split(" ")[0].split("=")[0] for line in lines] == list(Augmentation.__dataclass_fields__)
    assert lines[0].startswith("rotation=DEGREES (from 0 to 180): rotate about the centre")
