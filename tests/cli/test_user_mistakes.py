"""Likely mistakes of users: every command answers with one sentence that names the value and the fix."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from capsnet_jax.cli.main import main
from capsnet_jax.data import load_dataset
from capsnet_jax.presets import PRESETS
from capsnet_jax.runs.folder import Run
from capsnet_jax.train.loop import Trainer

SIZES = {"stem_channels": 4, "primary_groups": 2, "primary_dim": 4, "class_dim": 4, "decoder_hidden": (6, 6)}
OPTIONS = "--stem-channels 4 --primary-groups 2 --primary-dim 4 --class-dim 4 --decoder-hidden 6 6"

# What is typed after `capsnet`, the value that the message must repeat, and the fix that it must name.
MISTAKES = [
    # Commands and the syntax of options.
    ("trian", "'trian'", "did you mean train?"),
    ("check_routing dynamic", "'check_routing'", "did you mean check-routing?"),
    ("fly", "'fly'", "expected train, evaluate, predict"),
    ("--epochs 3", "'--epochs'", "expected train, evaluate, predict"),
    ("train --epoch 3", "--epoch", "did you mean --epochs?"),
    ("train mnist", "mnist", "`capsnet train --help` lists all options"),
    ("train --epochs", "'--epochs'", "Expected 1 values"),
    ("train --epochs ten", "--epochs is 'ten'", "expected a whole number"),
    ("train --stem-channels 1.5", "--stem-channels is '1.5'", "expected a whole number"),
    ("train --learning-rate fast", "--learning-rate is 'fast'", "expected a number"),
    ("train --precision float16", "--precision is 'float16'", "expected 'float32', 'bfloat16'"),
    ("train --stream maybe", "--stream is 'maybe'", "'True'"),
    ("train --decoder-hidden 5", "--decoder-hidden is ['5']", "expected None or INT INT"),
    ("train --hidden-capsules 3", "--hidden-capsules is ['3']", "expected [INT INT [INT INT ...]]"),
    ("evaluate", "Missing from capsnet evaluate", "Folder of the run"),
    ("check-routing", "Missing from capsnet check-routing", "Your own routing, as package.module:function"),
    ("convert run", "Missing from capsnet convert", "--to [PATH [PATH ...]]"),
    ("compare --routing em", "compare has no --routing", "expected --routings"),
    # Numbers out of range.
    ("train --epochs 0", "epochs is 0", "at least 1"),
    ("train --batch_size -3", "batch_size is -3", "at least 1"),
    ("train --num-iterations 0", "num_iterations is 0", "at least 1"),
    ("train --seeds 0", "seeds is 0", "at least 1"),
    ("train --learning-rate -1", "learning_rate is -1.0", "more than 0"),
    ("train --learning-rate nan", "learning_rate is nan", "a finite number"),
    ("train --validation 1.5", "validation is 1.5", "less than 1"),
    ("train --validation 0.999", "batch_size is 32", "with only 1 training images"),
    ("train --ema-decay 1", "ema_decay is 1.0", "less than 1"),
    ("train --accumulate 3", "accumulate is 3", "a divisor of batch_size, which is 32"),
    ("train --batch-size 5000", "batch_size is 5000", "with only 1442 training images"),
    ("train --train-limit 5000", "train_limit is 5000", "with only 1442 training images"),
    ("compare --seeds 0", "seeds is 0", "at least 1"),
    ("compare --seeds-at-once -1", "seeds_at_once is -1", "at least 0"),
    ("benchmark --rounds 1", "rounds is 1", "at least 2"),
    # Sizes that do not fit each other.
    ("train --stem-kernel 20", "8 x 8 are too small", "need at least 23 x 23"),
    ("train --conv-capsules 4 4 5 1", "8 x 8 are too small", "need at least 10 x 10"),
    ("train --image-size 0 3", "image_size is (0, 3)", "at least 1"),
    ("train --image-size 9 9", "image_size is (9, 9)", "only folders of images are resized"),
    ("train --augment crop=9", "The crop is 9 x 9", "expected 1 to 8"),
    ("train --matrix-poses --class-dim 5", "5", "not square matrices"),
    ("train --shared-class-transform --class-dim 1", "out_dim is 1", "two components of a pose"),
    ("train --decoder-hidden None", "reconstruction_weight is 10.0", "must be 0 for a model without a decoder"),
    # Data sets.
    ("train --dataset mnst", "'mnst'", "expected digits, multi_mnist, affine_mnist, the path of a folder"),
    ("train --dataset ./photos", "./photos does not exist", "expected a folder of images or an .npz file"),
    ("train --dataset mnist --data-dir nowhere", "nowhere does not exist", "The data folder"),
    ("train --dataset empty", "empty", "expected"),
    ("train --dataset text.npz", "text.npz is truncated, or not an .npz file", "write it again with numpy.savez"),
    # Presets, routings, augmentations.
    ("train --preset efficent", "'efficent'", "expected readable, digits, official, paper, efficient, em"),
    ("benchmark --preset fast", "'fast'", "expected readable, digits"),
    ("verify --preset fast", "'fast'", "expected readable, digits"),
    ("train --routing dynamo", "'dynamo'", "expected dynamic, em"),
    ("train --routing dynamic,leak=true", "'leak'", "expected num_iterations (int, 3), leaky (bool, False)"),
    ("train --routing dynamic,leaky", "leaky is ''", "expected true or false"),
    ("train --routing dynamic,leaky=true,leaky=false", "leaky", "is given twice"),
    ("train --routing em,annealing=warm", "'warm'", "expected a finite number"),
    ("train --routing random,seed=-1", "seed is -1", "at least 0"),
    ("train --routing json:dumpz", "'json:dumpz'", "cannot be imported"),
    ("train --routing os:getcwd", "getcwd", "expected votes, activations and keyword arguments"),
    ("train --routing capsnet_jax.routing:ROUTINGS", "is of type dict", "expected a function"),
    ("train --routing capsnet_jax.ops:mask_by_label", "capsnet_jax.ops:mask_by_label", "raises"),
    ("train --augment shft=0.1", "'shft=0.1'", "expected any of rotation=DEGREES"),
    ("train --augment rotation=400", "'rotation=400.0'", "from 0 to 180"),
    ("compare --routings uniform nothing", "'nothing'", "expected dynamic, em"),
    ("compare --routings", "routings is empty", "expected all, or some of dynamic"),
    ("check-routing em,depth=3", "'depth'", "expected num_iterations (int, 3)"),
    ("check-routing no_such_module:f", "'no_such_module:f'", "No module named 'no_such_module'"),
    ("check-routing dynamic --num-iterations 0", "num_iterations is 0", "at least 1"),
    ("verify --random-model 1 --preset em", "--random-model and --preset are given", "expected one of them"),
    # Run folders.
    ("train --resume", "--resume needs the folder of the run", "expected --run-dir, too"),
    ("train --process-id 1", "Got --process-id", "expected --distributed, too"),
    (f"train --run-dir run {OPTIONS}", "The run folder run already holds a run", "--resume"),
    (f"train --run-dir text.npz {OPTIONS}", "The run folder text.npz is a file", "give another name"),
    (f"train --run-dir text.npz/run {OPTIONS}", "text.npz/run", "cannot be written: Not a directory"),
    (
        "train --resume --run-dir run --learning-rate 0.5 --num-iterations 2",
        "learning_rate was 0.002 and is 0.5; num_iterations was 3 and is 2",
        "expected the options of that run, which need not be repeated, or a new --run-dir",
    ),
    ("evaluate nowhere", "nowhere is not the folder of a run", "expected the --run-dir of a training"),
    (
        "evaluate run/config.json",
        "run/config.json is not the folder of a run: it is a file",
        "expected the --run-dir of a",
    ),
    ("evaluate empty", "it has no config.json", "expected the --run-dir of a training"),
    ("evaluate seeds", "seeds is not the folder of a run", "its folder seed-0 does"),
    ("evaluate run --best", "run has no best.safetensors", "it was trained without --validation"),
    ("evaluate run --dataset two.npz", "'two.npz' has the classes 'cat', 'dog'", "or --match order for classes"),
    ("evaluate run --dataset two.npz --match order", "'two.npz' has 2 classes", "expected as many, or --match name"),
    ("evaluate run --dataset ~nobody/images", "~nobody/images does not exist", "expected a folder of images"),
    ("evaluate run --limit 0", "limit is 0", "at least 1"),
    ("evaluate run --limit 5000", "limit is 5000", "with only 355 test images"),
    ("report", "no runs to report", "expected one run folder or more"),
    ("report empty", "empty is not the folder of a run", "it has no config.json, and no runs seed-0, seed-1"),
    ("report run", "run/metrics.jsonl has no metrics yet", "expected a run that has trained for some steps"),
    ("export nowhere", "nowhere is not the folder of a run", "expected the --run-dir of a training"),
    # Files.
    ("predict run", "no images to predict", "expected files, folders or - after the run folder"),
    ("predict run missing.png", "missing.png does not exist", "expected an image file"),
    ("predict run empty", "empty is a folder without image files", "expected some"),
    ("predict run wide.png --top 11", "top is 11", "expected 1 to 10, the number of classes"),
    ("predict run wide.png --json --csv", "--json and --csv are given", "expected one of them"),
    ("predict run text.png", "text.png", "cannot be read as an image"),
    ("predict run wide.png", "wide.png is 8 x 9 pixels", "expected 8 x 8, as the run was trained on, or --resize"),
    ("convert nowhere --to copy", "nowhere does not exist", "expected a file or folder of weights"),
    ("convert text.safetensors --to copy", "text.safetensors", "is not a safetensors file that can be read"),
    ("convert other.safetensors --to copy", "other.safetensors", "expected"),
    ("convert run --to run", "run has a config.json already", "expected a folder without"),
    ("convert run --to text.png", "text.png is a file", "expected the name of a folder"),
    ("convert run --to other.safetensors", "other.safetensors exists already", "expected the name of a new file"),
    ("convert run --to copy --image-shape 9 9 1", "--image-shape is (9, 9, 1)", "expected the same, or --preset"),
    ("export run --format pdf", "--format is 'pdf'", "expected 'stablehlo', 'onnx'"),
    ("export run --output model.onnx", "model.onnx", "expected a name that ends in .stablehlo"),
    ("export run --output nowhere/model.stablehlo", "in a folder that does not exist", "expected the name of a file"),
]

# What is typed, a package that is not installed, and the extra that brings it.
MISSING_EXTRAS = [
    ("train --tensorboard", "tensorboardX", "capsnet-jax[tensorboard]"),
    ("train --dataset cifar10", "tensorflow_datasets", "capsnet-jax[tfds]"),
    ("check-routing dynamic --torch capsnet_torch.routing:dynamic", "torch", "capsnet-jax[torch]"),
    ("convert run --to model.pt", "torch", "capsnet-jax[torch]"),
    ("export run --format onnx", "onnxscript", "capsnet-jax[onnx]"),
    ("verify", "torch", "[torch]"),
    ("benchmark", "torch", "[torch]"),
]


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A working directory with a run of digits, and with files that are not what their names say."""
    here = tmp_path_factory.mktemp("here")
    dataset = load_dataset("digits")
    config = PRESETS["digits"]
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **SIZES))
    run = Run.of(here / "run", config, dataset)
    run.write_config()
    run.save_weights(run.new_model())
    run._replace(folder=here / "seeds" / "seed-0").write_config()
    (here / "empty").mkdir()
    for name in ("text.npz", "text.png", "text.safetensors"):
        (here / name).write_text("text")
    Image.fromarray(np.zeros((8, 9), np.uint8)).save(here / "wide.png")
    safetensors.numpy.save_file({"weight": np.ones(3, np.float32)}, here / "other.safetensors")
    images, labels = dataset.train_images[:20, ..., 0], np.array(["cat", "dog"] * 10)
    np.savez(here / "two.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    return here


def error_of(arguments: str, here: Path, monkeypatch, capsys) -> str:
    """Run a command that must fail, in the working directory `here`, which must stay as it is; return the message."""
    monkeypatch.chdir(here)
    monkeypatch.setattr(Trainer, "run", None)  # nothing is trained
    monkeypatch.setattr(Trainer, "trace", lambda self: None)  # which takes seconds
    monkeypatch.setenv("COLUMNS", "80")
    before = sorted(here.rglob("*"))
    assert main(arguments.split()) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("capsnet: error: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert sorted(here.rglob("*")) == before
    return error


@pytest.mark.parametrize(("arguments", "got", "fix"), MISTAKES, ids=[mistake[0] for mistake in MISTAKES])
def test_a_mistake_is_answered_by_one_sentence_with_value_and_fix(arguments, got, fix, here, monkeypatch, capsys):
    if arguments.startswith(("benchmark --preset", "verify --preset")):
        pytest.importorskip("torch", reason="that PyTorch is missing is said first")
    error = error_of(arguments, here, monkeypatch, capsys)
    assert got in error
    assert fix in error


@pytest.mark.parametrize(("arguments", "package", "extra"), MISSING_EXTRAS, ids=[extra[0] for extra in MISSING_EXTRAS])
def test_a_missing_package_is_answered_by_the_command_that_installs_it(
    arguments, package, extra, here, monkeypatch, capsys
):
    if package == "onnxscript":
        pytest.importorskip("torch", reason="that PyTorch is missing is said first")
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "capsnet_torch.state_files", raising=False)
    error = error_of(arguments, here, monkeypatch, capsys)
    assert package in error or {"torch": "PyTorch"}.get(package, package) in error
    assert "pip install" in error
    assert extra in error
