"""Folders of runs from several seeds: reported and resumed together, and never mixed with others."""

import json
import math
import os
import re
import signal
import statistics
from pathlib import Path
from typing import NamedTuple

import pytest

from capsnet_jax import UsageError
from capsnet_jax.cli.main import main
from capsnet_jax.config import Config
from capsnet_jax.runs import session
from capsnet_jax.runs.folder import Run, SeedFolders, read_seeds, saved_runs
from capsnet_jax.runs.metrics import MetricsLog
from tests.conftest import IMAGE_SHAPE, make_small_dataset, write_idx_folder
from tests.tiny_run import contents, metrics, printed
from tests.tiny_run import options_of as tiny_options

SEEDS = (0, 1, 2)
# Epochs are of five steps, and the routing is quick to compile.
OPTIONS = ["--seeds", "3", "--validation", "0.2", "--ema-decay", "0.9", "--routing", "uniform"]
WITHOUT_PICTURES = ["--decoder-hidden", "None", "--reconstruction-weight", "0"]


def options_of(data: Path, folder: Path, at_once: int = 3) -> list[str]:
    """Options of three runs; seeds that train one after the other have no pictures, which saves time."""
    return tiny_options(data, folder, *OPTIONS, *(WITHOUT_PICTURES if at_once == 1 else []))


class Trained(NamedTuple):
    """The folder of three runs, the lines that training printed, and how many seeds trained side by side."""

    folder: Path
    lines: list[str]
    at_once: int


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_idx_folder(tmp_path_factory.mktemp("data") / "idx", make_small_dataset())


@pytest.fixture(scope="module", params=[3, 1])
def trained(request, data, tmp_path_factory):
    """Runs with memory for all three seeds side by side, or for only one."""
    folder = tmp_path_factory.mktemp("trained") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "available_memory", lambda: math.inf if request.param == 3 else 0)
        return Trained(folder, printed(*options_of(data, folder, request.param)), request.param)


def test_each_seed_has_a_run_of_its_own_and_a_line_with_its_result(trained):
    accuracies = []
    for seed, line in zip(SEEDS, trained.lines[-4:-1], strict=True):
        last = printed("evaluate", str(trained.folder / f"seed-{seed}"))[-1]
        assert line == f"seed {seed}: {last}"
        epochs = [one for one in metrics(trained.folder / f"seed-{seed}") if one["kind"] == "epoch"]
        accuracies.append(epochs[-1]["test_accuracy"])
        assert last.startswith(f"test accuracy {accuracies[-1]:.4f} on 23 images")
    mean, deviation = statistics.mean(accuracies), statistics.stdev(accuracies)
    assert deviation > 0
    assert trained.lines[-1] == (
        f"test accuracy {mean:.4f} +- {deviation:.4f} from 3 seeds on 23 images "
        f"(error {100 - 100 * mean:.2f} +- {100 * deviation:.2f} %)"
    )


def test_the_common_folder_stores_the_seeds_and_how_many_train_side_by_side(trained):
    assert json.loads((trained.folder / "seeds.json").read_text()) == {"seeds": [0, 1, 2], "at_once": trained.at_once}
    assert sorted(path.name for path in trained.folder.iterdir()) == [
        "checkpoints",
        "seed-0",
        "seed-1",
        "seed-2",
        "seeds.json",
    ]
    groups = ["seeds-0-2"] if trained.at_once == 3 else ["seeds-0-0", "seeds-1-1", "seeds-2-2"]
    assert sorted(path.name for path in (trained.folder / "checkpoints").iterdir()) == groups
    for seed in SEEDS:
        config = json.loads((trained.folder / f"seed-{seed}" / "config.json").read_text())
        assert config["training"]["seed"] == seed
        assert sorted(path.name for path in (trained.folder / f"seed-{seed}").iterdir()) == [
            "best.safetensors",
            "config.json",
            "metrics.jsonl",
            "model.safetensors",
            *(["reconstructions.png"] if trained.at_once == 3 else []),
        ]


def test_report_lists_all_seeds_of_the_folder(trained, tmp_path):
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in printed("report", str(trained.folder), "--output", str(tmp_path / "curves.png"))[2:]
    ]
    assert [row[0] for row in rows] == [
        *(str(trained.folder / f"seed-{seed}") for seed in SEEDS),
        f"{trained.folder}, 3 seeds",
    ]
    errors = re.search(r"\(error (.*) %\)", trained.lines[-1])
    assert rows[-1][5] == errors[1]


