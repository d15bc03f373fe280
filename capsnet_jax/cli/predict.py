"""The command `capsnet predict`: classify image files with a trained model."""

import csv
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO, StringIO
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps

from capsnet_jax.data import central_crop
from capsnet_jax.data.augmentation import Augmentation
from capsnet_jax.data.folder import SUFFIXES, image_files, open_image, resized, with_channels
from capsnet_jax.errors import UsageError
from capsnet_jax.runs.folder import Run, load_run
from capsnet_jax.train.evaluation import EVALUATION_BATCH, most_active, predict

MAX_BYTES = 500_000_000  # of an image from standard input or another pipe, which may have no end


@dataclass(frozen=True)
class Predict:
    """Classify image files: print the class, the activation of its capsule, and the runner-up.

    A line looks like `digit.png: 7 (0.97; next 9 at 0.21)`. The number is the activation
    of the class capsule, from 0 to 1: usually the length of its pose. Activations of the
    classes are independent of each other, and are not calibrated probabilities.

    Images must look like those of the data set: a model of light digits on black does not
    recognize dark digits on white (--invert) or small ones in a corner.

    A file that cannot be read is reported, and the others are classified; the exit status is then 2."""

    run_dir: tyro.conf.Positional[Path]
    """Folder of the run, or name of a pretrained model."""
    paths: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH [PATH ...]")]]
    """Image files of any format that Pillow reads; folders, for the image files in them; - for standard input.
    They have the size of the training images, unless --resize is given here,
    or --image-size or --augment crop=SIDE was given to the run."""
    resize: bool = False
    """Fit images of any size into that of the model: turn them upright, keep their proportions, pad with black."""
    invert: bool = False
    """Swap light and dark, for a model of light shapes on black and drawings that are dark on white."""
    top: Annotated[int | None, tyro.conf.arg(help_behavior_hint="(default: those of an image, and the runner-up)")] = (
        None
    )
    """Number of classes to print, the most active first."""
    json: bool = False
    """Print a JSON object for each image, each on a line: file and predictions, each with class and activation."""
    csv: bool = False
    """Print a table in CSV: file, class, activation, class_2, activation_2 and so on."""
    best: bool = False
    """Use the weights that were best on validation images instead of the last ones."""
    trust_code: bool = False
    """Import the routing that the run names, if it is not of this package. That runs code."""

    def run(self) -> int:
        """Print the predictions; returns the exit status.

        Raises:
            UsageError: an option is wrong, or the model cannot be loaded or is not of grey or RGB images.
        """
        if not self.paths:
            raise UsageError("There are no images to predict; expected files, folders or - after the run folder.")
        if self.json and self.csv:
            raise UsageError("--json and --csv are given; expected one of them.")
        run, model = load_run(self.run_dir, best=self.best, trust_code=self.trust_code)
        if run.image_shape[-1] not in (1, 3):
            raise UsageError(f"The run {self.run_dir} is of images of {run.image_shape[-1]} channels; expected 1 or 3.")
        if self.top is not None and not 1 <= self.top <= run.num_classes:
            raise UsageError(f"top is {self.top}; expected 1 to {run.num_classes}, the number of classes.")
        top = min(run.labels_per_image + 1, run.num_classes) if self.top is None else self.top
        if self.csv:
            others = [f"{column}_{rank}" for rank in range(2, top + 1) for column in ("class", "activation")]
            print(csv_line(["file", "class", "activation", *others]))
        errors: list[Exception] = []
        images = self._images(run, errors)
        while batch := list(islice(images, EVALUATION_BATCH)):
            activations = predict(model, np.stack([image for _, image, _ in batch])).activations
            for (name, _, changes), row, order in zip(batch, activations, most_active(activations, top), strict=True):
                classes = [(run.class_names[index], float(row[index])) for index in order]
                if self.json or self.csv:
                    print(as_json(name, classes) if self.json else as_csv(name, classes))
                    if changes:
                        print(f"capsnet: {name}: {changes}", file=sys.stderr)
                else:
                    text = describe(classes, None if self.top else run.labels_per_image)
                    print(f"{name}: {text}" + (f" [{changes}]" if changes else ""))
        return 2 if errors else 0

    def _images(
        self, run: Run, errors: list[Exception]
    ) -> Iterator[tuple[str, UInt8[np.ndarray, "height width channels"], str]]:
        """Yield name, pixels and changes of each image that can be read."""
        for path in self.paths:
            with _reported(path, errors):
                for name in files_of(path):
                    with _reported(name, errors):
                        yield name, *read_image(name, run, resize=self.resize, invert=self.invert)


@contextmanager
def _reported(name: str, errors: list[Exception]) -> Iterator[None]:
    """Print an error about a file instead of raising it, and append it to the list."""
    try:
        yield
    except (UsageError, OSError) as error:
        errors.append(error)
        text = f"{name} cannot be read: {error.strerror or error}." if isinstance(error, OSError) else error
        print(f"capsnet: error: {text}", file=sys.stderr)


