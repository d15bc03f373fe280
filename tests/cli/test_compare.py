"""The comparison of routings: fair, resumable, and the same as separate runs."""

import csv
import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from capsnet_jax import CapsNet
from capsnet_jax.capsules import Routed
from capsnet_jax.cli import compare
from capsnet_jax.cli.main import main
from capsnet_jax.cli.train import prepare
from capsnet_jax.config import Config, DataConfig, ModelConfig, TrainingConfig
from capsnet_jax.figures import comparison_figure
from capsnet_jax.ops import capsule_norm
from capsnet_jax.routing import ROUTINGS, uniform
from capsnet_jax.runs.comparison import read_results
from capsnet_jax.runs.folder import Run
from capsnet_jax.runs.metrics import MetricsLog
from capsnet_jax.train.evaluation import coupling_entropy
from capsnet_jax.train.loop import Trainer
from tests.conftest import IMAGE_SHAPE, make_small_dataset, write_idx_folder
from tests.conftest import SMALL as SMALL_MODEL
from tests.tiny_run import SMALL, contents

FILES = ["comparison.csv", "comparison.md", "comparison.png", "config.json", "results.jsonl"]
RUN_FILES = ["config.json", "metrics.jsonl", "model.safetensors"]
AUGMENT = ("shift=0.2",)
CONFIG = Config(
    ModelConfig(**SMALL_MODEL), DataConfig(augment=AUGMENT), TrainingConfig(epochs=2, batch_size=8, learning_rate=0.003)
)


def hard(votes, activations):
    """Each input capsule votes for one output only; the others get nothing."""
    num_inputs, num_outputs, _ = votes.shape
    couplings = jax.nn.one_hot(jnp.arange(num_inputs) % num_outputs, num_outputs)
    poses = jnp.einsum("io,ioh->oh", couplings, votes)
    return Routed(poses, capsule_norm(poses), couplings)


def also_uniform(votes, activations):
    return uniform(votes, activations)


def diverging(votes, activations):
    routed = uniform(votes, activations)
    return routed._replace(activations=routed.activations * jnp.inf)


def raising(votes, activations):
    raise RuntimeError("out of order")


def routing_of(trainer: Trainer) -> str:
    return trainer.models()[0].capsule_layers[-1].routing.name


HARD, ALSO_UNIFORM, DIVERGING = (f"tests.cli.test_compare:{name}" for name in ("hard", "also_uniform", "diverging"))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    return write_idx_folder(tmp_path_factory.mktemp("data") / "idx", make_small_dataset())


def run(data_dir: Path, output: Path, *more: str) -> int:
    """Three seeds for three epochs, with steps so long that the last epoch is not the best one, and no decoder."""
    options = ["--dataset", "mnist", "--data-dir", str(data_dir), *SMALL, "--epochs", "3", "--learning-rate", "0.2"]
    options += ["--decoder-hidden", "None", "--reconstruction-weight", "0"]
    routings = ["--routings", "uniform", HARD, ALSO_UNIFORM]
    return main(["compare", *options, "--seeds", "3", *routings, "--output", str(output), *more])


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory) -> Path:
    """A finished comparison that was never interrupted."""
    output = tmp_path_factory.mktemp("whole") / "comparison"
    assert run(data_dir, output) == 0
    return output


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "comparison.csv").open() as file:
        return list(csv.DictReader(file))


def without_speed(folder: Path) -> list:
    """The content of a folder, without speeds."""
    results = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    table = [line.split("|") for line in (folder / "comparison.md").read_text().splitlines()]
    place = [heading.strip() for heading in table[0]].index("images/s")
    cells = [[cell.strip(" -") for cell in line[:place] + line[place + 1 :]] for line in table]
    return [
        [result | {"images_per_second": None} for result in results],
        [row | {"images_per_second": None} for row in rows(folder)],
        cells,
        (folder / "config.json").read_bytes(),
        (folder / "comparison.png").read_bytes(),
    ]


