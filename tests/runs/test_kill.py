"""A training run that is killed at any moment and resumed equals an uninterrupted run, to the last bit."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from capsnet_jax.cli.main import main
from capsnet_jax.runs.metrics import MetricsLog
from tests.conftest import make_small_dataset, write_idx_folder
from tests.tiny_run import metrics, options_of

OPTIONS = ["--save-minutes", "0", "--validation", "0.2", "--ema-decay", "0.9", "--batch-norm"]


def arguments(data: Path, run_dir: Path) -> list[str]:
    return options_of(data, run_dir, *OPTIONS, "--resume")


def start(data: Path, run_dir: Path, cache: Path, epochs: int) -> subprocess.Popen:
    """Start the command in a separate process; compiled programs are cached, because it is started many times."""
    variables = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-c", "import sys; from capsnet_jax.cli.main import main; sys.exit(main())"]
    return subprocess.Popen(
        [*command, *arguments(data, run_dir), "--epochs", str(epochs)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | variables | {"JAX_PLATFORMS": "cpu"},
    )


def whole_checkpoints(run_dir: Path) -> list[int]:
    """List the steps of checkpoints that have their final names."""
    return sorted(int(path.name) for path in (run_dir / "checkpoints").glob("*") if path.name.isdigit())


def being_saved(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob("*-tmp*"))


def wait_until(process: subprocess.Popen, condition) -> None:
    deadline = time.monotonic() + 300
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize(
    ("kills", "epochs"),
    [
        pytest.param(1, 6, marks=pytest.mark.slow),
        pytest.param(20, 60, marks=[pytest.mark.slow, pytest.mark.exhaustive]),
    ],
)
def test_killed_and_resumed_is_the_same_to_the_last_bit(kills, epochs, idx_folder, tmp_path, capsys):
    """Epochs of 5 steps, with a checkpoint after each step."""
    data, alone, killed, cache = idx_folder, *(tmp_path / name for name in ("alone", "killed", "cache"))
    assert main([*arguments(data, alone), "--epochs", str(epochs)]) == 0

    chance = random.Random(kills)
    inside_saves = 0
    for kill in range(kills):
        before = whole_checkpoints(killed)
        process = start(data, killed, cache, epochs)
        wait_until(process, lambda before=before: whole_checkpoints(killed) not in ([], before))
        time.sleep(chance.uniform(0, 0.2))
        if kill % 2 == 0:
            wait_until(process, lambda: being_saved(killed))
        process.send_signal(signal.SIGKILL)
        output = process.communicate()[0]
        assert process.returncode == -signal.SIGKILL, f"it finished before kill {kill}: {output}"
        inside_saves += being_saved(killed)
        # Nothing is lost but what came after the last complete checkpoint.
        started = re.search(r"Resuming after step (\d+)", output)
        assert (int(started[1]) if started else 0) == max(before, default=0)
        assert max(whole_checkpoints(killed)) > max(before, default=0)
    assert inside_saves >= kills // 4

    capsys.readouterr()
    last = max(whole_checkpoints(killed))
    assert main([*arguments(data, killed), "--epochs", str(epochs)]) == 0
    assert f"Resuming after step {last} of {5 * epochs}" in capsys.readouterr().out
    assert (killed / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
    assert (killed / "best.safetensors").read_bytes() == (alone / "best.safetensors").read_bytes()
    assert metrics(killed) == metrics(alone)
    assert whole_checkpoints(killed) == whole_checkpoints(alone)


TWO_EPOCHS = ["--epochs", "2", "--save-minutes", "60"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of two epochs of five steps that is not stopped, and the folder of its data."""
    here = tmp_path_factory.mktemp("alone")
    data = write_idx_folder(here / "idx", make_small_dataset())
    assert main([*arguments(data, here / "run"), *TWO_EPOCHS]) == 0
    return here / "run", data


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_stop_saves_and_prints_how_to_resume(number, status, alone, tmp_path, monkeypatch, capsys):
    """Training sends the signal to itself, at a step that would otherwise have no checkpoint."""
    before = signal.getsignal(number)
    uninterrupted, data = alone
    write = MetricsLog.write

    def signalling(self, progress, seed):
        if progress.step == 7:
            os.kill(os.getpid(), number)
        return write(self, progress, seed)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", signalling)
        assert main([*arguments(data, tmp_path / "stopped"), *TWO_EPOCHS]) == status
    expected = (
        f"Stopped by {number.name} after step 7. To continue: capsnet train --resume --run-dir {tmp_path}/stopped"
    )
    assert expected in capsys.readouterr().err
    assert whole_checkpoints(tmp_path / "stopped")[-1] == 7
    assert main(["train", "--resume", "--run-dir", str(tmp_path / "stopped")]) == 0
    assert "Resuming after step 7 of 10" in capsys.readouterr().out
    assert metrics(tmp_path / "stopped") == metrics(uninterrupted)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (uninterrupted, tmp_path / "stopped")]
    assert weights[0] == weights[1]
    assert signal.getsignal(number) == before


def test_resuming_a_finished_run_prints_its_result_again(tiny_run, tmp_path, capsys):
    run = shutil.copytree(tiny_run.folder, tmp_path / "run")
    before = metrics(run)
    assert main(["train", "--resume", "--run-dir", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == tiny_run.lines[-1]
    assert metrics(run) == before