def files_of(path: str) -> list[str]:
    """Return the image files in a folder, sorted, or the path itself if it is none. Prints how many are skipped.

    Raises:
        UsageError: the folder has no image files.
    """
    if not os.path.isdir(path):
        return [path]
    files = image_files(Path(path))
    if not files:
        raise UsageError(f"{path} is a folder without image files ({' '.join(SUFFIXES)}) in it; expected some.")
    others = sum(not name.startswith(".") for name in os.listdir(path)) - len(files)
    if others:
        print(f"capsnet: {path}: {len(files)} image files; skipped {others} without the suffix of one", file=sys.stderr)
    return [os.path.join(path, file.name) for file in files]


def read_image(
    name: str, run: Run, *, resize: bool = False, invert: bool = False
) -> tuple[UInt8[np.ndarray, "height width channels"], str]:
    """Read an image file, in the size and with the channels that the model of a run expects.

    Args:
        name: path of the file, or - for standard input.
        run: the run.
        resize: whether to turn the image upright, fit it into the size of the model and pad it with black. Otherwise
            it is resized and cropped as the run did it with its own.
        invert: whether to swap light and dark. Transparent pixels are then white before, as they are black otherwise.

    Returns:
        The pixels, and what `resize` and `invert` changed, in words.

    Raises:
        UsageError: the file cannot be read or has another size.
    """
    height, width, channels = run.image_shape
    data, changes = run.config.data, []
    with open_image(source_of(name), name) as file:
        if resize and file.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            changes.append("turned upright")
        upright = ImageOps.exif_transpose(file) if resize else file
        image = with_channels(upright, channels, "white" if invert else "black")
    if invert:
        image = ImageOps.invert(image)
        changes.append("inverted")
    crop = Augmentation.parse(data.augment).crop
    if resize:
        scale = min(height / image.height, width / image.width)
        fitted = resized(image, *(max(1, round(scale * side)) for side in (image.height, image.width)))
        if fitted.size != image.size:
            changes.append(f"resized from {image.height} x {image.width} to {fitted.height} x {fitted.width}")
        if fitted.size != (width, height):
            changes.append(f"padded to {height} x {width}")
        image = Image.new(image.mode, (width, height))
        image.paste(fitted, ((width - fitted.width) // 2, (height - fitted.height) // 2))
    elif data.image_size is not None:
        image = resized(image, *data.image_size)
    elif image.size != (width, height) and (crop is None or min(image.size) < crop):
        raise UsageError(
            f"{name} is {image.height} x {image.width} pixels, height x width; expected {height} x {width}"
            f"{'' if crop is None else ', or larger to be cropped'}, as the run was trained on, or --resize to fit it "
            "in."
        )
    pixels = np.atleast_3d(np.asarray(image))
    return pixels if crop is None else central_crop(pixels[None], crop)[0], ", ".join(changes)


def source_of(name: str) -> Path | BytesIO:
    """Return the file of a name, or its content if it is standard input or a pipe.

    Raises:
        UsageError: it does not exist, is too long for a pipe, or standard input is closed.
        OSError: it cannot be read.
    """
    if name == "-":
        if sys.stdin is None:
            raise UsageError("- is standard input, which is closed; expected an image.")
        content = sys.stdin.buffer.read(MAX_BYTES + 1)
    elif not os.path.exists(name):
        raise UsageError(f"{name} does not exist; expected an image file.")
    elif os.path.isfile(name):
        return Path(name)
    else:
        with open(name, "rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise UsageError(f"{name} has more than {MAX_BYTES:,} bytes; expected an image.")
    return BytesIO(content)


def describe(classes: Sequence[tuple[str, float]], num_labels: int | None) -> str:
    """Describe the most active classes and their activations in a line.

    Args:
        classes: names and activations, the most active first.
        num_labels: number of classes that an image shows; the others are called next. None to list all alike.
    """
    if num_labels is None:
        return ", ".join(f"{name} ({activation:.2f})" for name, activation in classes)
    seen, following = classes[:num_labels], classes[num_labels:]
    numbers = [", ".join(f"{activation:.2f}" for _, activation in seen)]
    numbers += [f"next {name} at {activation:.2f}" for name, activation in following]
    return f"{' and '.join(name for name, _ in seen)} ({'; '.join(numbers)})"


def as_json(name: str, classes: Sequence[tuple[str, float]]) -> str:
    """Format the most active classes of an image as a JSON object."""
    predictions = [{"class": each, "activation": round(activation, 6)} for each, activation in classes]
    return json.dumps({"file": name, "predictions": predictions})


def as_csv(name: str, classes: Sequence[tuple[str, float]]) -> str:
    """Format the most active classes of an image as a line of CSV."""
    return csv_line([name, *(cell for each, activation in classes for cell in (each, round(activation, 6)))])


def csv_line(cells: Sequence[object]) -> str:
    line = StringIO()
    csv.writer(line, lineterminator="").writerow(cells)
    return line.getvalue()
