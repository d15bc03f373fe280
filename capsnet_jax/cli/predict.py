"""The command `capsnet predict`: what the model of a run sees in image files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from jaxtyping import Float, UInt8

from capsnet_jax.data import central_crop
from capsnet_jax.data.augmentation import Augmentation
from capsnet_jax.data.folder import decode, read_header
from capsnet_jax.errors import UsageError
from capsnet_jax.runs.folder import Run, load_run
from capsnet_jax.train.evaluation import most_active, predict


@dataclass(frozen=True)
class Predict:
    """Tells the class of each image, how active its capsule is, and which class comes next.

    A line is `digit.png: 7 (0.97; next 9 at 0.21)`. The number is the activation of the class capsule: the length of
    its pose, or with some routings an activation of its own. It is how present the class is, from 0 to 1, each class
    apart from the others, and not a calibrated probability. Images should look like those of the data set: a dark digit
    on light paper is not what a model has learnt from light digits on black."""

    run_dir: tyro.conf.Positional[Path]
    """Folder of the run."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files of any kind that Pillow reads, of the size that the run was trained on. They become grey or RGB as
    the run's images are. They are resized only if the run resized its images (--image-size), and only the middle counts
    if it cropped them (--augment crop=SIDE)."""
    best: bool = False
    """Take the weights that did best on the validation images, and not the last ones."""

    def run(self) -> None:
        """Prints a line for each image, once all of them are read.

        Raises:
            UsageError: there are no images, the folder has no run, or a file cannot be read or has another size.
        """
        if not self.images:
            raise UsageError("There are no images to predict; expected one file or more after the run folder.")
        run, model = load_run(self.run_dir, best=self.best)
        images = np.stack([read_image(path, run) for path in self.images])
        for path, activations in zip(self.images, predict(model, images).activations, strict=True):
            print(f"{path}: {describe(activations, run.class_names, run.labels_per_image)}")


def read_image(path: Path, run: Run) -> UInt8[np.ndarray, "height width channels"]:
    """An image file, as the model of a run expects images.

    Raises:
        UsageError: the file cannot be read or has another size, or files have not as many channels as the run's images.
    """
    height, width, channels = run.image_shape
    if channels not in (1, 3):
        raise UsageError(f"The run {run.folder} is of images of {channels} channels; expected 1 or 3 for image files.")
    if not path.is_file():
        raise UsageError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; expected an image file.")
    data = run.config.data
    crop = Augmentation.parse(data.augment).crop
    size = file_height, file_width = read_header(path)[:2]
    if not (size == (height, width) or data.image_size or (crop is not None and min(size) >= crop)):
        raise UsageError(
            f"{path} is {file_height} x {file_width} pixels, height x width; expected {height} x {width}"
            f"{'' if crop is None else ', or larger to be cropped'}, as the run was trained on."
        )
    image = np.empty((*(data.image_size or size), channels), np.uint8)
    decode(path, image)
    return image if crop is None else central_crop(image[None], crop)[0]


def describe(activations: Float[np.ndarray, " o"], class_names: Sequence[str], labels_per_image: int = 1) -> str:
    """The most active classes, as many as an image has labels, and the one that comes next."""
    order = most_active(activations[None], min(labels_per_image + 1, len(activations)))[0]
    seen, following = order[:labels_per_image], order[labels_per_image:]
    names = " and ".join(class_names[index] for index in seen)
    numbers = [", ".join(f"{activations[index]:.2f}" for index in seen)]
    numbers += [f"next {class_names[index]} at {activations[index]:.2f}" for index in following]
    return f"{names} ({'; '.join(numbers)})"
