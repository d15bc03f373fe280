"""The command `capsnet evaluate`: accuracy, precision, recall and confusions of a trained model."""

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
from capsnet_jax.tables import markdown_table, number_cell
from capsnet_jax.train.evaluation import Evaluation, evaluate, final_line

MATRIX_CLASSES = 12  # largest number of classes for which the confusion matrix is printed
CONFUSIONS = 10  # number of the most frequent confusions printed for more classes
SHORT_NAME = 5  # longest class name that heads a column of the matrix


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a trained model on all test images.

    Prints precision and recall of each class, confusions, and the test accuracy
    with its 95 % confidence interval (Wilson)."""

    run_dir: tyro.conf.Positional[Path]
    """Folder of the run."""
    dataset: str | None = None
    """Another data set than the one of the run, with the same classes in the same order."""
    data_dir: Path | None = None
    """Folder of the data set, if not the one of the run."""
    best: bool = False
    """Evaluate the weights that were best on validation images instead of the last ones."""
    trust_code: bool = False
    """Import the routing that the run names, if it is not of this package. That runs code."""
    confusion: Path | None = None
    """File for a picture of the confusion matrix: .png, .pdf or .svg."""

    def run(self) -> None:
        run, model = load_run(self.run_dir, best=self.best, trust_code=self.trust_code)
        data = replace(run.config.data, train_limit=None, validation=0.0)  # only test images are used
        if self.dataset is not None:
            # Only folders of images are resized.
            image_size = data.image_size if Path(self.dataset).expanduser().is_dir() else None
            # The run's own data_dir is of its data set; mnist and its kin all have files of the same names.
            data = replace(data, dataset=self.dataset, image_size=image_size, data_dir=None)
        data = replace(data, data_dir=self.data_dir or data.data_dir)
        dataset = configured_dataset(data).cropped(Augmentation.parse(data.augment).crop)
        if dataset.num_classes != len(run.class_names):
            raise UsageError(
                f"Data set {data.dataset!r} has {dataset.num_classes} classes, and the model was made for "
                f"{len(run.class_names)}; expected a data set of the same classes."
            )
        if self.confusion and dataset.test_labels.ndim > 1:
            raise UsageError(
                f"Images of {data.dataset!r} have several classes each, for which there is no confusion matrix; "
                "expected no --confusion."
            )
        evaluation = evaluate(model, dataset.test_images, dataset.test_labels)
        print(describe(evaluation, dataset.class_names))
        if self.confusion and evaluation.confusion is not None:
            save_figure(confusion_figure(np.array(evaluation.confusion), dataset.class_names), self.confusion)


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
