"""The command `report`: a table and learning curves from metrics alone, with the results of the last epoch."""

import json
import statistics

import matplotlib.image
import numpy as np
import pytest
import tyro

from capsnet_jax import UsageError
from capsnet_jax.cli.report import History, Report
from capsnet_jax.config import Config, DataConfig, TrainingConfig
from capsnet_jax.figures import learning_curves_figure
from capsnet_jax.runs.folder import Run
from capsnet_jax.runs.metrics import METRICS

STEPS = 4  # of an epoch, in two chunks
SPEEDS = (100.0, 900.0, 1234.0, 1100.0, 1000.0)


def write_run(folder, test, validation=(), *, epochs=3, memory=1_500_000_000, **options):
    """Write a run with these accuracies after its epochs."""
    routing = {"dataset": options.pop("dataset", "digits")}
    config = Config(data=DataConfig(**routing), training=TrainingConfig(epochs=epochs, **options))
    Run(folder, config.with_sizes((8, 8, 1), 2), ("a", "b")).write_config()
    lines = []
    for epoch, accuracy in enumerate(test, 1):
        for step in (STEPS * epoch - 2, STEPS * epoch):
            lines.append({"kind": "chunk", "epoch": epoch, "step": step, "loss": 9 / step, "peak_memory_bytes": memory})
        lines.append({"kind": "epoch", "epoch": epoch, "step": STEPS * epoch, "loss": 10 / epoch})
        lines[-1] |= {"images_per_second": SPEEDS[epoch - 1], "peak_memory_bytes": memory, "test_accuracy": accuracy}
        if validation:
            lines[-1]["validation_accuracy"] = validation[epoch - 1]
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def report(*arguments):
    tyro.cli(Report, args=list(map(str, arguments))).run()


def test_the_row_of_a_run_is_that_of_its_last_epoch(tmp_path, capsys):
    write_run(tmp_path / "run", (0.5, 0.98, 0.9), (0.4, 0.95, 0.875))
    report("run")
    assert capsys.readouterr().out == (
        "| run | epochs | steps | train loss | validation error % | test error % | images/s | memory MB |\n"
        "| --- | -----: | ----: | ---------: | -----------------: | -----------: | -------: | --------: |\n"
        "| run |    3/3 |    12 |     3.3333 |              12.50 |        10.00 |      900 |     1,500 |\n"
    )
    assert len(np.unique(matplotlib.image.imread("learning_curves.png"))) > 20


def test_options_that_differ_have_columns(tmp_path, capsys):
    write_run(tmp_path / "a", (0.5, 0.9), learning_rate=0.01, clip_norm=2.0)
    write_run(tmp_path / "b", (0.5, 0.75, 0.9, 0.95, 0.9), memory=None, dataset="mnist", epochs=5)
    report("a", "b", "--output", "curves.png")
    headings, _, *rows = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()
    )
    assert headings[8:] == ["dataset", "learning_rate", "clip_norm"]
    assert rows == [
        ["a", "2/3", "8", "5.0000", "-", "10.00", "500", "1,500", "digits", "0.01", "2.0"],
        ["b", "5/5", "20", "2.0000", "-", "10.00", "1,000", "-", "mnist", "0.001", "-"],
    ]
    assert (tmp_path / "curves.png").exists()
    assert not (tmp_path / "learning_curves.png").exists()


def test_seeds_have_a_row_of_mean_and_sample_deviation(tmp_path, capsys):
    last = {2: 0.9, 0: 0.95, 10: 0.97}
    for seed, accuracy in last.items():
        write_run(tmp_path / "many" / f"seed-{seed}", (0.99, accuracy), epochs=2, seed=seed)
    (tmp_path / "many" / "seed-of-evil").mkdir()
    report("many")
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [row[0] for row in rows[2:]] == ["many/seed-0", "many/seed-2", "many/seed-10", "many, 3 seeds"]
    assert rows[0][-1] == "seed"
    assert [row[-1] for row in rows[2:]] == ["0", "2", "10", ""]
    errors = [100 * (1 - accuracy) for accuracy in last.values()]
    mean = sum(errors) / 3
    deviation = (sum((error - mean) ** 2 for error in errors) / 2) ** 0.5
    assert rows[-1][:6] == ["many, 3 seeds", "2/2", "", "", "", f"{mean:.2f} +- {deviation:.2f}"]
    assert deviation == pytest.approx(statistics.stdev(errors))


def test_one_seed_has_no_deviation_and_unequal_epochs_are_marked(tmp_path, capsys):
    write_run(tmp_path / "one" / "seed-7", (0.9,))
    write_run(tmp_path / "two" / "seed-1", (0.9,))
    write_run(tmp_path / "two" / "seed-2", (0.9, 0.8))
    report("one", "two")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert (rows[1][:2], rows[1][5]) == (["one, 1 seed", "1/3"], "10.00")
    assert (rows[4][:2], rows[4][5]) == (["two, 2 seeds", "differ"], "15.00 +- 7.07")


