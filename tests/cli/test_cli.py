"""The command as users meet it: what it prints, leaves behind and refuses."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import jax
import matplotlib.image
import numpy as np
import pytest

from capsnet_jax.cli.main import COMMANDS, main
from capsnet_jax.cli.training_options import default_options
from capsnet_jax.config import Config
from capsnet_jax.interchange.weights import to_torch
from capsnet_jax.presets import PRESETS
from capsnet_jax.runs.folder import load_run
from capsnet_jax.train.evaluation import evaluate
from capsnet_jax.train.loop import Trainer
from tests.conftest import write_idx

ROOT = Path(__file__).parents[2]
SMALL = """
    --stem-channels 6 --stem-kernel 3 --primary-groups 2 --primary-dim 4 --primary-kernel 3 --primary-scale 1
    --class-dim 5 --decoder-hidden 12 14 --batch-size 8 --epochs 2 --learning-rate 0.01
""".split()  # noqa: SIM905


def train(idx_folder: Path, run_dir: Path, *more: str) -> int:
    return main(
        ["train", "--dataset", "mnist", "--data-dir", str(idx_folder), *SMALL, "--run-dir", str(run_dir), *more]
    )


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run_dir(idx_folder, tmp_path, capsys):
    assert train(idx_folder, tmp_path / "run") == 0
    return tmp_path / "run"


def test_the_last_line_is_the_accuracy_on_all_test_images(run_dir, capsys, small_dataset):
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"test accuracy \d\.\d{4} on 23 images \(error \d+\.\d\d %\)", last)
    _, model = load_run(run_dir)
    test = evaluate(model, small_dataset.test_images, small_dataset.test_labels)
    assert last.startswith(f"test accuracy {test.accuracy:.4f} ")


def test_the_chosen_implementations_are_told_once_after_the_run_folder(idx_folder, tmp_path, capsys):
    """Those for a micro-batch: dynamic routing has another implementation from 16 examples on."""
    for accumulate, choice in ((1, "fused, because 24 >= 16 examples on one device"), (2, "votes, because 12 < 16")):
        folder = tmp_path / str(accumulate)
        options = ("--batch-size", "24", "--accumulate", str(accumulate), "--epochs", "1")
        assert train(idx_folder, folder, *options) == 0
        lines = capsys.readouterr().out.splitlines()
        place = lines.index(f"Run folder: {folder}")
        assert [line.split(":")[0] for line in lines[place + 1 : place + 4]] == [
            "stem 0",
            "primary capsules",
            "routing 0",
        ]
        assert lines[place + 3].startswith(f"routing 0: {choice}")
        assert sum(", because " in line for line in lines) == 3


def test_evaluate_reproduces_the_last_line(run_dir, capsys):
    last = capsys.readouterr().out.splitlines()[-1]
    assert main(["evaluate", str(run_dir)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == last


def test_the_run_folder_holds_config_metrics_weights_and_picture(run_dir):
    fields = json.loads((run_dir / "config.json").read_text())
    assert fields["model"]["stem_channels"] == 6
    assert fields["training"]["learning_rate"] == 0.01
    assert (fields["model"]["image_shape"], fields["class_names"]) == ([9, 11, 1], list("0123456789"))
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["step"]) for line in metrics if line["kind"] == "chunk"] == [
        (step // 7 + 1, step) for step in range(1, 13)
    ]
    first, second = (line for line in metrics if line["kind"] == "epoch")
    assert (first["epoch"], first["step"], second["epoch"], second["step"]) == (1, 6, 2, 12)
    assert all(np.isfinite(value) for line in metrics for name, value in line.items() if name != "kind")
    assert second["loss"] < first["loss"]
    assert second["loss"] == pytest.approx(np.mean([line["loss"] for line in metrics[7:13]]))
    picture = matplotlib.image.imread(run_dir / "reconstructions.png")
    assert len(np.unique(picture)) > 50
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
        "reconstructions.png",
    ]


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(run_dir, idx_folder, capsys):
    before = contents(run_dir)
    assert train(idx_folder, run_dir) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert contents(run_dir) == before


def test_a_folder_that_cannot_be_written_is_an_error_before_training(idx_folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train(idx_folder, tmp_path / "file" / "run") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_keeps_what_was_saved(idx_folder, tmp_path, capsys):
    assert train(idx_folder, tmp_path / "run", "--learning-rate", "1e30") == 1
    assert re.search(r"The loss of step \d+ is (nan|inf)", capsys.readouterr().err)
    assert (tmp_path / "run" / "config.json").exists()


def test_too_little_memory_is_a_sentence_that_says_what_needs_less(idx_folder, tmp_path, monkeypatch, capsys):
    def exhausted(self):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nDetails")

    monkeypatch.setattr(Trainer, "run", exhausted)
    assert train(idx_folder, tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert "not enough memory: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes. A smaller" in error
    assert error.count("\n") == 1


def test_evaluation_on_images_of_another_shape_is_an_error(run_dir, idx_folder, capsys):
    for name, count in (("train", 50), ("t10k", 23)):
        write_idx(idx_folder / f"{name}-images-idx3-ubyte.gz", np.zeros((count, 9, 12), np.uint8))
    assert main(["evaluate", str(run_dir)]) == 2
    assert "(9, 12, 1), and the model was made for (9, 11, 1)" in capsys.readouterr().err


def test_your_own_routing_is_found_where_you_are(idx_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "mean_routing.py").write_text(
        "from capsnet_jax.routing import dynamic\n"
        "def mean(votes, activations):\n"
        "    return dynamic(votes, activations, num_iterations=1)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert train(idx_folder, tmp_path / "run", "--routing", "mean_routing:mean") == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["routing"] == "mean_routing:mean"
    assert main(["evaluate", str(tmp_path / "run")]) == 0


def test_a_routing_that_returns_nan_is_named_with_the_step(idx_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "nan_routing.py").write_text(
        "from capsnet_jax.routing import dynamic\n"
        "def broken(votes, activations):\n"
        "    routed = dynamic(votes, activations)\n"
        "    return routed._replace(poses=routed.poses / 0)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert train(idx_folder, tmp_path / "run", "--routing", "nan_routing:broken") == 1
    error = capsys.readouterr().err
    assert "The loss of step 1 is nan" in error
    assert "`capsnet check-routing nan_routing:broken`" in error


def test_options_of_a_routing_reach_it_and_its_weights_are_saved(idx_folder, tmp_path, capsys):
    spec = "dynamic,capsule_bias=0.1,num_iterations=2"
    assert train(idx_folder, tmp_path / "run", "--routing", spec) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    _, model = load_run(tmp_path / "run")
    name = "encoder.primary2digit_capsules.routing_weights.capsule_bias"
    assert to_torch(model)[name].shape == (10, 5)
    assert np.abs(to_torch(model)[name] - 0.1).max() > 1e-3
    assert dict(model.capsule_layers[0].routing.options)["num_iterations"] == 2
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == last


def test_a_model_without_decoder_trains_and_has_no_picture(idx_folder, tmp_path):
    options = ("--decoder-hidden", "None", "--reconstruction-weight", "0", "--loss", "spread")
    assert train(idx_folder, tmp_path / "run", *options, "--train-limit", "20") == 0
    assert not (tmp_path / "run" / "reconstructions.png").exists()
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in metrics if line["kind"] == "epoch"]
    assert [(line["step"], line["reconstruction"]) for line in epochs] == [(2, 0), (4, 0)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dataset", "digits", "--preset", "readable"), "8 x 8 are too small"),
        (("--preset", "nothing"), "expected readable, digits, official"),
        (("--routing", "dynamic,leak=true"), "Routing dynamic has no option 'leak'; expected num_iterations (int, 3)"),
        (("--routing", "em,annealing=warm"), "Routing em: annealing is 'warm'; expected a finite number"),
        (("--routing", "dynamic,leaky"), "Routing dynamic: leaky is ''; expected true or false"),
        (("--routing", "dynamic,leaky=true,leaky=false"), "Routing dynamic: leaky is given twice"),
        (("--routing", "em,min_variance=nan"), "Routing em: min_variance is 'nan'; expected a finite number"),
        (("--routing", "random,seed=-1"), "Routing random: seed is -1, and must be at least 0"),
        (("--routing", "os:getcwd"), "expected votes, activations and keyword arguments"),
        (("--routing", "capsnet_jax.ops:mask_by_label"), "Routing capsnet_jax.ops:mask_by_label raises "),
        (("--shared-class-transform", "--class-dim", "1"), "two components of a pose, and out_dim is 1"),
        (("--routing", "json:dumpz"), "Routing 'json:dumpz' cannot be imported"),
        (("--routing", "capsnet_jax.routing:ROUTINGS"), "is of type dict; expected a function"),
        (("--train-limit", "5000"), "train_limit is 5000, with only 1442 training images"),
        (("--decoder-hidden", "None"), "reconstruction_weight is 10.0, and must be 0 for a model without a decoder"),
        (("--matrix-poses", "--class-dim", "5"), "no square matrices"),
        (("--conv-capsules", "4", "4", "5", "1"), "8 x 8 are too small"),
        (("--routing", "nothing"), "expected dynamic"),
        (("--data-dir", "nowhere"), "nowhere does not exist"),
        (("--augment", "shft=0.1"), "Unknown augmentation 'shft=0.1'; expected any of rotation=DEGREES"),
        (("--augment", "crop=9"), "The crop is 9 x 9; expected 1 to 8, of 8 x 8"),
        (("--resume",), "--resume needs the folder of the run; expected --run-dir, too"),
        (("--process-id", "1"), "Got --process-id for a run of one process; expected --distributed, too"),
        (("--seeds", "0"), "seeds is 0, and must be at least 1"),
        (("--validation", "0.999"), "batch_size is 32, with only 1 training images"),
        (("--batch-size", "5000"), "with only 1442 training images"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_wrong_option_is_one_sentence_and_leaves_nothing(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["--epochs", "--batch-size", "--num-iterations", "--primary-groups"])
@pytest.mark.parametrize("value", ["0", "-3"])
def test_a_number_below_1_is_an_error_with_the_name_and_the_value(name, value, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["train", name, value])
    assert exit.value.code == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert f"{name[2:].replace('-', '_')} is {value}, and must be at least 1" in error


def test_compare_refuses_the_option_of_train(capsys):
    assert main(["compare", "--routing", "em"]) == 2
    assert "compare has no --routing; expected --routings" in capsys.readouterr().err


def test_evaluating_what_is_no_run_is_an_error(tmp_path, capsys):
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "is not the folder of a run: it has no config.json" in capsys.readouterr().err


def test_the_preset_follows_the_data_set():
    assert default_options([]) == {"config": PRESETS["digits"]}
    assert default_options(["--dataset", "mnist"]) == {"config": PRESETS["readable"]}
    assert default_options(["--dataset=mnist", "--preset=digits"]) == {"config": PRESETS["digits"]}


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_the_help_has_a_line_for_each_command_on_one_screen(arguments, capsys):
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100
    names = [line.split()[0] for line in lines if line.startswith("  ")]
    assert names == list(COMMANDS)
    documented = "train evaluate predict compare check-routing report benchmark verify convert export"
    assert set(names) >= set(documented.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_where_the_table_says(name, capsys):
    with pytest.raises(SystemExit) as exit:
        main([name, "--help"])
    assert exit.value.code == 0
    assert f"usage: capsnet {name} [" in capsys.readouterr().out


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"capsnet-jax {version('capsnet-jax')}\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "trian",
            "Unknown command 'trian' (did you mean train?); expected train, evaluate, predict, report, compare, ",
        ),
        ("check_routing", "Unknown command 'check_routing' (did you mean check-routing?); expected train, "),
        ("fly", "Unknown command 'fly'; expected train, "),
        ("--epochs", "Unknown command '--epochs'; expected train, "),
    ],
)
def test_an_unknown_command_names_the_nearest(name, message, capsys):
    assert main([name, "--epochs", "1"]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith(f"capsnet: error: {message}")
    assert error.endswith(", export.\n")
    assert error.count("\n") == 1


def test_help_names_every_field_with_its_default(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["train", "--help"])
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for section in (PRESETS["digits"].model, PRESETS["digits"].data, PRESETS["digits"].training):
        for name in vars(section).keys() - {"image_shape", "num_classes"}:  # those of the data set
            assert f"--{name.replace('_', '-')}" in text
    assert "--image-shape" not in text
    assert "Number of routing iterations. (default: 3)" in text
    assert all(preset in text for preset in PRESETS)
    assert "em: num_iterations (int, 3), beta_u (float, 0.0, learned)" in text


def test_the_script_and_the_command_are_the_same(tmp_path):
    """In processes of their own, as a user starts them, on the real digits."""
    options = ["--epochs", "1", "--stem-channels", "8", "--seed", "3"]
    commands = ([sys.executable, str(ROOT / "train.py")], [str(Path(sys.executable).parent / "capsnet"), "train"])
    lines = []
    for number, command in enumerate(commands):
        arguments = [*command, *options, "--run-dir", f"run{number}"]
        lines.append(
            subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()
        )
    assert lines[0][-1] == lines[1][-1]
    assert lines[0][0].startswith("CapsNet of ")
    assert (tmp_path / "run0" / "model.safetensors").read_bytes() == (
        tmp_path / "run1" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("preset", PRESETS)
def test_the_config_survives_json(preset):
    assert Config.from_json(json.loads(json.dumps(PRESETS[preset].to_json()))) == PRESETS[preset]


def test_weights_on_disk_are_those_of_the_last_epoch(idx_folder, tmp_path):
    """Half the run, again from the same seed, has other weights; they are not those of the first epoch."""
    assert train(idx_folder, tmp_path / "two") == 0
    assert train(idx_folder, tmp_path / "one", "--epochs", "1") == 0
    weights = [to_torch(load_run(tmp_path / name)[1])["decoder.2.weight"] for name in ("one", "two")]
    assert np.abs(weights[0] - weights[1]).max() > 1e-3
