"""The command `capsnet figures`: pictures of what a trained model does, and how it was trained."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import jax.numpy as jnp
import numpy as np
import tyro
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from matplotlib.figure import Figure

from capsnet_jax.cli.evaluate import labels_by_name
from capsnet_jax.cli.report import History, runs_of
from capsnet_jax.cli.train import picture
from capsnet_jax.data import Dataset, configured_dataset
from capsnet_jax.data.augmentation import Augmentation
from capsnet_jax.errors import UsageError
from capsnet_jax.figures import (
    Mistakes,
    activations_figure,
    confusion_figure,
    convergence_figure,
    couplings_figure,
    learning_curves_figure,
    perturbations_figure,
    save_figure,
    separations_figure,
)
from capsnet_jax.nn.model import CapsNet
from capsnet_jax.ops import to_unit_range
from capsnet_jax.runs.folder import Run, load_run, read_run
from capsnet_jax.runs.metrics import METRICS
from capsnet_jax.train.evaluation import Predictions, most_active, predict, right_and_wrong, score
from capsnet_jax.train.inspection import (
    PERTURBATIONS,
    Iterations,
    measure_convergence,
    num_iterations,
    perturb,
    reconstruct_each,
    route_by_iteration,
)

Name = Literal[
    "reconstructions",
    "perturbations",
    "separations",
    "couplings",
    "convergence",
    "confusion",
    "activations",
    "learning_curves",
]
ROUTED = 100  # test images in the figure of convergence
SEPARATED = 8  # test images in the figure of separations
MISTAKES = 12  # wrongly classified images beside the confusion matrix
COUPLED_CLASSES = 12  # largest number of classes in the figure of couplings
NO_DECODER = "the model has no decoder"


@dataclass(frozen=True)
class Figures:
    """Draw a trained model at work on its test images, as PNG and SVG.

    A figure that does not suit the model or its data is left out, with the reason.
    Of a folder of several seeds, learning curves are of all seeds, and the other figures of the first one.
    docs/figures.md shows and explains the figures."""

    run_dir: tyro.conf.Positional[Path]
    """Folder of the run, or name of a pretrained model."""
    output: Annotated[
        Path | None, tyro.conf.arg(help_behavior_hint="(default: figures in the run folder, or NAME-figures)")
    ] = None
    """Folder for the figures."""
    only: Annotated[tuple[Name, ...], tyro.conf.arg(help_behavior_hint="(default: all)")] = ()
    """Figures to draw."""
    image: int = 0
    """Number of the test image whose couplings and pose are drawn, from 0."""
    data_dir: Path | None = None
    """Folder of the data set, if not the one of the run."""
    best: bool = False
    """Draw the weights that were best on validation images instead of the last ones."""
    trust_code: bool = False
    """Import the routing that the run names, if it is not of this package. That runs code."""

    def run(self) -> None:
        """Draw the figures and print their files.

        Raises:
            UsageError: an option is wrong, the output folder cannot be written, or run or data set cannot be loaded.
        """
        folders = runs_of(self.run_dir) if self.run_dir.is_dir() else [self.run_dir]
        read_run(folders[0], trust_code=self.trust_code)  # raises before a folder is made
        # Nothing is written into the package, where the folder of a pretrained model is.
        default = self.run_dir / "figures" if self.run_dir.is_dir() else Path(f"{self.run_dir}-figures")
        output = self.output or default
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"The output folder {output} cannot be written: {error.strerror}.") from error
        subject = Subject(folders, self)
        for name in self.only or FIGURES:
            drawn = FIGURES[name](subject)
            if isinstance(drawn, str):
                print(f"No {name}: {drawn}.")
            else:
                save_figure(drawn, output / f"{name}.png")
                drawn.set_layout_engine("none")  # the other file has the same layout, which takes long to compute
                save_figure(drawn, output / f"{name}.svg")
                print(f"{output / name}.png and .svg")


@dataclass(frozen=True)
class Subject:
    """What is drawn, loaded and computed when a figure needs it first.

    Attributes:
        folders: run folders of all seeds.
        options: options of the command.
    """

    folders: list[Path]
    options: Figures

    @cached_property
    def loaded(self) -> tuple[Run, CapsNet]:
        return load_run(self.folders[0], best=self.options.best, trust_code=self.options.trust_code)

    @property
    def run(self) -> Run:
        return self.loaded[0]

    @property
    def model(self) -> CapsNet:
        return self.loaded[1]

    @cached_property
    def dataset(self) -> Dataset:
        data = self.run.config.data
        data = replace(data, data_dir=self.options.data_dir or data.data_dir)
        dataset = configured_dataset(data, test_only=True).cropped(Augmentation.parse(data.augment).crop)
        if not 0 <= self.options.image < len(dataset.test_images):
            raise UsageError(
                f"image is {self.options.image}; expected 0 to {len(dataset.test_images) - 1}, as there are "
                f"{len(dataset.test_images)} test images."
            )
        labels = labels_by_name(self.run.class_names, dataset, data.dataset)
        return dataset._replace(test_labels=labels, class_names=self.run.class_names)

    @property
    def labels(self) -> Int[np.ndarray, "images k"]:
        return rearrange(self.dataset.test_labels, "images ... -> images (...)")

    @property
    def image(self) -> Shaped[np.ndarray, "1 height width channels"]:
        """The test image that was chosen."""
        return self.dataset.test_images[self.options.image :][:1]

    @cached_property
    def routed(self) -> Iterations:
        """Results of each routing iteration for this image."""
        return route_by_iteration(self.model, self.image)

    @cached_property
    def predictions(self) -> Predictions:
        """Activations of the classes for all test images."""
        return predict(self.model, self.dataset.test_images)


def reconstructions(subject: Subject) -> Figure | str:
    if subject.model.decoder is None:
        return NO_DECODER
    return picture(subject.model, subject.dataset)


def perturbations(subject: Subject) -> Figure | str:
    if subject.model.decoder is None:
        return NO_DECODER
    poses, label = subject.routed.poses[0, -1], int(subject.routed.activations[0, -1].argmax())
    return perturbations_figure(perturb(subject.model, poses, label), PERTURBATIONS)


def separations(subject: Subject) -> Figure | str:
    if subject.model.decoder is None:
        return NO_DECODER
    if (k := subject.labels.shape[1]) != 2:
        return f"images have {k} label{'s' if k > 1 else ''} each, and two colours show two labels"
    images = subject.dataset.test_images[:SEPARATED]
    classes, separated = reconstruct_each(subject.model, images, k)
    return separations_figure(
        as_floats(images), separated, subject.labels[:SEPARATED], classes, subject.run.class_names
    )


def couplings(subject: Subject) -> Figure | str:
    routed = subject.routed
    shown = np.sort(most_active(routed.activations[0, -1:], min(COUPLED_CLASSES, subject.run.num_classes))[0])
    return couplings_figure(
        routed.couplings[0][..., shown],
        routed.activations[0][:, shown],
        as_floats(subject.image)[0],
        [subject.run.class_names[index] for index in shown],
    )


def convergence(subject: Subject) -> Figure | str:
    number = num_iterations(subject.model)
    if number is None or number == 1:
        routing = subject.run.config.model.routing
        return f"routing {routing} has {'no option num_iterations' if number is None else 'only one iteration'}"
    images, labels = subject.dataset.test_images[:ROUTED], subject.labels[:ROUTED]
    return convergence_figure(*measure_convergence(subject.model, images, labels))


def confusion(subject: Subject) -> Figure | str:
    matrix = score(subject.predictions, subject.labels).confusion
    if matrix is None:
        return f"images have {subject.labels.shape[1]} labels each, for which there is no confusion matrix"
    activations, labels = subject.predictions.activations, subject.labels[:, 0]
    predicted = most_active(activations, 1)[:, 0]
    # The worst mistakes are those where the predicted class leads most over the right one.
    lead = activations.max(axis=1) - right_and_wrong(activations, subject.labels)[0][:, 0]
    worst = np.argsort(-lead, kind="stable")[:MISTAKES]
    worst = worst[predicted[worst] != labels[worst]]
    images = as_floats(subject.dataset.test_images[worst])
    mistakes = Mistakes(images, labels[worst], predicted[worst], activations[worst, predicted[worst]])
    return confusion_figure(np.array(matrix), subject.run.class_names, mistakes)


def activations(subject: Subject) -> Figure | str:
    right, wrong = right_and_wrong(subject.predictions.activations, subject.labels)
    return activations_figure(right.ravel(), wrong)


def learning_curves(subject: Subject) -> Figure | str:
    if missing := [folder for folder in subject.folders if not (folder / METRICS).exists()]:
        return f"{missing[0]} has no {METRICS}"
    curves = [History.read(folder).curves() for folder in subject.folders]
    return learning_curves_figure({str(subject.options.run_dir): curves})


FIGURES: dict[Name, Callable[[Subject], Figure | str]] = {
    "reconstructions": reconstructions,
    "perturbations": perturbations,
    "separations": separations,
    "couplings": couplings,
    "convergence": convergence,
    "confusion": confusion,
    "activations": activations,
    "learning_curves": learning_curves,
}
"""How each figure is drawn; a text is the reason why it does not suit the run."""


def as_floats(images: Shaped[np.ndarray, "b height width channels"]) -> Float[np.ndarray, "b height width channels"]:
    return np.asarray(to_unit_range(jnp.asarray(images)))
