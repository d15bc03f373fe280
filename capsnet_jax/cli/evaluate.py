"""The command `capsnet evaluate`: what a run gets right and wrong, class by class."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro
from jaxtyping import Int

from capsnet_jax.data import configured_dataset
from capsnet_jax.data.augmentation import Augmentation
from capsnet_jax.errors import UsageError
from capsnet_jax.figures import confusion_figure, save_figure
from capsnet_jax.runs.folder import load_run
from capsnet_jax.tables import markdown_table
from capsnet_jax.train.evaluation import Evaluation, evaluate, final_line

MATRIX_CLASSES = 12  # up to so many, the confusion matrix fits on a page
CONFUSIONS = 10  # the most frequent ones, told in its place
SHORT_NAME = 5  # letters; if all names are, they head the columns of the matrix


@dataclass(frozen=True)
class Evaluate:
    """Evaluates the weights of a run on all test images, and tells what is taken for what.

    The last line printed is the one of train; the interval above it is Wilson's, for other images like these."""

    run_dir: tyro.conf.Positional[Path]
    """Folder of the run."""
    dataset: str | None = None
    """Data set, if not the one that the run was trained on; its classes are those of the run in their order."""
    data_dir: Path | None = None
    """Folder of the data set, if not the one that the run was trained from."""
    best: bool = False
    """Take the weights that did best on the validation images, and not the last ones."""
    confusion: Path | None = None
    """File that the confusion matrix is drawn into, as PNG, PDF or SVG by its ending."""

    def run(self) -> None:
        """Prints tables and the accuracy.

        Raises:
            UsageError: the folder has no run, its data set is not there, another one does not fit, or the picture
                cannot be written.
        """
        run, model = load_run(self.run_dir, best=self.best)
        data = replace(run.config.data, train_limit=None, validation=0.0)  # only test images are needed
        if self.dataset is not None:
            # Only folders of images are resized.
            image_size = data.image_size if Path(self.dataset).expanduser().is_dir() else None
            data = replace(data, dataset=self.dataset, image_size=image_size)
        data = replace(data, data_dir=self.data_dir or data.data_dir)
        dataset = configured_dataset(data).cropped(Augmentation.parse(data.augment).crop)
        if dataset.num_classes != len(run.class_names):
            raise UsageError(
                f"Data set {data.dataset!r} has {dataset.num_classes} classes, and the model was made for "
                f"{len(run.class_names)}."
            )
        if self.confusion and dataset.test_labels.ndim > 1:
            raise UsageError(f"Images of {data.dataset!r} have several classes each; there is no --confusion of them.")
        evaluation = evaluate(model, dataset.test_images, dataset.test_labels)
        print(describe(evaluation, dataset.class_names))
        if self.confusion and evaluation.confusion is not None:
            save_figure(confusion_figure(np.array(evaluation.confusion), dataset.class_names), self.confusion)


def describe(evaluation: Evaluation, class_names: Sequence[str]) -> str:
    """Describe an evaluation in words and tables; the last line is that of `final_line`."""
    low, high = (100 * (1 - end) for end in reversed(evaluation.interval))
    paragraphs = [
        markdown_table(
            [
                ("class", "images", "precision", "recall"),
                *(
                    (name, f"{count:,}", _share(precision), _share(recall))
                    for name, count, precision, recall in zip(
                        class_names, evaluation.counts, evaluation.precision, evaluation.recall, strict=True
                    )
                ),
            ]
        )
    ]
    if evaluation.confusion is not None:
        paragraphs.append(describe_confusion(np.array(evaluation.confusion), class_names))
    means = f"mean activation of the right capsule {evaluation.right_activation:.3f}"
    if evaluation.runner_up_activation is not None:
        means += f", of the most active wrong one {evaluation.runner_up_activation:.3f}"
    lines = [means]
    if evaluation.reconstruction_error is not None:
        lines.append(f"mean squared error of a reconstructed pixel {evaluation.reconstruction_error:.5f}")
    lines.append(f"95 % interval of the error {low:.2f} to {high:.2f} %")
    lines.append(final_line(evaluation))
    return "\n\n".join([*paragraphs, "\n".join(lines)])


def describe_confusion(confusion: Int[np.ndarray, "o o"], class_names: Sequence[str]) -> str:
    """The confusion matrix of a few classes, or the most frequent confusions of many."""
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
    rows = [
        [name, *(str(count) if count else "." for count in row)] for name, row in zip(names, confusion, strict=True)
    ]
    return markdown_table([["true \\ predicted", *headings], *rows])


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
