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

import jax
import pytest

from capsnet_jax.cli.main import main
from capsnet_jax.runs.metrics import MetricsLog
from tests.conftest import make_small_dataset, write_idx_folder
from tests.tiny_run import metrics, options_of

OPTIONS = ["--save-minutes", "0", "--validation", "0.2", "--ema-decay", "0.9", "--batch-norm"]
OPTIONS += ["--augment", "shift=0.2", "--routing", "uniform"]  # the routing is quick to compile
EPOCHS = 6  # of five steps


def arguments(data: Path, run_dir: Path, *more: str) -> list[str]:
    return options_of(data, run_dir, *OPTIONS, "--resume", *more)


def start(command: list[str]) -> subprocess.Popen:
    """Start the command in a separate process, which reads compiled programs of this one, and writes none."""
    variables = {"JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir)}
    variables |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000"}
    python = [sys.executable, "-c", "import sys; from capsnet_jax.cli.main import main; sys.exit(main())"]
    return subprocess.Popen(
        [*python, *command],
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


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_idx_folder(tmp_path_factory.mktemp("data") / "idx", make_small_dataset())


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """A run that is not stopped, with a checkpoint after each step."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert main(arguments(data, folder, "--epochs", str(EPOCHS))) == 0
    return folder


def assert_same_runs(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other)
    for name in ("model.safetensors", "best.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def kill_and_resume(kills: int, epochs: int, command: list[str], killed: Path, capsys) -> None:
    """Kill a run several times, mostly while it saves, and train it to the end in this process."""
    chance = random.Random(kills)
    inside_saves = 0
    for kill in range(kills):
        before = whole_checkpoints(killed)
        process = start(command)
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
    assert main(command) == 0
    assert f"Resuming after step {last} of {5 * epochs}" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_and_resumed_is_the_same_to_the_last_bit(data, alone, tmp_path, capsys):
    killed = tmp_path / "killed"
    kill_and_resume(1, EPOCHS, arguments(data, killed, "--epochs", str(EPOCHS)), killed, capsys)
    assert_same_runs(killed, alone)
    assert whole_checkpoints(killed) == whole_checkpoints(alone)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_killed_twenty_times_is_the_same_to_the_last_bit(data, tmp_path, capsys):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    options = ("--epochs", "60", "--routing", "dynamic")
    assert main(arguments(data, alone, *options)) == 0
    kill_and_resume(20, 60, arguments(data, killed, *options), killed, capsys)
    assert_same_runs(killed, alone)
    assert whole_checkpoints(killed) == whole_checkpoints(alone)


def test_a_signal_to_stop_saves_and_prints_how_to_resume(data, alone, tmp_path, monkeypatch, capsys):
    """Training sends itself one signal and, resumed, another one, at steps that would otherwise have no checkpoint."""
    stopped, write = tmp_path / "stopped", MetricsLog.write
    resume = ["train", "--resume", "--run-dir", str(stopped)]
    commands = (
        (signal.SIGTERM, 143, 7, arguments(data, stopped, "--epochs", str(EPOCHS), "--save-minutes", "60")),
        (signal.SIGINT, 130, 13, resume),
    )
    for number, status, step, command in commands:
        before = signal.getsignal(number)

        def signalling(self, progress, seed, *, number=number, step=step):
            if progress.step == step:
                os.kill(os.getpid(), number)
            return write(self, progress, seed)

        with monkeypatch.context() as patch:
            patch.setattr(MetricsLog, "write", signalling)
            assert main(command) == status
        expected = (
            f"Stopped by {number.name} after step {step}. To continue: capsnet train --resume --run-dir {stopped}"
        )
        assert expected in capsys.readouterr().err
        assert whole_checkpoints(stopped)[-1] == step
        assert signal.getsignal(number) == before
    assert main(resume) == 0
    assert "Resuming after step 13 of 30" in capsys.readouterr().out
    assert_same_runs(stopped, alone)


def test_resuming_a_finished_run_prints_its_result_again(tiny_run, tmp_path, capsys):
    run = shutil.copytree(tiny_run.folder, tmp_path / "run")
    before = metrics(run)
    assert main(["train", "--resume", "--run-dir", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == tiny_run.lines[-1]
    assert metrics(run) == before
