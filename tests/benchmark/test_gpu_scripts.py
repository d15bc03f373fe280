"""The shell scripts for a GPU: their commands, time limits and exit statuses, without PyTorch."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_run import SMALL

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *arguments: object, **variables: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", BENCHMARKS / script, *map(str, arguments)],
        env=os.environ | {name: str(value) for name, value in variables.items()},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def fake_python(tmp_path):
    """In place of the interpreter: logs its arguments and runs a line of shell."""

    def write(line: str) -> Path:
        path = tmp_path / "python"
        path.write_text(f'#!/usr/bin/env bash\necho "$@" >>{tmp_path}/calls\n{line}\n')
        path.chmod(0o755)
        return path

    return write


PARTS = ["epoch", "float32", "bfloat16", "parts", "fused", "parity", "scaling", "plan"]


def test_all_parts_run_even_if_one_fails(fake_python, tmp_path):
    python = fake_python('[[ "$*" != *verify* ]] || exit 3')
    result = run("gpu.sh", tmp_path / "out", PYTHON=python)
    assert result.returncode == 1
    *_, folder = [line for line in result.stdout.splitlines() if line.startswith("===")]
    assert folder == f"=== {tmp_path / 'out'}"
    summary = [line.split(maxsplit=3) for line in result.stdout.split(folder)[1].strip().splitlines()]
    assert [line[0] for line in summary] == PARTS
    assert [line[3] for line in summary] == [*["ok"] * 5, "failed with status 3", "ok", "ok"]
    assert (tmp_path / "out" / "gpu.log").read_text() == result.stdout
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == len(PARTS)
    assert "--batch-size 256" in calls[1]
    assert f"--json {tmp_path / 'out'}/gpu-float32.json --precision float32" in calls[1]
    assert "verify --device gpu --preset readable --all-routings" in calls[5]
    measured = [f"{tmp_path / 'out'}/gpu-{name}.json" for name in ("bfloat16", "parts")]
    assert calls[7].endswith(f"--measured {' '.join(measured)}")


def test_only_named_parts_run_and_all_limits_sum_to_less_than_ten_minutes(fake_python, tmp_path):
    result = run("gpu.sh", tmp_path, "fused", "epoch", PYTHON=fake_python("true"))
    assert result.returncode == 0
    assert [line.split()[0] for line in result.stdout.splitlines()[-2:]] == ["epoch", "fused"]
    assert "--routing-implementation fused" in (tmp_path / "calls").read_text()
    lines = (BENCHMARKS / "gpu.sh").read_text().splitlines()
    limits = [int(line.split()[2]) for line in lines if re.match(r" *(part|bench) [a-z0-9]+ \d", line)]
    assert len(limits) == len(PARTS)
    assert sum(limits) + 5 * len(PARTS) < 600


@pytest.mark.parametrize(
    ("line", "limit", "status"),
    [("exit 0", 60, 0), ("exit 2", 60, 2), ("exec sleep 60", 1, 75), ("trap 'exit 143' TERM; sleep 2", 1, 75)],
)
def test_a_stopped_run_exits_with_status_75(line, limit, status, fake_python, tmp_path):
    (tmp_path / "run.seconds").write_text("700\n50\n")
    for seed in (4, 5):
        (tmp_path / "run" / f"seed-{seed}").mkdir(parents=True)
    result = run("official.sh", tmp_path / "run", "--seeds", "2", PYTHON=fake_python(line), LIMIT=limit)
    assert result.returncode == status
    *before, seconds = map(int, (tmp_path / "run.seconds").read_text().split())
    assert before == [700, 50]
    assert seconds < 50
    total = 750 + seconds
    assert result.stdout.splitlines()[-1] == f"{total} s so far, {total // 2} s per seed"
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert call.endswith(f"train.py --preset official --dataset mnist --run-dir {tmp_path / 'run'} --resume --seeds 2")


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_stopped_run_resumes_to_the_last_epoch(tmp_path):
    options = [*SMALL, "--epochs", "80", "--batch-size", "32", "--seeds", "2"]
    variables = {"PYTHON": sys.executable, "PRESET": "digits", "DATASET": "digits", "JAX_PLATFORMS": "cpu"}
    stopped = 0
    result = run("official.sh", tmp_path / "run", *options, LIMIT=30, **variables)
    while result.returncode == 75 and stopped < 60:
        stopped += 1
        result = run("official.sh", tmp_path / "run", *options, LIMIT=30, **variables)
    assert result.returncode == 0, result.stderr
    assert stopped > 0
    assert "Resuming after step" in result.stdout
    assert "from 2 seeds on 355 images" in result.stdout
    for seed in (0, 1):
        lines = (tmp_path / "run" / f"seed-{seed}" / "metrics.jsonl").read_text().splitlines()
        epochs = [json.loads(line)["epoch"] for line in lines if json.loads(line)["kind"] == "epoch"]
        assert epochs == [*range(1, 81)]
    assert len((tmp_path / "run.seconds").read_text().split()) == stopped + 1
