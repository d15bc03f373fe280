"""Runs that start from the weights of another: what is taken, recorded and refused, and that they resume without it."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from capsnet_jax import UsageError
from capsnet_jax.cli.main import main
from capsnet_jax.cli.report import History, differing_options
from capsnet_jax.cli.train import Train
from capsnet_jax.runs.folder import read_run
from capsnet_jax.runs.origin import ORIGIN, Origin, Source
from tests.data.tiny_images import write_image_folder
from tests.tiny_run import contents, printed

# Quick to compile, and without pictures.
QUICK = "--routing uniform --decoder-hidden None --reconstruction-weight 0 --batch-size 8 --learning-rate 0.01".split()  # noqa: SIM905
FREEZE = ["--freeze", "stem", "--ema-decay", "0.9"]
UNUSED = ["decoder.0.weight", "decoder.2.bias", "decoder.2.weight", "decoder.4.weight"]
STEM = "encoder.image2primary_capsules.0.weight"
CLASSES = "encoder.primary2digit_capsules.input_caps2U.weight"


def options(tiny_run, run_dir: Path, *more: str) -> list[str]:
    return [
        "train",
        "--dataset",
        "mnist",
        "--data-dir",
        str(tiny_run.data_dir),
        *QUICK,
        "--run-dir",
        str(run_dir),
        *more,
    ]


def copy_of(tiny_run, folder: Path) -> Path:
    """The folder of the finished run, without its checkpoints."""
    return Path(shutil.copytree(tiny_run.folder, folder, ignore=shutil.ignore_patterns("checkpoints")))


@pytest.fixture(scope="module")
def started(tiny_run, tmp_path_factory):
    """Two seeds that started from a run, one after the other, and what was printed; the source is gone."""
    here = tmp_path_factory.mktemp("started")
    source = copy_of(tiny_run, here / "source")
    lines = printed(*options(tiny_run, here / "run", "--from", str(source), *FREEZE, "--epochs", "1", "--seeds", "2"))
    shutil.rmtree(source)
    return here / "run", lines


def test_a_run_starts_from_the_weights_that_fit_and_says_which(started, tiny_run):
    folder, lines = started
    assert lines[2:4] == [
        f"Weights from {folder.parent / 'source'}",
        f"Weights of the source that are not used: {', '.join(UNUSED)}",
    ]
    assert lines[4] == "Frozen: stem, 60 of 5,300 parameters"
    source = load_file(tiny_run.folder / "model.safetensors")
    first, second = (load_file(folder / f"seed-{seed}" / "model.safetensors") for seed in (0, 1))
    for name, array in source.items():
        if name not in UNUSED:
            assert (array.tobytes() == first[name].tobytes()) == ("capsules.0." in name)
            # Six steps of Adam from the same weights, on the same images in another order.
            assert 0.01 < np.abs(first[name] - array).max() < 0.08 or "capsules.0." in name
    assert first[CLASSES].tobytes() != second[CLASSES].tobytes()


def test_the_source_is_recorded_and_copied(started, tiny_run):
    folder, _ = started
    copy = (folder / ORIGIN).read_bytes()
    assert copy == (tiny_run.folder / "model.safetensors").read_bytes()
    fields = json.loads((folder / "seed-1" / "config.json").read_text())
    sha256 = hashlib.sha256(copy).hexdigest()
    assert fields["origin"] == {
        "from": str(folder.parent / "source"), "sha256": sha256, "anew": [], "unused": UNUSED
    }  # fmt: skip
    assert fields["training"]["freeze"] == ["stem"]
    assert main(["convert", str(folder / "seed-1"), "--to", str(folder / "converted")]) == 0
    card = (folder / "converted" / "README.md").read_text()
    assert f"It started from the weights of `source` (SHA-256 `{sha256}`).\n" in card
    assert "| freeze" in card
    histories = [History.read(run) for run in (folder / "seed-1", tiny_run.folder)]
    columns = differing_options(histories)
    assert ("from" in columns, "freeze" in columns, "sha256" in columns, "unused" in columns) == (
        True,
        True,
        False,
        False,
    )
    assert histories[0].option("from") == str(folder.parent / "source")


def test_it_resumes_to_the_last_bit_without_the_source(started, tiny_run, tmp_path, monkeypatch):
    folder, _ = started
    resumed = shutil.copytree(folder, tmp_path / "resumed")
    assert main(["train", "--resume", "--run-dir", str(resumed), "--epochs", "2"]) == 0
    source = copy_of(tiny_run, folder.parent / "source")
    whole = tmp_path / "whole"
    assert main(options(tiny_run, whole, "--from", str(source), *FREEZE, "--epochs", "2", "--seeds", "2")) == 0
    shutil.rmtree(source)
    for seed in ("seed-0", "seed-1"):
        weights = [load_file(of / seed / "model.safetensors") for of in (resumed, whole)]
        for name, array in weights[0].items():
            assert array.tobytes() == weights[1][name].tobytes(), name
        assert (whole / seed / "config.json").read_bytes() == (resumed / seed / "config.json").read_bytes()


def test_the_copy_is_read_when_the_source_is_gone(started, tiny_run):
    folder, _ = started
    source = Source.read(folder.parent / "source", started=folder)
    assert (source.path, source.content) == (str(folder.parent / "source"), (folder / ORIGIN).read_bytes())
    expected = load_file(tiny_run.folder / "model.safetensors")
    assert {name: array.tobytes() for name, array in source.state.items()} == {
        name: array.tobytes() for name, array in expected.items()
    }
    with pytest.raises(UsageError, match="source does not exist"):
        Source.read(folder.parent / "source")


@pytest.mark.exhaustive
def test_a_run_without_checkpoints_is_started_again_from_the_copy(started, tmp_path):
    folder, _ = started
    again = shutil.copytree(folder, tmp_path / "again", ignore=shutil.ignore_patterns("checkpoints", "*.safetensors"))
    shutil.copy(folder / ORIGIN, again)
    # The same command, which a queue of jobs repeats: the path is that of the record, and nothing is there.
    source = ["--from", str(folder.parent / "source")]
    assert main(["train", "--resume", "--run-dir", str(again), *source]) == 0
    for seed in ("seed-0", "seed-1"):
        assert (again / seed / "model.safetensors").read_bytes() == (folder / seed / "model.safetensors").read_bytes()


def test_a_run_is_not_resumed_with_other_weights(started, tiny_run, tmp_path, capsys):
    folder, _ = started
    resume = ["train", "--resume", "--run-dir", str(folder)]
    before = contents(folder)
    other = copy_of(tiny_run, tmp_path / "other")
    assert main([*resume, "--from", str(other)]) == 2
    assert f"cannot be resumed, as from was {folder.parent / 'source'} and is {other};" in capsys.readouterr().err
    assert main([*resume, "--freeze", "primary_capsules"]) == 2
    assert "cannot be resumed, as freeze was ['stem'] and is ['primary_capsules'];" in capsys.readouterr().err
    assert main(["train", "--resume", "--run-dir", str(tiny_run.folder), "--from", str(other)]) == 2
    assert f"cannot be resumed, as anew was not there and is []; from was not there and is {other};" in (
        capsys.readouterr().err
    )
    assert contents(folder) == before
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    state = load_file(damaged / ORIGIN)
    state[STEM][0, 0, 1, 2] += 1
    save_file(state, damaged / ORIGIN)
    assert main(["train", "--resume", "--run-dir", str(damaged)]) == 2
    assert "cannot be resumed, as sha256 was " in capsys.readouterr().err


def test_other_classes_and_images_start_their_layers_anew_and_keep_the_model_of_the_source(tiny_run, tmp_path, capsys):
    images = write_image_folder(tmp_path / "letters", "abc", 12, 13, per_class=10)
    run = tmp_path / "run"
    source = tiny_run.folder / "model.safetensors"
    training = [
        "train",
        "--dataset",
        str(images),
        "--from",
        str(source),
        *QUICK,
        "--epochs",
        "1",
        "--run-dir",
        str(run),
    ]
    # The images are coloured, so the stem starts anew.
    assert main([*training, "--freeze", "primary_capsules", "stem"]) == 2
    assert f"freeze is primary_capsules stem, and {STEM} in it does not fit {source}" in capsys.readouterr().err
    assert not run.exists()
    printed(*training, "--freeze", "primary_capsules")
    model = read_run(run).config.model
    assert (model.stem_channels, model.primary_groups, model.primary_scale, model.class_dim) == (6, 2, 1.0, 5)
    assert (model.image_shape, model.num_classes) == ((12, 13, 3), 3)
    assert json.loads((run / "config.json").read_text())["origin"]["anew"] == [
        "encoder.image2primary_capsules.0.weight",
        "encoder.image2primary_capsules.0.bias",
        "encoder.primary2digit_capsules.input_caps2U.weight",
    ]
    taken = "encoder.image2primary_capsules.2.weight"
    after = [load_file(folder / "model.safetensors")[taken].tobytes() for folder in (tiny_run.folder, run)]
    assert after[0] == after[1]


def test_options_replace_the_model_of_the_source(tiny_run, tmp_path):
    default = Train.default(["--from", str(tiny_run.folder), "--dataset", "mnist"])
    assert (default.model.stem_channels, default.training.epochs) == (6, 10)  # only the model is of the source
    preset = Train.default(["--from", str(tiny_run.folder), "--preset", "official"])
    assert (preset.model.stem_channels, preset.model.routing) == (256, "dynamic,capsule_bias=0.1")
    alone = shutil.copy(tiny_run.folder / "model.safetensors", tmp_path)
    assert Train.default([f"--from={alone}", "--dataset", "mnist"]).model.stem_channels == 256


WRONG = {
    "nowhere": (["nowhere"], "nowhere does not exist; expected a file or folder of weights."),
    "another kind": (["notes.txt"], "notes.txt ends in '.txt'; expected .safetensors, .pt, .pth."),
    "no weights": (["empty"], "empty has no model.safetensors; expected the folder of a run, or a file of weights."),
    "unprintable": (["a\nb"], r"from is 'a\nb'; expected a path of printable characters."),
    "seeds": (["seeds"], "seeds has no model.safetensors; its folder seed-3 does."),
    "not finite": (["nan.safetensors"], f"The entry {STEM} has values that are not finite; expected numbers only."),
    "none fits": (
        ["run/model.safetensors", "--preset", "digits"],
        "run/model.safetensors: None of the 9 weights fits this model in name and shape; expected weights of a",
    ),
    "code": (["code"], "Its routing evil:f would import the module evil"),
    "config": (["damaged"], "damaged/config.json: class_names is None; expected a list of printable names."),
    "layer": (["run", "--freeze", "stern"], "freeze has 'stern', which is no layer of this model; expected"),
    "everything": (
        ["run", "--freeze", "stem", "primary_capsules", "capsule_layers", "decoder"],
        "freeze is stem primary_capsules capsule_layers decoder, which leaves no weight to train; expected fewer",
    ),
}


@pytest.fixture(scope="module")
def wrong(tiny_run, tmp_path_factory):
    here = tmp_path_factory.mktemp("wrong")
    for name in ("run", "code", "damaged", "seeds/seed-3"):
        copy_of(tiny_run, here / name)
    (here / "empty").mkdir()
    (here / "notes.txt").write_text("weights")
    (here / "evil.py").write_text("open('executed', 'w')")
    config = json.loads((tiny_run.folder / "config.json").read_text())
    (here / "code" / "config.json").write_text(json.dumps(config | {"model": config["model"] | {"routing": "evil:f"}}))
    (here / "damaged" / "config.json").write_text("{}")
    state = load_file(tiny_run.folder / "model.safetensors")
    state[STEM][0, 0, 1, 2] = np.nan
    save_file(state, here / "nan.safetensors")
    return here


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_sources_and_layers_are_refused_in_a_sentence(arguments, message, wrong, tiny_run, monkeypatch, capsys):
    monkeypatch.chdir(wrong)
    data = ["--dataset", "mnist", "--data-dir", str(tiny_run.data_dir), "--batch-size", "8"]
    before = contents(wrong)
    assert main(["train", *data, "--from", *arguments, "--run-dir", "new"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert contents(wrong) == before


def test_the_routing_of_another_package_is_imported_only_if_it_is_given(wrong, tiny_run, monkeypatch):
    monkeypatch.chdir(wrong)
    given = Train.default(["--from", "code", "--routing", "uniform"])
    assert given.model.stem_channels == 6
    assert not (wrong / "executed").exists()


def test_a_damaged_record_is_refused():
    record = Origin("/a b/run", "0f", ("x", "y"), ())
    assert Origin.from_json(json.loads(json.dumps(record.to_json()))) == record
    fields = record.to_json()
    damaged = [None, 3, [], {}, "text", fields | {"from": 3}, fields | {"sha256": None}, fields | {"anew": "xy"}]
    damaged += [fields | {"unused": [3]}, fields | {"unused": {}}, fields | {"from": "a\nb"}, fields | {"more": 1}]
    for wrong_fields in damaged:
        with pytest.raises(UsageError, match=r"^origin is .*; expected from, sha256, anew and unused\.$"):
            Origin.from_json(wrong_fields)


def test_a_comparison_starts_each_routing_from_the_weights(tiny_run, tmp_path, capsys):
    source, output = copy_of(tiny_run, tmp_path / "source"), tmp_path / "compared"
    data = ["--dataset", "mnist", "--data-dir", str(tiny_run.data_dir), "--batch-size", "8", "--epochs", "1"]
    model = ["--decoder-hidden", "None", "--reconstruction-weight", "0", "--freeze", "stem"]
    command = ["compare", *data, *model, "--from", str(source), "--routings", "uniform", "--seeds", "1"]
    command += ["--output", str(output)]
    printed(*command)
    run = read_run(output / "uniform")
    assert run.origin is not None
    assert (run.origin.path, run.origin.anew, run.config.training.freeze) == (str(source), (), ("stem",))
    stems = [load_file(folder / "model.safetensors")[STEM].tobytes() for folder in (tiny_run.folder, run.folder)]
    assert stems[0] == stems[1]
    assert "uniform (1 of 1): done before" in printed(*command)
    other = copy_of(tiny_run, tmp_path / "other")
    assert main([*command, "--from", str(other)]) == 2
    assert f"holds another comparison: from was {source} and is {other}" in capsys.readouterr().err
    shutil.rmtree(source)
    assert main(command) == 2
    assert f"{source} does not exist; expected a file or folder of weights." in capsys.readouterr().err
