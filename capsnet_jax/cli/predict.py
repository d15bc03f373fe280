"""The command `capsnet predict`: classify image files with a trained model."""

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
    """Classify image files: print the class, the activation of its capsule, and the runner-up.

    A line looks like `digit.png: 7 (0.97; next 9 at 0.21)`. The number is the activation
    of the class capsule, from 0 to 1: usually the length of its pose. Activations of the
    classes are independent of each other, and are not calibrated probabilities.

    Images must look like those of the data set: a model of light digits on black does not
    recognize dark digits on white."""

    run_dir: tyro.conf.Positional[Path]
    """Folder of the run."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files of any format that Pillow reads, in the size of the training images.
    They are resized or cropped only if the run did that (--image-size, --augment crop=SIDE)."""
    best: bool = False
    """Use the weights that were best on validation images instead of the last ones."""
    trust_code: bool = False
    """Import the routing that the run names, if it is not of this package. That runs code."""

    def run(self) -> None:
        if not self.images:
            raise UsageError("There are no images to predict; expected one file or more after the run folder.")
        run, model = load_run(self.run_dir, best=self.best, trust_code=self.trust_code)
        images = np.stack([read_image(path, run) for path in self.images])
        for path, activations in zip(self.images, predict(model, images).activations, strict=True):
            print(f"{path}: {describe(activations, run.class_names, run.labels_per_image)}")


def read_image(path: Path, run: Run) -> UInt8[np.ndarray, "height width channels"]:
    """Read an image file, in the size and with the channels that the model of a run expects.

    Raises:
        UsageError: the file cannot be read or has another size, or the model is not of grey or RGB images.
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
    """Describe the most active classes, as many as an image has labels, and the runner-up."""
    order = most_active(activations[None], min(labels_per_image + 1, len(activations)))[0]
    seen, following = order[:labels_per_image], order[labels_per_image:]
    names = " and ".join(class_names[index] for index in seen)
    numbers = [", ".join(f"{activations[index]:.2f}" for index in seen)]
    numbers += [f"next {class_names[index]} at {activations[index]:.2f}" for index in following]
    return f"{names} ({'; '.join(numbers)})"
