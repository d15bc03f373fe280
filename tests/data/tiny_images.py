"""A folder of small colour images in classes that a model can learn."""

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

BACKGROUND = 60  # the largest value of the noise
GOLDEN_RATIO = 0.618  # turns of the hue from class to class: far apart for neighbours, and never the same


def write_image_folder(
    path: Path,
    classes: Sequence[str],
    height: int,
    width: int,
    per_class: int,
    *,
    test_per_class: int = 0,
    seed: int = 0,
    suffix: str = ".png",
) -> Path:
    """Write `path/CLASS/NUMBER.png`, or `path/train/CLASS/` and `path/test/CLASS/` with separate test images.

    Each image is dark noise with a bright patch, whose colour and place are those of its class.

    Args:
        path: new folder, which is also returned.
        classes: names of the class folders; a string for a class of each letter.
        height: height of the images, in pixels.
        width: width of the images, in pixels.
        per_class: number of images of each class, in `path/train` if there is one.
        test_per_class: number of images of each class in `path/test`; 0 for neither.
        seed: seed of the noise.
        suffix: suffix of the files, which sets their format.
    """
    rng = np.random.default_rng(seed)
    splits = {"train": per_class, "test": test_per_class} if test_per_class else {"": per_class}
    for split, count in splits.items():
        for label, name in enumerate(classes):
            folder = path / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(class_image(label, len(classes), height, width, rng)).save(
                    folder / f"{number:03}{suffix}"
                )
    return path


def class_image(label: int, num_classes: int, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """An image `[height width 3]` of a class."""
    image = rng.integers(0, BACKGROUND, (height, width, 3), dtype=np.uint8)
    per_side = int(np.ceil(np.sqrt(num_classes)))
    row, column = divmod(label, per_side)
    colour = np.array(colorsys.hsv_to_rgb(label * GOLDEN_RATIO % 1, 1, 1)) * 255
    rows = slice(row * height // per_side, (row + 1) * height // per_side)
    columns = slice(column * width // per_side, (column + 1) * width // per_side)
    image[rows, columns] = colour.round()
    return image
