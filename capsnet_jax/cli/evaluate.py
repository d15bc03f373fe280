"""The command `capsnet evaluate`: accuracy, precision, recall and confusions of a trained model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from jaxtyping import Int

from capsnet_jax.data import Dataset, configured_dataset, existing_path
from capsnet_jax.data.augmentation import Augmentation
from capsnet_jax.errors import UsageError
from capsnet_jax.figures import confusion_figure, save_figure
from capsnet_jax.runs.folder import load_run
from capsnet_jax.tables import markdown_table, number_cell
from capsnet_jax.train.evaluation import Evaluation, evaluate, final_line

MATRIX_CLASSES = 12  # largest number of classes for which the confusion matrix is printed
CONFUSIONS = 10  # number of the most frequent confusions printed for more classes
NAMED = 10  # number of classes that an error names
SHORT_NAME = 5  # longest class name that heads a column of the matrix


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a trained model on all test images.

    Prints precision and recall of each class, confusions, and the test accuracy
    with its 95 % confidence interval (Wilson)."""

    run_dir: tyro.conf.Positional[Path]
    """Folder of the run, or name of a pretrained model."""
    dataset: str | None = None
    """Another data set than the one of the run. It needs no training images."""
    data_dir: Path | None = None
    """Folder of the data set, if not the one of the run."""
    transpose: bool = False
    """Swap rows and columns of the images of --dataset."""
    match: Literal["name", "order"] = "name"
    """How classes of the data set are found among those of the model:
    by their names, of which some may be missing, or by their order, whatever their names are."""
    limit: int | None = None
    """Use only this many test images, from the start of the set."""
    best: bool = False
    """Evaluate the weights that were best on validation images instead of the last ones."""
    trust_code: bool = False
    """Import the routing that the run names, if it is not of this package. That runs code."""
    confusion: Path | None = None
    """File for a picture of the confusion matrix: .png, .pdf or .svg."""

    def run(self) -> None:
        """Print the evaluation, and draw the confusion matrix.

        Raises:
            UsageError: an option is wrong, or model or data set cannot be loaded or do not fit each other.
        """
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"limit is {self.limit}, and must be at least 1.")
        run, model = load_run(self.run_dir, best=self.best, trust_code=self.trust_code)
        data = run.config.data
        if self.dataset not in (None, data.dataset):
            path = existing_path(self.dataset)
            image_size = data.image_size if path is not None and path.is_dir() else None  # only folders are resized
            # The run's own data_dir is of its data set; mnist and its kin all have files of the same names.
            data = replace(data, dataset=self.dataset, image_size=image_size, data_dir=None, transpose=False)
        data = replace(data, data_dir=self.data_dir or data.data_dir, transpose=self.transpose or data.transpose)
        dataset = configured_dataset(data, test_only=True).cropped(Augmentation.parse(data.augment).crop)
        images, labels = dataset.test_images, self.labels_of(run.class_names, dataset, data.dataset)
        if self.limit is not None and self.limit > len(images):
            raise UsageError(f"limit is {self.limit}, with only {len(images)} test images.")
        if self.confusion and labels.ndim > 1:
            raise UsageError(
                f"Images of {data.dataset!r} have several classes each, for which there is no confusion matrix; "
                "expected no --confusion."
            )
        evaluation = evaluate(model, images[: self.limit], labels[: self.limit])
        print(describe(evaluation, run.class_names))
        if self.confusion and evaluation.confusion is not None:
            save_figure(confusion_figure(np.array(evaluation.confusion), run.class_names), self.confusion)

    def labels_of(self, class_names: Sequence[str], dataset: Dataset, name: str) -> Int[np.ndarray, "images *k"]:
        """Return the labels of the test images as indices of the classes of the model.

        Raises:
            UsageError: the model does not have all the classes or, if they are matched by their order, has more.
        """
        if self.match == "order":
            if dataset.num_classes != len(class_names):
                raise UsageError(
                    f"Data set {name!r} has {dataset.num_classes} classes, and the model was made for "
                    f"{len(class_names)}; expected as many, or --match name."
                )
            return dataset.test_labels
        return labels_by_name(class_names, dataset, name)


def labels_by_name(class_names: Sequence[str], dataset: Dataset, name: str) -> Int[np.ndarray, "images *k"]:
    """Return the labels of the test images as indices of the classes of a model that have the same names.

    Args:
        class_names: classes of the model.
        dataset: the data set, whose classes may be fewer or in another order.
        name: name of the data set, for messages.

    Raises:
        UsageError: the model does not have all the classes.
    """
    index = {name: number for number, name in enumerate(class_names)}
    if unknown := [name for name in dataset.class_names if name not in index]:
        raise UsageError(
            f"Data set {name!r} has the classes {some(unknown)}, which the model does not have: its own are "
            f"{some(class_names)}; expected the same names, or --match order for classes in the same order."
        )
    return np.array([index[name] for name in dataset.class_names], np.int32)[dataset.test_labels]


def some(names: Sequence[str]) -> str:
    """List the first few names."""
    return ", ".join(map(repr, names[:NAMED])) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def describe(evaluation: Evaluation, class_names: Sequence[str]) -> str:
    """Describe an evaluation in tables and sentences; the last line is `final_line`."""
    low, high = (100 * (1 - end) for end in reversed(evaluation.interval))
    columns = zip(class_names, evaluation.counts, evaluation.precision, evaluation.recall, strict=True)
    rows = [
        (name, number_cell(count, 0), number_cell(precision, 4), number_cell(recall, 4))
        for name, count, precision, recall in columns
    ]
    paragraphs = [markdown_table([("class", "images", "precision", "recall"), *rows])]
    if evaluation.confusion is not None:
        paragraphs.append(describe_confusion(np.array(evaluation.confusion), class_names))
    lines = [f"mean activation of the right capsule {evaluation.right_activation:.3f}"]
    if evaluation.runner_up_activation is not None:
        lines[0] += f", of the most active wrong one {evaluation.runner_up_activation:.3f}"
    if evaluation.reconstruction_error is not None:
        lines.append(f"mean squared error of a reconstructed pixel {evaluation.reconstruction_error:.5f}")
    lines += [f"95 % interval of the error {low:.2f} to {high:.2f} %", final_line(evaluation)]
    return "\n\n".join([*paragraphs, "\n".join(lines)])


def describe_confusion(confusion: Int[np.ndarray, "o o"], class_names: Sequence[str]) -> str:
    """Format the confusion matrix or, for many classes, list the most frequent confusions."""
    if len(class_names) > MATRIX_CLASSES:
        wrong = confusion * ~np.eye(len(confusion), dtype=bool)
        most = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSIONS]
        lines = [
            f"{class_names[true]} taken for {class_names[predicted]}: {number} time{'s' if number > 1 else ''}"
            for true, predicted in zip(*np.unravel_index(most, wrong.shape), strict=True)
            if (number := wrong[true, predicted])
        ]
        return "\n".join(["most frequent confusions:", *(lines or ["none"])])
    headings, names = list(class_names), list(class_names)
    if max(map(len, class_names)) > SHORT_NAME:
        headings = [str(number) for number in range(len(names))]
        names = [f"{number} {name}" for number, name in enumerate(names)]
    counts = [[str(count) if count else "." for count in row] for row in confusion]
    return markdown_table(
        [["true \\ predicted", *headings], *([name, *row] for name, row in zip(names, counts, strict=True))]
    )
