"""Your own images: a folder with a folder of image files for each class."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from capsnet_jax.data.dataset import Dataset, make_dataset
from capsnet_jax.data.idx import holds_idx
from capsnet_jax.errors import UsageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N", "I")  # "I" has room for 32, of which Pillow's readers use 16
GREY_MODES = ("1", "L", "LA", *SIXTEEN_BITS)
ALPHA_MODES = ("LA", "PA", "RGBA", "RGBa")
EVERY = 5  # one image of so many is for testing, as in digits


def load_image_folder(folder: Path, image_size: tuple[int, int] | None = None) -> Dataset:
    """The images in `folder/train/CLASS/` and `folder/test/CLASS/`; or, without these two, in `folder/CLASS/`.

    In the latter case every fifth image of each class, in the order of the file names, is for testing. Classes are the
    names of their folders, sorted. Both splits go through the classes in turn, so that their first images are of all.

    Images stay of one channel if all are grey, and otherwise become RGB; a palette counts as colours. 16 bits become 8,
    and what is transparent is laid over black, the background that shifted images have, too. An animation is its first
    frame; orientation in EXIF is not looked at. Hidden files and those that are not named like images are left out.

    Args:
        folder: the folder.
        image_size: height and width in pixels that all images are resized to, antialiased; if None they must be alike.

    Raises:
        UsageError: the folders are not as above, have fewer than two classes or a class without images, or an image
            cannot be read or is of another size.
    """
    if image_size is not None and min(image_size) < 1:
        raise UsageError(f"image_size is {image_size}, and must be at least 1.")
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        train, test = _files_of_classes(folder / "train"), _files_of_classes(folder / "test")
        if unpaired := sorted(train.keys() ^ test.keys()):
            lacking = folder / ("test" if unpaired[0] in train else "train")
            raise UsageError(f"{lacking} lacks the class {unpaired[0]!r}; expected the same classes in train and test.")
    else:
        train, test = _every_fifth_for_testing(folder, _files_of_classes(folder))
    splits = _in_turn(train), _in_turn(test)
    with ThreadPoolExecutor() as threads:
        shape = _common_shape([path for paths, _ in splits for path in paths], image_size, threads)
        arrays: list[np.ndarray] = []
        for paths, labels in splits:
            images = np.empty((len(paths), *shape), np.uint8)
            list(threads.map(decode, paths, images))  # for its errors
            arrays += [images, labels]
    return make_dataset(*arrays, num_classes=len(train), class_names=tuple(train))


def _files_of_classes(folder: Path) -> dict[str, list[Path]]:
    """The image files of each class, all sorted."""
    subfolders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(subfolders) < 2:
        found = f"only the folder {subfolders[0].name}" if subfolders else "no folder"
        hint = f", or --dataset mnist --data-dir {folder} for its idx files" if holds_idx(folder) else ""
        raise UsageError(
            f"{folder} has {found} in it; expected a folder of images for each of two or more classes{hint}."
        )
    classes = {path.name: sorted(filter(_is_image, path.iterdir())) for path in subfolders}
    for name, files in classes.items():
        if not files:
            raise UsageError(
                f"{folder / name} has no image ({' '.join(SUFFIXES)}) in it; expected class folders with images in "
                f"{folder}, or in both {folder / 'train'} and {folder / 'test'}."
            )
    return classes


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _every_fifth_for_testing(
    folder: Path, classes: dict[str, list[Path]]
) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    train, test = {}, {}
    for name, files in classes.items():
        if len(files) < EVERY:
            raise UsageError(
                f"{folder / name} has only {len(files)} images; expected {EVERY} or more, of which every fifth is for "
                f"testing, or all classes in both {folder / 'train'} and {folder / 'test'}."
            )
        train[name] = [file for number, file in enumerate(files, start=1) if number % EVERY]
        test[name] = files[EVERY - 1 :: EVERY]
    return train, test


def _in_turn(classes: dict[str, list[Path]]) -> tuple[list[Path], np.ndarray]:
    """The first file of each class, then the second of each and so on; and their labels."""
    rounds = zip_longest(*classes.values())
    files = [(path, label) for turn in rounds for label, path in enumerate(turn) if path is not None]
    return [path for path, _ in files], np.array([label for _, label in files])


def _common_shape(
    paths: list[Path], image_size: tuple[int, int] | None, threads: ThreadPoolExecutor
) -> tuple[int, int, int]:
    """Height, width and channels for all images, by the headers of their files."""
    headers = list(threads.map(read_header, paths))
    height, width, _ = headers[0]
    for path, header in zip(paths, headers, strict=True):
        if image_size is None and header[:2] != (height, width):
            raise UsageError(
                f"{path} is {header[0]} x {header[1]} pixels, height x width, but {paths[0]} is {height} x {width}; "
                "expected images of one size, or --image-size H W, which resizes all."
            )
    return *(image_size or (height, width)), 1 if all(mode in GREY_MODES for _, _, mode in headers) else 3


def read_header(path: Path) -> tuple[int, int, str]:
    """Height, width and Pillow's mode of an image file.

    Raises:
        UsageError: it cannot be read, or has floating-point pixels.
    """
    with _errors_name(path), Image.open(path) as image:
        if image.mode == "F":
            raise UsageError(f"{path} has floating-point pixels; expected whole numbers of 8 or 16 bits.")
        return image.height, image.width, image.mode


def decode(path: Path, target: UInt8[np.ndarray, "height width channels"]) -> None:
    """Reads an image file into an array of as many channels, 1 or 3, resized if that has another height or width.

    16 bits are scaled to 8, and what is transparent is black.

    Raises:
        UsageError: the file cannot be read.
    """
    height, width, channels = target.shape
    with _errors_name(path), Image.open(path) as file:
        image = _eight_bits(file, path) if file.mode in SIXTEEN_BITS else file
        if image.mode in ALPHA_MODES or "transparency" in image.info:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
        image = image.convert("L" if channels == 1 else "RGB")
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        target[:] = np.atleast_3d(np.asarray(image))


def _eight_bits(image: Image.Image, path: Path) -> Image.Image:
    """Scaled, which Pillow does not do."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise UsageError(f"{path} has pixels from {values.min()} to {values.max()}; expected at most 16 bits.")
    return Image.fromarray(np.round(values / 257).astype(np.uint8))


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # Pillow's readers meet damage with errors of many kinds
        raise UsageError(f"{path} cannot be read as an image ({error}); replace or remove it.") from error
