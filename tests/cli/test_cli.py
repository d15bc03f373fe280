"""The command `capsnet`: what training prints and saves, the help, and errors while training."""

import json
import re
import runpy
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import jax
import matplotlib.image
import numpy as np
import pytest

from capsnet_jax.cli import train as train_module
from capsnet_jax.cli.compare import Compare
from capsnet_jax.cli.main import COMMANDS, in_a_sentence, main
from capsnet_jax.cli.train import Train
from capsnet_jax.config import Config
from capsnet_jax.interchange.weights import to_torch
from capsnet_jax.presets import PRESETS
from capsnet_jax.runs.folder import load_run
from capsnet_jax.train.evaluation import evaluate
from capsnet_jax.train.loop import Trainer
from tests.conftest import write_idx
from tests.tiny_run import contents, metrics, options_of, printed, train

ROOT = Path(__file__).parents[2]
WITHOUT_DECODER = ("--decoder-hidden", "None", "--reconstruction-weight", "0")


def test_the_last_line_is_the_accuracy_on_all_test_images(tiny_run, small_dataset):
    last = tiny_run.lines[-1]
    assert re.fullmatch(r"test accuracy \d\.\d{4} on 23 images \(error \d+\.\d\d %\)", last)
    _, model = load_run(tiny_run.folder)
    test = evaluate(model, small_dataset.test_images, small_dataset.test_labels)
    assert last.startswith(f"test accuracy {test.accuracy:.4f} ")


def test_evaluate_prints_the_same_last_line(tiny_run):
    assert printed("evaluate", str(tiny_run.folder))[-1] == tiny_run.lines[-1]