def weights(folder: Path) -> dict[Path, bytes]:
    """The weights of all runs, by file."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("model.safetensors")}


def test_table_and_csv_hold_the_values_of_the_results(whole):
    assert sorted(path.name for path in whole.iterdir() if path.is_file()) == FILES
    results = read_results(whole)
    assert list(results) == ["uniform", HARD, ALSO_UNIFORM]
    lines = (whole / "comparison.md").read_text().splitlines()[2:5]
    for result, row, line in zip(results.values(), rows(whole), lines, strict=True):
        assert [seed.seed for seed in result.seeds] == [0, 1, 2]
        assert np.shape([seed.test_error for seed in result.seeds]) == (3, 3)
        assert np.shape([seed.train_loss for seed in result.seeds]) == (3, 3)
        errors = [100 * seed.test_error[-1] for seed in result.seeds]
        mean = sum(errors) / 3
        deviation = (sum((error - mean) ** 2 for error in errors) / 2) ** 0.5
        assert float(row["test_error_percent"]) == pytest.approx(mean)
        assert float(row["deviation_percent"]) == pytest.approx(deviation)
        assert float(row["images_per_second"]) == result.images_per_second > 0
        assert int(row["memory_bytes"]) == result.memory_bytes > 4 * 4 * 2 * int(row["parameters"])  # weights, Adam
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0] == row["routing"] == result.routing
        assert cells[1] == f"{result.num_params:,}" == "5,300"
        assert cells[2:4] == [f"{mean:.2f}", f"{deviation:.2f}"]
        assert cells[4:6] == [f"{result.images_per_second:,.0f}", f"{result.memory_bytes / 1e6:,.0f}"]
        assert float(cells[6]) == pytest.approx(float(row["coupling_entropy"]), abs=0.005)


def test_the_error_is_the_one_of_the_last_epoch(whole):
    """The best epoch is another one for at least one of the seeds."""
    errors = read_results(whole)["uniform"].test_errors
    assert errors.min(axis=1).mean() < errors[:, -1].mean()
    assert float(rows(whole)[0]["test_error_percent"]) == pytest.approx(errors[:, -1].mean())


def test_uniform_couplings_have_an_entropy_of_1_and_hard_ones_of_0(whole):
    results = read_results(whole)
    for routing, expected in (("uniform", 1), (HARD, 0)):
        assert [seed.coupling_entropy for seed in results[routing].seeds] == pytest.approx([expected] * 3, abs=1e-6)
    entropies = coupling_entropy(jnp.array([[0.5, 0.5, 0, 0], [3, 3, 3, 3], [0, 0, 0, 0], [-1, 2, 0, 0]]))
    np.testing.assert_allclose(entropies, [0.5, 1, 1, 0], atol=1e-6)


def test_every_routing_sees_the_same_images_in_the_same_order_and_shifts(whole):
    """The same function under two names gives the same results, to the last bit."""
    results = read_results(whole)
    assert results["uniform"].seeds == results[ALSO_UNIFORM].seeds
    assert results["uniform"].seeds[0].train_loss != results["uniform"].seeds[1].train_loss


def test_seeds_start_from_the_same_weights_whatever_the_routing(small_dataset):
    alone = {seed: CapsNet(IMAGE_SHAPE, 10, **SMALL_MODEL, rngs=nnx.Rngs(seed)) for seed in (0, 1, 2)}
    for routing in ("dynamic", "em", "self_attention"):  # the last two have learned weights
        config = dataclasses.replace(CONFIG, model=ModelConfig(**SMALL_MODEL, routing=routing))
        trainer, _ = prepare(Run.of(Path("never made"), config, small_dataset), small_dataset, 3)
        trainer = trainer.with_seeds([0, 1, 2])
        params = dict(nnx.to_flat_state(trainer.snapshot.state.params))
        for seed, model in alone.items():
            for path, weight in nnx.to_flat_state(nnx.state(model, nnx.Param)):
                np.testing.assert_array_equal(params[path][...][seed], weight[...], err_msg=f"{routing} {path}")


def test_each_routing_has_runs_of_its_own(whole, capsys):
    """Other commands can read them. Their checkpoints are deleted at the end."""
    names = ["uniform", "tests.cli.test_compare-hard", "tests.cli.test_compare-also_uniform"]
    assert sorted(path.name for path in whole.iterdir() if path.is_dir()) == sorted(names)
    results = read_results(whole)
    for name, result in zip(names, results.values(), strict=True):
        assert sorted(path.name for path in (whole / name).iterdir()) == ["seed-0", "seed-1", "seed-2", "seeds.json"]
        for seed, outcome in enumerate(result.seeds):
            folder = whole / name / f"seed-{seed}"
            assert sorted(path.name for path in folder.iterdir()) == RUN_FILES
            config = json.loads((folder / "config.json").read_text())
            assert (config["model"]["routing"], config["training"]["seed"]) == (result.routing, seed)
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            epochs = [line for line in lines if line["kind"] == "epoch"]
            assert [line["loss"] for line in epochs] == outcome.train_loss
            assert [1 - line["test_accuracy"] for line in epochs] == outcome.test_error
    assert main(["evaluate", str(whole / names[1] / "seed-2"), "--trust-code"]) == 0
    error = 100 * results[HARD].seeds[2].test_error[-1]
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"on 23 images (error {error:.2f} %)")


def begun(monkeypatch) -> list[str]:
    """Record the routing of every training that starts."""
    train, trained = Trainer.run, []

    def noting(self):
        trained.append(routing_of(self))
        return train(self)

    monkeypatch.setattr(Trainer, "run", noting)
    return trained


@pytest.mark.parametrize(
    "number",
    [pytest.param(signal.SIGTERM, id="stopped"), pytest.param(None, id="crashed", marks=pytest.mark.exhaustive)],
)
def test_a_comparison_that_was_stopped_is_resumed(number, whole, data_dir, tmp_path, monkeypatch, capsys):
    """Stopped in the middle of the second routing and of a line of results. The final results are the same."""
    output = tmp_path / "comparison"
    trained, write, steps = begun(monkeypatch), MetricsLog.write, []

    def stopping(self, progress, seed):
        if (trained[-1], progress.step, seed.seed) == (HARD, 8, 0):
            if number is None:
                raise KeyboardInterrupt
            os.kill(os.getpid(), number)
        return write(self, progress, seed)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", stopping)
        assert run(data_dir, output, "--save-minutes", "0") == (130 if number is None else 143)
    assert trained == ["uniform", HARD]
    assert "To continue: the same command, with the output folder above as --output." in capsys.readouterr().err
    assert [row["routing"] for row in rows(output)] == ["uniform"]
    with (output / "results.jsonl").open("a") as file:
        file.write('{"routing": "tests.test_comp')

    def counting(self, progress, seed):
        steps.append(progress.step)
        return write(self, progress, seed)

    trained.clear()
    monkeypatch.setattr(MetricsLog, "write", counting)
    assert run(data_dir, output, "--save-minutes", "0") == 0
    assert trained == [HARD, ALSO_UNIFORM]
    done = 7 if number is None else 8
    assert f"Resuming after step {done} of 18" in capsys.readouterr().out
    assert steps[::3] == [*range(done + 1, 19), *range(1, 19)]
    without = [without_speed(folder) for folder in (output, whole)]
    for fields in without:
        fields[3] = json.loads(fields[3])
        del fields[3]["training"]["save_minutes"]
    assert without[0] == without[1]
    assert weights(output) == weights(whole)
    assert len(weights(output)) == 9

    before = contents(output)
    trained.clear()
    assert run(data_dir, output, "--save-minutes", "0", "--routings", "uniform", "--seeds-at-once", "1") == 0
    assert trained == []
    assert contents(output) == before
    assert "uniform (1 of 1): done before" in capsys.readouterr().out


def test_one_seed_at_a_time_has_the_same_results_and_runs(whole, data_dir, tmp_path):
    """Except for measured speed and memory, and rounding errors."""
    output = tmp_path / "comparison"
    assert run(data_dir, output, "--routings", "uniform", "--seeds-at-once", "1") == 0
    (result,) = read_results(output).values()
    expected = read_results(whole)["uniform"]
    assert (result.seeds_at_once, expected.seeds_at_once) == (1, 3)
    assert result.memory_bytes < expected.memory_bytes
    assert result.test_errors.shape == expected.test_errors.shape
    for seed, expected_seed in zip(result.seeds, expected.seeds, strict=True):
        np.testing.assert_allclose(seed.train_loss[0], expected_seed.train_loss[0], rtol=1e-3)


def test_a_comparison_by_version_0_1_0_is_resumed(whole, data_dir, tmp_path, monkeypatch):
    """It has results only, and no runs."""
    output = tmp_path / "comparison"
    output.mkdir()
    for name in FILES:
        shutil.copy(whole / name, output)
    lines = (output / "results.jsonl").read_text().splitlines(keepends=True)
    (output / "results.jsonl").write_text("".join(lines[:2]))
    trained = begun(monkeypatch)
    assert run(data_dir, output, "--routings", HARD, ALSO_UNIFORM) == 0
    assert trained == [ALSO_UNIFORM]
    assert list(read_results(output)) == ["uniform", HARD, ALSO_UNIFORM]
    assert [path.name for path in output.iterdir() if path.is_dir()] == ["tests.cli.test_compare-also_uniform"]


def test_a_folder_of_another_comparison_is_refused_and_left_alone(whole, data_dir, tmp_path, capsys):
    before = contents(whole)
    assert run(data_dir, whole, "--seeds", "2", "--learning-rate", "0.5") == 2
    error = capsys.readouterr().err
    assert "learning_rate was 0.2 and is 0.5; seeds was 3 and is 2; expected a new --output" in error
    assert error.count("\n") == 1
    assert contents(whole) == before
    broken = shutil.copytree(whole, tmp_path / "broken")
    (broken / "results.jsonl").write_text("{}\n")
    assert run(data_dir, broken) == 2
    assert "holds no comparison that can be read" in capsys.readouterr().err


def test_a_routing_that_diverges_does_not_stop_the_others(data_dir, tmp_path, capsys):
    """From a single seed, which has the folder of the routing for itself."""
    options = ["--seeds", "1", "--epochs", "1", "--routings", DIVERGING, "uniform"]
    assert run(data_dir, tmp_path / "out", *options) == 0
    assert sorted(path.name for path in (tmp_path / "out" / "uniform").iterdir()) == RUN_FILES
    results = read_results(tmp_path / "out")
    assert [result.status for result in results.values()] == ["diverged at step 1", "ok"]
    assert results[DIVERGING].seeds == []
    assert list((tmp_path / "out").rglob("checkpoints")) == []
    diverged, uniform = rows(tmp_path / "out")
    assert diverged["test_error_percent"] == diverged["coupling_entropy"] == ""
    assert uniform["test_error_percent"] != ""
    last = capsys.readouterr().out.splitlines()[-2:]
    assert [cell.strip() for cell in last[0].split("|")][1:4] == [DIVERGING, "5,300", "diverged at step 1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--routings", "uniform", "tests.cli.test_compare:raising"), "raises RuntimeError: out of order"),
        (("--batch-size", "51"), "batch_size is 51, with only 50 training images"),
        (("--primary-kernel", "8"), "9 x 11 are too small"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_wrong_option_is_one_sentence_before_any_work(options, message, data_dir, tmp_path, monkeypatch, capsys):
    """See also `test_user_mistakes.py`."""
    monkeypatch.setattr(Trainer, "run", None)
    assert run(data_dir, tmp_path / "out", *options) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert list(tmp_path.iterdir()) == []


def test_all_is_every_registered_routing_once():
    assert compare.expand(["all"]) == list(ROUTINGS)
    assert compare.expand([HARD, "em", "all"]) == [HARD, "em", *(name for name in ROUTINGS if name != "em")]


def test_the_figure_has_the_best_routing_on_top_and_all_epochs():
    errors = {"a": np.array([[9.0, 6], [7, 4]]), "b": np.array([[3.0, 2], [3, 4]]), "c": np.array([[8.0, 8], [8, 8]])}
    figure = comparison_figure(errors, {"d": "diverged at step 7"})
    last, over_epochs = figure.axes
    assert [label.get_text() for label in last.get_yticklabels()] == ["c", "a", "b"]
    lines = {line.get_label(): line for line in over_epochs.lines}
    np.testing.assert_array_equal(lines["a"].get_xydata(), [[1, 8], [2, 5]])
    bars = {row: container for row, container in enumerate(last.containers)}
    np.testing.assert_array_equal(bars[1].lines[0].get_xydata(), [[5, 1]])
    (segment,) = bars[1].lines[2][0].get_segments()
    np.testing.assert_allclose(segment[:, 0], [5 - 2**0.5, 5 + 2**0.5])
    assert figure.get_supxlabel() == "d: diverged at step 7"
