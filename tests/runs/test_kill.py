"""A training that is killed at any moment and gone on with ends as one that was left alone, to the last bit."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from capsnet_jax.cli.main import main
from capsnet_jax.runs.metrics import MetricsLog
from tests.cli.test_cli import SMALL

OPTIONS = ["--save-minutes", "0", "--validation", "0.2", "--ema-decay", "0.9", "--batch-norm"]
WRITTEN = ("images_per_second", "peak_memory_bytes")  # what a run tells of the machine and not of itself


def arguments(data: Path, run_dir: Path) -> list[str]:
    data_set = ["--dataset", "mnist", "--data-dir", str(data)]
    return ["train", *data_set, *SMALL, *OPTIONS, "--resume", "--run-dir", str(run_dir)]


def start(data: Path, run_dir: Path, cache: Path, epochs: int) -> subprocess.Popen:
    """The command in a process of its own; compiled programs are kept, as it is started again and again."""
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
    """Those that have their final names."""
    return sorted(int(path.name) for path in (run_dir / "checkpoints").glob("*") if path.name.isdigit())


def being_saved(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob("*-tmp*"))


def metrics(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in WRITTEN} for line in lines]


def wait_until(process: subprocess.Popen, condition) -> None:
    deadline = time.monotonic() + 300
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize(
    ("kills", "epochs"),
    [
        pytest.param(3, 20, marks=pytest.mark.slow),
        pytest.param(20, 60, marks=[pytest.mark.slow, pytest.mark.exhaustive]),
    ],
)
def test_killed_and_gone_on_with_is_the_same_to_the_last_bit(kills, epochs, idx_folder, tmp_path):
    """Epochs of 5 steps, with a checkpoint after each."""
    data, alone, killed, cache = idx_folder, *(tmp_path / name for name in ("alone", "killed", "cache"))
    process = start(data, alone, cache, epochs)
    output = process.communicate()[0]
    assert process.returncode == 0, output

    chance = random.Random(kills)
    inside_saves = 0
    for kill in range(kills):
        before = whole_checkpoints(killed)
        process = start(data, killed, cache, epochs)
        wait_until(process, lambda before=before: whole_checkpoints(killed) not in ([], before))
        time.sleep(chance.uniform(0, 0.2))
        if kill % 2:
            wait_until(process, lambda: being_saved(killed))
        process.send_signal(signal.SIGKILL)
        output = process.communicate()[0]
        assert process.returncode == -signal.SIGKILL, f"it came to its end before kill {kill}: {output}"
        inside_saves += being_saved(killed)
        # Nothing is lost but what came after the last whole checkpoint.
        started = re.search(r"Going on after step (\d+)", output)
        assert (int(started[1]) if started else 0) == max(before, default=0)
        assert max(whole_checkpoints(killed)) > max(before, default=0)
    assert inside_saves >= kills // 4

    process = start(data, killed, cache, epochs)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert (killed / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
    assert (killed / "best.safetensors").read_bytes() == (alone / "best.safetensors").read_bytes()
    assert metrics(killed) == metrics(alone)
    assert whole_checkpoints(killed) == whole_checkpoints(alone)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_stop_saves_and_tells_how_to_go_on(number, status, idx_folder, tmp_path, monkeypatch, capsys):
    """Sent by the training itself, at a step of which there would be no checkpoint otherwise."""
    before = signal.getsignal(number)
    more = ["--epochs", "2", "--save-minutes", "60"]
    alone, stopped = ([*arguments(idx_folder, tmp_path / name), *more] for name in ("alone", "stopped"))
    assert main(alone) == 0
    write = MetricsLog.write

    def signalling(self, progress, seed):
        if progress.step == 7:
            os.kill(os.getpid(), number)
        return write(self, progress, seed)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", signalling)
        capsys.readouterr()
        assert main(stopped) == status
    expected = (
        f"Stopped by {number.name} after step 7. To go on: capsnet train --resume --run-dir {tmp_path / 'stopped'}"
    )
    assert expected in capsys.readouterr().err
    assert whole_checkpoints(tmp_path / "stopped")[-1] == 7
    assert main(["train", "--resume", "--run-dir", str(tmp_path / "stopped")]) == 0
    assert "Going on after step 7 of 10" in capsys.readouterr().out
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "alone")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("alone", "stopped")]
    assert weights[0] == weights[1]
    assert signal.getsignal(number) == before


def test_going_on_with_a_run_that_is_done_tells_its_result_again(idx_folder, tmp_path, capsys):
    command = [*arguments(idx_folder, tmp_path / "run"), "--epochs", "1"]
    assert main(command) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    before = metrics(tmp_path / "run")
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1] == last
    assert metrics(tmp_path / "run") == before