@pytest.mark.parametrize(
    ("accumulate", "choice"), [(1, "fused, because 24 >= 16 examples on one device"), (2, "votes, because 12 < 16")]
)
def test_the_implementation_of_each_layer_is_printed_after_the_run_folder(
    accumulate, choice, idx_folder, tmp_path, monkeypatch, capsys
):
    """For the size of a micro-batch: dynamic routing has another implementation from 16 examples on."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_module, "train_runs", interrupted)
    monkeypatch.setattr(Trainer, "trace", lambda self: None)  # which takes seconds
    options = ("--batch-size", "24", "--accumulate", str(accumulate))
    assert train(idx_folder, tmp_path / "run", *options) == 130
    lines = capsys.readouterr().out.splitlines()
    place = lines.index(f"Run folder: {tmp_path / 'run'}")
    assert [line.split(":")[0] for line in lines[place + 1 :]] == ["stem 0", "primary capsules", "routing 0"]
    assert lines[place + 3].startswith(f"routing 0: {choice}")
    assert all(", because " in line for line in lines[place + 1 :])


def test_the_run_folder_holds_config_metrics_weights_and_picture(tiny_run):
    fields = json.loads((tiny_run.folder / "config.json").read_text())
    assert fields["model"]["stem_channels"] == 6
    assert fields["training"]["learning_rate"] == 0.01
    assert (fields["model"]["image_shape"], fields["class_names"]) == ([9, 11, 1], list("0123456789"))
    lines = metrics(tiny_run.folder)
    assert [(line["epoch"], line["step"]) for line in lines if line["kind"] == "chunk"] == [
        (step // 7 + 1, step) for step in range(1, 13)
    ]
    first, second = (line for line in lines if line["kind"] == "epoch")
    assert (first["epoch"], first["step"], second["epoch"], second["step"]) == (1, 6, 2, 12)
    assert all(np.isfinite(value) for line in lines for name, value in line.items() if name != "kind")
    assert second["loss"] < first["loss"]
    assert second["loss"] == pytest.approx(np.mean([line["loss"] for line in lines[7:13]]))
    picture = matplotlib.image.imread(tiny_run.folder / "reconstructions.png")
    assert len(np.unique(picture)) > 50
    assert sorted(path.name for path in tiny_run.folder.iterdir()) == [
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
        "reconstructions.png",
    ]


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(tiny_run, capsys):
    before = contents(tiny_run.folder)
    assert train(tiny_run.data_dir, tiny_run.folder) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert contents(tiny_run.folder) == before


def test_a_loss_that_is_not_finite_keeps_what_was_saved(idx_folder, tmp_path, capsys):
    options = ("--learning-rate", "1e30", "--routing", "uniform", *WITHOUT_DECODER)
    assert train(idx_folder, tmp_path / "run", *options) == 1
    assert re.search(r"The loss of step \d+ is (nan|inf)", capsys.readouterr().err)
    assert (tmp_path / "run" / "config.json").exists()


def test_an_out_of_memory_error_names_options_that_need_less(idx_folder, tmp_path, monkeypatch, capsys):
    def exhausted(self):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nDetails")

    monkeypatch.setattr(Trainer, "run", exhausted)
    monkeypatch.setattr(Trainer, "trace", lambda self: None)  # which takes seconds
    assert train(idx_folder, tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert (
        "not have enough memory: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes. A smaller" in error
    )
    assert error.count("\n") == 1


def test_data_that_do_not_fit_into_memory_are_answered_in_a_sentence(tmp_path, monkeypatch, capsys):
    def no_memory(*_: object) -> None:
        raise MemoryError("Unable to allocate 5.96 TiB for an array")

    monkeypatch.setattr("capsnet_jax.cli.train.configured_dataset", no_memory)
    assert main(["train", "--run-dir", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("capsnet: error: There is not enough memory: Unable to allocate 5.96 TiB for an array")
    assert error.count("\n") == 1


def test_evaluation_on_images_of_another_shape_is_an_error(tiny_run, idx_folder, capsys):
    for name, count in (("train", 50), ("t10k", 23)):
        write_idx(idx_folder / f"{name}-images-idx3-ubyte.gz", np.zeros((count, 9, 12), np.uint8))
    assert main(["evaluate", str(tiny_run.folder), "--data-dir", str(idx_folder)]) == 2
    assert "(9, 12, 1), and the model was made for (9, 11, 1)" in capsys.readouterr().err


def test_a_routing_in_the_working_directory_is_found_and_a_model_without_decoder_has_no_picture(
    idx_folder, tmp_path, monkeypatch, capsys
):
    """Trained with the spread loss."""
    (tmp_path / "mean_routing.py").write_text(
        "from capsnet_jax.routing import dynamic\n"
        "def mean(votes, activations):\n"
        "    return dynamic(votes, activations, num_iterations=1)\n"
    )
    monkeypatch.chdir(tmp_path)
    options = ("--routing", "mean_routing:mean", *WITHOUT_DECODER, "--loss", "spread", "--train-limit", "20")
    assert train(idx_folder, tmp_path / "run", *options) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["routing"] == "mean_routing:mean"
    assert not (tmp_path / "run" / "reconstructions.png").exists()
    epochs = [line for line in metrics(tmp_path / "run") if line["kind"] == "epoch"]
    assert [(line["step"], line["reconstruction"]) for line in epochs] == [(2, 0), (4, 0)]
    last = capsys.readouterr().out.splitlines()[-1]
    assert main(["evaluate", str(tmp_path / "run"), "--trust-code"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == last


def test_a_routing_that_returns_nan_is_reported_with_the_step(idx_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "nan_routing.py").write_text(
        "from capsnet_jax.routing import dynamic\n"
        "def broken(votes, activations):\n"
        "    routed = dynamic(votes, activations)\n"
        "    return routed._replace(activations=routed.activations * float('nan'))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert train(idx_folder, tmp_path / "run", "--routing", "nan_routing:broken", *WITHOUT_DECODER) == 1
    error = capsys.readouterr().err
    assert "The loss of step 1 is nan" in error
    assert "`capsnet check-routing nan_routing:broken`" in error


def test_options_of_a_routing_reach_it_and_its_weights_are_saved(idx_folder, tmp_path, capsys):
    spec = "dynamic,capsule_bias=0.1,num_iterations=2"
    assert train(idx_folder, tmp_path / "run", "--routing", spec, *WITHOUT_DECODER) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    _, model = load_run(tmp_path / "run")
    name = "encoder.primary2digit_capsules.routing_weights.capsule_bias"
    assert to_torch(model)[name].shape == (10, 5)
    assert np.abs(to_torch(model)[name] - 0.1).max() > 1e-3
    assert dict(model.capsule_layers[0].routing.options)["num_iterations"] == 2
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == last


@pytest.mark.parametrize("command", [Train, Compare])
def test_the_preset_follows_the_data_set(command):
    assert command.default([]).config == PRESETS["digits"]
    assert command.default(["--dataset", "mnist"]).config == PRESETS["readable"]
    assert command.default(["--dataset=mnist", "--preset=digits"]).config == PRESETS["digits"]


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_the_help_has_a_line_for_each_command_on_one_screen(arguments, capsys):
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    names = [line.split()[0] for line in lines if line.startswith("  ")]
    assert names == list(COMMANDS)
    documented = "train evaluate predict compare check-routing report benchmark verify convert export"
    assert set(names) >= set(documented.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_that_fits_a_terminal(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([name, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: capsnet {name} [")
    assert max(map(len, lines[1:])) <= 80


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"capsnet-jax {version('capsnet-jax')}\n"


GROUPS = ["options", "data options", "model options", "training options"]


@pytest.mark.parametrize(
    ("command", "groups"),
    [("train", [*GROUPS, "run options", "device options"]), ("compare", [*GROUPS, "comparison options"])],
)
def test_the_options_of_training_are_in_groups_with_everyday_ones_first(command, groups, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    assert main([command, "--help"]) == 0
    options: dict[str, list[str]] = {}
    for line in capsys.readouterr().out.splitlines():
        if title := re.fullmatch(r"(?:[a-z]+ )?options", line.strip("╭─╮ ")):  # in a box, or in plain ASCII
            options[title[0]] = []
        elif option := re.match(r"[│ ] --([a-z][a-z-]+)", line):
            options[[*options][-1]].append(option[1])
    assert list(options) == groups
    config = PRESETS["digits"]
    for section in ("data", "model", "training"):
        names = [name.replace("_", "-") for name in vars(getattr(config, section))]
        hidden = {"image-shape", "num-classes"}  # set by the data set
        hidden |= {"routing"} if command == "compare" else set()
        assert options[f"{section} options"] == [name for name in names if name not in hidden]
    assert options["options"] == ["preset", "from"]
    assert options["data options"][:3] == ["dataset", "data-dir", "augment"]
    everyday = ["num-iterations", "stem-below"] if command == "compare" else ["routing", "num-iterations"]
    assert options["model options"][:2] == everyday
    assert options["training options"][:4] == ["epochs", "batch-size", "learning-rate", "seed"]
    if command == "train":
        assert options["run options"] == ["run-dir", "resume", "seeds", "tensorboard"]
        assert options["device options"] == ["distributed", "coordinator", "num-processes", "process-id"]
    else:
        assert options["comparison options"] == ["routings", "seeds", "output", "seeds-at-once"]


def test_the_table_of_routings_names_the_option_of_the_command(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    for command, option in (("train", "--routing"), ("compare", "--routings")):
        assert main([command, "--help"]) == 0
        heading = f"\nRoutings for {option}, with options after commas: {option} em,annealing=0.9 (docs/routing.md):\n"
        assert heading in capsys.readouterr().out


def test_the_help_of_training_has_defaults_and_ends_with_tables_of_routings_and_augmentations(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["train", "--help"]) == 0
    options, _, tables = capsys.readouterr().out.partition("\nRoutings")
    text = " ".join(options.replace("│", " ").replace("|", " ").split())
    assert "Number of routing iterations. (default: 3)" in text
    assert "Number of passes over the training images. (default: 30)" in text
    assert all(preset in text for preset in PRESETS)
    routings, augmentations = " ".join(tables.split()).split(" Changes for --augment")
    assert routings.startswith("for --routing, with options after commas")
    assert "(docs/routing.md): dynamic num_iterations (int, 3), leaky (bool, False)" in routings
    assert "em num_iterations (int, 3), beta_u (float, 0.0, learned)" in routings
    assert routings.endswith("random seed (int, 0)")
    assert "(docs/training.md): rotation=DEGREES (from 0 to 180)" in augmentations
    assert "shift=FRACTION (at least 0 and less than 1)" in augmentations


def test_an_error_box_of_tyro_becomes_one_sentence():
    """Also in colour, and in plain ASCII characters."""
    box = """\x1b[31m+- Value error --------+\x1b[0m
| Error parsing --epochs: invalid literal for   |
| int() with base 10: 'ten'                     |
| --------------------------------------------- |
| Argument helptext:                            |
|     --epochs INT                              |
|     Number of passes. (default: 30)           |
+-----------------------------------------------+"""
    expected = "--epochs is 'ten'; expected a whole number (`capsnet train --help` explains it)."
    assert in_a_sentence(box, "capsnet train --help") == expected


def test_the_script_in_the_repository_is_the_command_train(tiny_run, tmp_path, monkeypatch, capsys):
    """It trains for the first of the two epochs of a run of the command.

    The weights on disk after both epochs are other ones, and so not those of the first epoch.
    """
    options = options_of(tiny_run.data_dir, tmp_path / "run", "--epochs", "1")[1:]
    monkeypatch.setattr(sys, "argv", ["train.py", *options])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert exit.value.code == 0
    first_epoch = metrics(tiny_run.folder)[:7]
    assert metrics(tmp_path / "run") == first_epoch
    assert f"test accuracy {first_epoch[-1]['test_accuracy']:.4f} on 23 images" in capsys.readouterr().out
    weights = [to_torch(load_run(folder)[1])["decoder.2.weight"] for folder in (tiny_run.folder, tmp_path / "run")]
    assert np.abs(weights[0] - weights[1]).max() > 1e-3


def test_the_installed_command_runs_in_a_process_of_its_own():
    command = [str(Path(sys.executable).parent / "capsnet"), "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == f"capsnet-jax {version('capsnet-jax')}\n"


def test_the_package_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["capsnet_jax", "--version"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("capsnet_jax", run_name="__main__")
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"capsnet-jax {version('capsnet-jax')}\n"


@pytest.mark.parametrize("preset", PRESETS)
def test_the_config_survives_json(preset):
    assert Config.from_json(json.loads(json.dumps(PRESETS[preset].to_json()))) == PRESETS[preset]
