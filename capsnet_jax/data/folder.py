"""Data sets from a folder of image files, with a folder for each class."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from itertools import zip_longest
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from capsnet_jax.data.dataset import Dataset, make_dataset
from capsnet_jax.data.idx import find_idx, names_of
from capsnet_jax.errors import UsageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N", "I")  # Pillow reads 16-bit files into the 32 bits of "I", too
GREY_MODES = ("1", "L", "LA", *SIXTEEN_BITS)
ALPHA_MODES = ("LA", "PA", "RGBA", "RGBa")
EVERY = 5  # without a test folder, every fifth image is for testing

Files = dict[str, list[Path]]  # image files of each class


def load_image_folder(folder: Path, image_size: tuple[int, int] | None = None, *, test_only: bool = False) -> Dataset:
    """Load images from `folder/train/CLASS/` and `folder/test/CLASS/`, or from `folder/CLASS/`.

    In the latter case every fifth image of each class, sorted by file name, is for testing. Class names are the sorted
    folder names. Both splits take the classes in turn, so that their first images show all classes.

    Images have one channel if all are grey, and are RGB otherwise; palettes count as colours. 16 bits are scaled to 8,
    transparent pixels are laid over black, and only the first frame of an animation is read. EXIF orientation is
    ignored. Hidden files and files without the suffix of an image are skipped.

    Args:
        folder: the folder.
        image_size: height and width to resize all images to, with antialiasing; None if they have one size already.
        test_only: whether to read the test images only, so that `folder/train/` may be missing. If it is there, it
            still counts for the number of channels.

    Raises:
        UsageError: the folders are not as above, there are fewer than two classes or a class without images, or an
            image cannot be read or has another size.
    """
    if image_size is not None and min(image_size) < 1:
        raise UsageError(f"image_size is {image_size}, and must be at least 1.")
    has_train = (folder / "train").is_dir()
    if (folder / "test").is_dir() and (has_train or (test_only and any(map(Path.is_dir, (folder / "test").iterdir())))):
        test = _files_of_classes(folder / "test")
        train = _files_of_classes(folder / "train") if has_train else {name: [] for name in test}
        if unpaired := sorted(train.keys() ^ test.keys()):
            lacking = folder / ("test" if unpaired[0] in train else "train")
            raise UsageError(f"{lacking} lacks the class {unpaired[0]!r}; expected the same classes in train and test.")
    else:
        classes = _files_of_classes(folder, at_least=EVERY)
        train = {name: [f for number, f in enumerate(files, 1) if number % EVERY] for name, files in classes.items()}
        test = {name: files[EVERY - 1 :: EVERY] for name, files in classes.items()}
    splits = [_in_turn(train), _in_turn(test)]
    with ThreadPoolExecutor() as threads:
        shape = _common_shape([path for paths, _ in splits for path in paths], image_size, threads)
        arrays: list[np.ndarray] = []
        for paths, labels in [_in_turn({}), splits[1]] if test_only else splits:
            images = np.empty((len(paths), *shape), np.uint8)
            list(threads.map(decode, paths, images))  # a list, to raise the errors of the threads
            arrays += [images, labels]
    return make_dataset(*arrays, num_classes=len(train), class_names=tuple(train))


def image_files(folder: Path) -> list[Path]:
    """List the image files in a folder, by their suffix, sorted; hidden ones are skipped."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def _files_of_classes(folder: Path, at_least: int = 1) -> Files:
    """Find the image files of each class, all sorted."""
    subfolders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(subfolders) < 2:
        found = f"only the folder {subfolders[0].name}" if subfolders else "no folder"
        idx = names_of(find_idx(folder))
        hint = f", or --dataset {idx[0]} --data-dir {folder} for its idx files" if idx else ""
        raise UsageError(
            f"{folder} has {found} in it; expected a folder of images for each of two or more classes{hint}."
        )
    classes = {}
    for subfolder in subfolders:
        classes[subfolder.name] = image_files(subfolder)
        if len(classes[subfolder.name]) < at_least:
            raise UsageError(
                f"{subfolder} has {len(classes[subfolder.name])} images ({' '.join(SUFFIXES)}) in it; expected "
                f"{at_least} or more in each class folder in {folder}, or in both {folder / 'train'} and "
                f"{folder / 'test'}; without these two, every fifth image of a class is for testing."
            )
    return classes


def _in_turn(classes: Files) -> tuple[list[Path], np.ndarray]:
    """List the first file of each class, then the second of each and so on, and their labels."""
    rounds = zip_longest(*classes.values())
    files = [(path, label) for turn in rounds for label, path in enumerate(turn) if path is not None]
    return [path for path, _ in files], np.array([label for _, label in files], int)


def _common_shape(paths: list[Path], size: tuple[int, int] | None, threads: ThreadPoolExecutor) -> tuple[int, int, int]:
    """Find height, width and channels for all images from the headers of their files."""
    headers = list(threads.map(read_header, paths))
    height, width, _ = headers[0]
    for path, header in zip(paths, headers, strict=True):
        if size is None and header[:2] != (height, width):
            raise UsageError(
                f"{path} is {header[0]} x {header[1]} pixels, height x width, but {paths[0]} is {height} x {width}; "
                "expected images of one size, or --image-size H W in training, which resizes all."
            )
    return *(size or (height, width)), 1 if all(mode in GREY_MODES for _, _, mode in headers) else 3


def read_header(path: Path) -> tuple[int, int, str]:
    """Read height, width and Pillow's mode of an image file.

    Raises:
        UsageError: the file cannot be read, or has floating-point pixels.
    """
    with open_image(path, path) as image:
        return image.height, image.width, image.mode


def decode(path: Path, target: UInt8[np.ndarray, "height width channels"]) -> None:
    """Read an image file into an array with 1 or 3 channels, and resize it if the array has another size.

    16 bits are scaled to 8, and transparent pixels become black.

    Raises:
        UsageError: the file cannot be read.
    """
    height, width, channels = target.shape
    with open_image(path, path) as file:
        image = with_channels(file, channels)
    target[:] = np.atleast_3d(np.asarray(resized(image, height, width)))


@contextmanager
def open_image(source: Path | BytesIO, name: str | Path) -> Iterator[Image.Image]:
    """Open an image file. Its pixels must be used in this block.

    Args:
        source: the file.
        name: its name in error messages.

    Raises:
        UsageError: the file cannot be read as an image, or has floating-point pixels.
    """
    try:
        with Image.open(source) as image:
            if image.mode == "F":
                raise ValueError("its pixels are floating-point numbers; expected whole numbers of 8 or 16 bits")
            yield image
    except Exception as error:  # Pillow raises many kinds of errors for damaged files
        why = "its format is unknown" if isinstance(error, UnidentifiedImageError) else error
        raise UsageError(f"{name} cannot be read as an image ({why}); replace or remove it.") from error


def with_channels(image: Image.Image, channels: int, background: str = "black") -> Image.Image:
    """Convert an image to grey or RGB of 8 bits, and lay transparent pixels over a background.

    Raises:
        ValueError: it has more than 16 bits.
    """
    if image.mode in SIXTEEN_BITS:
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its pixels are from {values.min()} to {values.max()}; expected at most 16 bits")
        image = Image.fromarray(np.round(values / 257).astype(np.uint8))  # Pillow would not scale them
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image.convert("RGBA"))
    return image.convert("L" if channels == 1 else "RGB")


def resized(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize an image with antialiasing."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BILINEAR)