def test_stopped_and_resumed_runs_end_as_if_uninterrupted(trained, data, tmp_path, monkeypatch, capsys):
    """Stopped within the second epoch, of all seeds or of the second; then there is more or less memory than before."""
    folder = tmp_path / "stopped"
    write, stopped_seed = MetricsLog.write, 0 if trained.at_once == 3 else 1

    def signalling(self, progress, seed):
        if (progress.step, seed.seed) == (7, stopped_seed):
            os.kill(os.getpid(), signal.SIGTERM)
        return write(self, progress, seed)

    with monkeypatch.context() as patch:
        patch.setattr(session, "available_memory", lambda: math.inf if trained.at_once == 3 else 0)
        patch.setattr(MetricsLog, "write", signalling)
        assert main(options_of(data, folder, trained.at_once)) == 143
    assert f"after step 7. To continue: capsnet train --resume --run-dir {folder}" in capsys.readouterr().err
    monkeypatch.setattr(session, "available_memory", lambda: 0 if trained.at_once == 3 else math.inf)
    lines = printed("train", "--resume", "--run-dir", str(folder))
    assert [line for line in lines if line.startswith("Resuming")] == (
        ["Resuming after step 7 of 10"]
        if trained.at_once == 3
        else ["Resuming after step 10 of 10", "Resuming after step 7 of 10"]
    )
    assert lines[-4:] == trained.lines[-4:]
    for seed in SEEDS:
        stopped, uninterrupted = folder / f"seed-{seed}", trained.folder / f"seed-{seed}"
        assert metrics(stopped) == metrics(uninterrupted)
        for name in ("model.safetensors", "best.safetensors"):
            assert (stopped / name).read_bytes() == (uninterrupted / name).read_bytes()
    assert (folder / "seeds.json").read_text() == (trained.folder / "seeds.json").read_text()


ALREADY = "already holds runs; give a new one, or --resume."


@pytest.mark.parametrize("trained", [3], indirect=True)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume", "--seeds", "2"], "are from seeds 0, 1, 2, and not 0, 1;"),
        (["--resume", "--seeds", "4"], "are from seeds 0, 1, 2, and not 0, 1, 2, 3;"),
        (["--resume", "--seed", "1"], "are from seeds 0, 1, 2, and not 1, 2, 3;"),
        (["--resume", "--seeds", "1"], "are from seeds 0, 1, 2, and not 0;"),
        (["--resume", "--learning-rate", "0.02"], "seed-0 cannot be resumed, as learning_rate was 0.01 and is"),
        (["--seeds", "3"], ALREADY),
        (["--seeds", "1"], ALREADY),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_other_runs_in_their_folder_are_refused_and_leave_nothing(trained, data, options, message, capsys):
    before = contents(trained.folder)
    assert main([*options_of(data, trained.folder), *options]) == 2
    error = capsys.readouterr().err
    assert f"{trained.folder}" in error
    assert message in error
    assert error.count("\n") == 1
    assert contents(trained.folder) == before


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "runs", Config().with_sizes(IMAGE_SHAPE, 2), ("a", "b"))


@pytest.mark.parametrize("resume", [False, True])
def test_several_seeds_in_the_folder_of_one_are_refused(resume, run):
    run.write_config()
    before = contents(run.folder)
    with pytest.raises(UsageError, match=r"runs holds a run from one seed; give a new one\."):
        SeedFolders(run, SEEDS).check(resume=resume)
    assert contents(run.folder) == before


@pytest.mark.parametrize("resume", [False, True])
def test_one_of_several_seeds_is_refused(resume, run):
    SeedFolders(run, SEEDS).create()
    before = contents(run.folder)
    of_one_seed = run._replace(folder=run.folder / "seed-1")
    with pytest.raises(UsageError, match=r"runs/seed-1 is one of the runs in .*runs; expected that as --run-dir\."):
        SeedFolders(of_one_seed, (1,)).check(resume=resume)
    assert contents(run.folder) == before


def test_how_many_train_side_by_side_is_known_when_they_are_resumed(run):
    folders = SeedFolders(run, (5, 6, 7))
    folders.check(resume=False)
    folders.create()
    # A crash before it is known loses nothing, not even the number of seeds.
    assert read_seeds(run.folder) == ([5, 6, 7], 0)
    saved, num_seeds = saved_runs(run.folder)
    assert (saved.config.training.seed, num_seeds) == (5, 3)
    for before, found in ((0, 2), (2, 2)):
        folders = SeedFolders(run, (5, 6, 7))
        folders.check(resume=True)
        folders.create()
        assert folders.at_once == before
        folders.keep_together(found)
        assert read_seeds(run.folder) == ([5, 6, 7], 2)


def test_a_single_seed_has_the_folder_for_itself(run):
    folders = SeedFolders(run, (5,))
    folders.check(resume=False)
    folders.create()
    folders.keep_together(1)
    assert [path.name for path in run.folder.iterdir()] == ["config.json"]
    assert folders.run(5) == run
    assert folders.checkpoints((5,)) == run.folder / "checkpoints"


@pytest.mark.parametrize("text", ["", "[", "[0, 1]", '{"seeds": [0, 1]}', '{"seeds": 3, "at_once": 1}'])
def test_a_file_of_seeds_that_cannot_be_read_is_named(text, run):
    run.folder.mkdir()
    (run.folder / "seeds.json").write_text(text)
    with pytest.raises(UsageError, match=r"runs/seeds.json cannot be read: "):
        SeedFolders(run, SEEDS).check(resume=True)