def test_a_run_within_its_first_epoch_has_no_errors_yet(tmp_path, capsys):
    folder = write_run(tmp_path / "run", (0.5,))
    lines = (folder / METRICS).read_text().splitlines()
    (folder / METRICS).write_text(f"{lines[0]}\n{lines[1][:30]}")
    report("run")
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[2].split("|")[1:-1]]
    assert cells == ["run", "0/3", "2", "-", "-", "-", "-", "1,500"]


@pytest.mark.parametrize(
    "line",
    [
        "3",
        '{"epoch": 1, "step": 3}',
        '{"kind": "chunk", "epoch": 1, "loss": 1}',
        '{"kind": "chunk", "epoch": 1, "step": "x"}',
        '{"kind": "epoch", "step": 3, "loss": 1}',
        '{"kind": "epoch", "epoch": 0, "step": 3}',
        '{"kind": "epoch", "epoch": 1, "step": 3, "loss": "low"}',
        "[" * 100_000,
    ],
)
def test_lines_that_are_not_metrics_are_refused_with_their_number(line, tmp_path):
    folder = write_run(tmp_path / "run", (0.5,))
    with (folder / METRICS).open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(UsageError, match=r"metrics.jsonl, line 4, .* expected the metrics of a chunk or an epoch"):
        report("run")


def test_a_config_of_deep_nesting_is_refused(tmp_path):
    folder = write_run(tmp_path / "run", (0.5,))
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(UsageError, match=r"config.json is not the config of a run"):
        report("run")


def test_a_last_line_that_was_not_finished_does_not_count(tmp_path, capsys):
    folder = write_run(tmp_path / "run", (0.5, 0.75))
    report("run")
    before = capsys.readouterr().out
    with (folder / METRICS).open("a") as file:
        file.write('{"kind": "epoch", "epoch": 3, "step": 12, "loss": 0.')
    report("run")
    assert capsys.readouterr().out == before


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ("", r"run/metrics.jsonl has no metrics yet; expected a run that"),
        ('{"kind": "epoch", "st', r"run/metrics.jsonl has no metrics yet; expected a run that"),
        ('{"kind": "chu\n{}\n', r"run/metrics.jsonl, line 1, begins with '{\"kind\": \"chu'; expected the"),
        (b"\xff\n", r"run/metrics.jsonl cannot be read: 'utf-8' codec"),
        (None, r"run/metrics.jsonl has no metrics yet"),
    ],
)
def test_metrics_that_cannot_be_read_are_named(tmp_path, metrics, message, capsys):
    folder = write_run(tmp_path / "run", (0.5,))
    write_run(tmp_path / "good", (0.5,))
    (folder / METRICS).unlink()
    if metrics is not None:
        (folder / METRICS).write_bytes(metrics if isinstance(metrics, bytes) else metrics.encode())
    with pytest.raises(UsageError, match=message):
        report("good", "run")
    assert capsys.readouterr().out == ""


def test_a_folder_without_a_run_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UsageError, match=r"empty is not the folder of a run: it has no config.json, and no runs seed-0"
    ):
        report("empty")
    with pytest.raises(UsageError, match="There are no runs to report"):
        report()
    (write_run(tmp_path / "run", (0.5,)) / "config.json").write_text("[")
    with pytest.raises(UsageError, match=r"run/config.json is not the config of a run"):
        report("run")


def test_a_picture_that_cannot_be_written_is_an_error(tmp_path):
    write_run(tmp_path / "run", (0.5,))
    with pytest.raises(UsageError, match=r"The picture nowhere/a.png cannot be written: No such file or directory"):
        report("run", "--output", "nowhere/a.png")


def test_curves_are_the_metrics_by_step_and_by_epoch(tmp_path):
    with_validation = History.read(write_run(tmp_path / "a", (0.5, 0.75), (0.25, 0.5)))
    without = History.read(write_run(tmp_path / "b", (0.9375, 1)))
    losses, errors = learning_curves_figure({"a": [with_validation.curves()], "b": [without.curves()]}).axes
    chunks, epochs, *_ = (line.get_xydata().tolist() for line in losses.lines)
    assert chunks == [[2, 9 / 2], [4, 9 / 4], [6, 9 / 6], [8, 9 / 8]]
    assert epochs == [[2, 10], [6, 5]]  # in the middle of the four steps of each
    assert losses.get_yscale() == "log"
    drawn = [(line.get_linestyle(), line.get_xydata().tolist()) for line in errors.lines]
    assert drawn == [
        ("--", [[1, 75], [2, 50]]),
        ("-", [[1, 50], [2, 25]]),
        ("--", []),
        ("-", [[1, 6.25], [2, 0]]),
    ]
    assert errors.get_yscale() == "symlog"  # as there is an error of zero
    assert errors.get_legend() is not None
    (legend,) = losses.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
