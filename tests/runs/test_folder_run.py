"""A folder of images from beginning to end: the commands train, evaluate, predict and report."""

import json
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from tests.data.tiny_images import class_image, write_image_folder
from tests.tiny_run import SMALL, printed

pytestmark = pytest.mark.slow
HEIGHT, WIDTH = 37, 29
LETTERS = "abcdefghijklmn"  # more than a confusion matrix is printed for
MODEL = """
    --stem-channels 12 --stem-kernel 5 --stem-stride 2 --primary-groups 2 --primary-dim 6 --primary-kernel 5
    --primary-scale 1 --class-dim 6 --decoder-hidden 16 24 --reconstruction-weight 0.5 --learning-rate 0.003
""".split()  # noqa: SIM905
TRAINING = "--epochs 10 --batch-size 10 --validation 0.15 --ema-decay 0.9 --tensorboard".split()  # noqa: SIM905
# What compiles quickly.
QUICK = "--routing uniform --decoder-hidden None --reconstruction-weight 0".split()  # noqa: SIM905
AUGMENT = "--augment rotation=10 shift=0.05 flip brightness=0.1".split()  # noqa: SIM905


def accuracy(line: str) -> float:
    match = re.fullmatch(r"test accuracy (\d\.\d{4}) on \d+ images \(error \d+\.\d\d %\)", line)
    assert match, line
    return float(match[1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of ten images of each letter, a run trained on it, and what training printed."""
    here = tmp_path_factory.mktemp("here")
    images = write_image_folder(here / "letters", LETTERS, HEIGHT, WIDTH, per_class=10)
    run = here / "run"
    return images, run, printed("train", "--dataset", str(images), *MODEL, *TRAINING, *AUGMENT, "--run-dir", str(run))


def epochs_of(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "epoch"]


def test_most_letters_are_learnt(trained):
    """The fifth and the tenth image of each letter are for testing, and 15 % of the others for validation."""
    _, run, lines = trained
    assert lines[0] == (
        "CapsNet of 118,812 parameters; 95 training, 17 validation and 28 test images of 37 x 29 x 3 in 14 classes"
    )
    assert accuracy(lines[-1]) > 0.5
    epochs = epochs_of(run)
    assert [line["step"] for line in epochs] == list(range(9, 91, 9))  # five images are left out of each epoch
    assert accuracy(lines[-1]) == round(epochs[-1]["test_accuracy"], 4)
    for line in epochs:
        assert line["validation_accuracy"] * 17 == pytest.approx(round(line["validation_accuracy"] * 17))
    assert sorted(path.name for path in run.iterdir()) == [
        "best.safetensors",
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
        "reconstructions.png",
        "tensorboard",
    ]
    picture = matplotlib.image.imread(run / "reconstructions.png")[..., :3]
    assert np.ptp(picture, axis=2).max() > 0.9  # in colour


def test_evaluate_prints_the_same_result_and_a_row_for_every_letter(trained):
    _, run, lines = trained
    output = printed("evaluate", str(run))
    assert output[-1] == lines[-1]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output[2:16]]
    assert [row[:2] for row in rows] == [[letter, "2"] for letter in LETTERS]
    assert np.mean([float(row[3]) for row in rows]) == pytest.approx(accuracy(lines[-1]), abs=1e-4)


def test_the_best_weights_are_those_of_the_epoch_that_was_best_on_validation(trained):
    _, run, _ = trained
    best = max(reversed(epochs_of(run)), key=lambda line: line["validation_accuracy"])  # the last of those
    assert accuracy(printed("evaluate", str(run), "--best")[-1]) == round(best["test_accuracy"], 4)


def test_predict_names_the_letters_in_files(trained):
    """As many predictions are correct as in the evaluation."""
    images, run, lines = trained
    files = [str(images / letter / f"{number:03}.png") for letter in LETTERS for number in (4, 9)]
    output = printed("predict", str(run), *files)
    right = 0
    for file, line in zip(files, output, strict=True):
        match = re.fullmatch(rf"{re.escape(file)}: ([a-z]) \(\d\.\d\d; next ([a-z]) at \d\.\d\d\)", line)
        assert match, line
        right += match[1] == Path(file).parent.name
    assert right / 28 == pytest.approx(accuracy(lines[-1]), abs=1e-4)


def test_report_prints_the_results_of_the_last_epoch(trained, tmp_path):
    _, run, lines = trained
    row = printed("report", str(run), "--output", str(tmp_path / "curves.png"))[-1]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    last = epochs_of(run)[-1]
    errors = [f"{100 * (1 - last[name]):.2f}" for name in ("validation_accuracy", "test_accuracy")]
    assert cells[:6] == [str(run), "10/10", "90", f"{last['loss']:.4f}", *errors]
    assert f"(error {errors[1]} %)" in lines[-1]
    assert (tmp_path / "curves.png").exists()


def test_an_npz_file_with_names_as_labels_trains_too(tmp_path):
    names, rng = ("owl", "bat", "fox"), np.random.default_rng(0)
    labels = np.array(names)[np.arange(33) % 3]
    images = np.stack([class_image(names.index(name), 3, 13, 11, rng) for name in labels])
    arrays = {"x_train": images[:26], "y_train": labels[:26], "x_test": images[26:], "y_test": labels[26:]}
    np.savez(tmp_path / "animals.npz", **arrays)
    run = str(tmp_path / "run")
    data = ["--dataset", str(tmp_path / "animals.npz"), "--run-dir", run]
    lines = printed("train", *data, *SMALL, *QUICK, "--epochs", "1")
    assert "26 training and 7 test images of 13 x 11 x 3 in 3 classes" in lines[0]
    output = printed("evaluate", run)
    assert output[-1] == lines[-1]
    counts = [[cell.strip() for cell in line.split("|")[1:3]] for line in output[2:5]]
    assert counts == [["bat", "2"], ["fox", "3"], ["owl", "2"]]
