"""Training where the system is against it: another locale, a file limit, a closed terminal, a second process."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tiny_run import metrics, options_of

pytestmark = [pytest.mark.exhaustive, pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and limits")]
CAPSNET = [sys.executable, "-m", "capsnet_jax"]


@pytest.fixture
def start(idx_folder: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """A function that starts training in a folder; what still runs after the test is killed."""
    processes = []

    def start(run_dir: Path, *more: str, prefix: tuple[str, ...] = (), **variables: str) -> subprocess.Popen:
        # Under nohup, the tests ignore SIGHUP, and so would the process.
        before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
        processes.append(
            subprocess.Popen(
                [*prefix, *CAPSNET, *options_of(idx_folder, run_dir, *more)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=os.environ | variables,
            )
        )
        signal.signal(signal.SIGHUP, before)
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def sentence(process: subprocess.Popen) -> str:
    """The error of a command that must fail with one sentence."""
    _, error = process.communicate(timeout=300)
    assert process.returncode == 2
    assert error.startswith(b"capsnet: error: ")
    assert error.count(b"\n") == 1
    return error.decode()


def wait_for_checkpoint(run_dir: Path) -> None:
    deadline = time.monotonic() + 300
    while not any(path.name.isdigit() for path in (run_dir / "checkpoints").glob("*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_name_that_the_locale_cannot_express_is_refused_before_training(start, tmp_path):
    ascii_only = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    error = sentence(start(tmp_path / "größe", **ascii_only))
    assert "is not text in this locale; expected ASCII letters, or a UTF-8 locale" in error
    assert not (tmp_path / "größe").exists()


def test_a_limit_on_the_size_of_files_is_one_sentence(start, tmp_path):
    limited = ("bash", "-c", 'ulimit -f 4; exec "$@"', "bash")
    error = sentence(start(tmp_path / "run", prefix=limited))
    assert f"The metrics in {tmp_path / 'run'} cannot be written; fix this, then --resume: " in error
    assert "File too large" in error


def test_a_closed_terminal_saves_as_sigterm_does(start, tmp_path):
    many = ("--epochs", "400", "--save-minutes", "0")
    process = start(tmp_path / "run", *many)
    wait_for_checkpoint(tmp_path / "run")
    process.send_signal(signal.SIGHUP)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGHUP
    assert error.startswith(b"capsnet: Stopped by SIGHUP after step ")
    step = int(error.split(b"after step ")[1].split(b".")[0])
    assert metrics(tmp_path / "run")[-1]["step"] == step
    assert (tmp_path / "run/checkpoints" / str(step)).is_dir()


def test_a_second_process_in_the_folder_is_refused_and_the_first_goes_on(start, tmp_path):
    many = ("--epochs", "400", "--save-minutes", "0")
    first = start(tmp_path / "run", *many)
    wait_for_checkpoint(tmp_path / "run")
    error = sentence(start(tmp_path / "run", *many, "--resume"))
    assert f"The run folder {tmp_path / 'run'} is in use by process {first.pid} on " in error
    assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.communicate()
    resumed = start(tmp_path / "run", *many, "--resume")  # a killed process leaves no lock behind
    lines = iter(resumed.stdout.readline, b"")
    assert any(line.startswith(b"Resuming after step ") for line in lines)
    assert any(line.startswith(b"epoch ") for line in lines)  # from then on, it heeds signals
    resumed.send_signal(signal.SIGTERM)
    resumed.communicate(timeout=300)
    assert resumed.returncode == 128 + signal.SIGTERM


def test_a_reader_that_ends_is_no_error(start, tmp_path):
    script = '"$@" | head -1'
    process = start(tmp_path / "run", prefix=("bash", "-c", script, "bash"))
    output, error = process.communicate(timeout=300)
    assert output.count(b"\n") == 1
    assert error == b""
