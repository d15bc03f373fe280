"""The lock of a run folder: one holder at a time, named in the message, and nothing stays behind."""

import os
import signal
import subprocess
import sys

import pytest
from rich.console import Console

from capsnet_jax import UsageError
from capsnet_jax.config import Config, ModelConfig
from capsnet_jax.runs.folder import Run, SeedFolders
from capsnet_jax.runs.lock import LOCK, locked
from capsnet_jax.runs.session import train_runs
from capsnet_jax.train.loop import Trainer

fcntl = pytest.importorskip("fcntl", reason="there are no such locks on Windows")


def test_a_second_holder_is_refused_and_told_who_the_first_is(tmp_path):
    with locked(tmp_path), pytest.raises(UsageError, match=f"in use by process {os.getpid()} on "), locked(tmp_path):
        raise AssertionError("two hold the lock")
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path):
        pass


def test_the_lock_of_a_holder_that_ends_meanwhile_is_not_taken_for_the_new_one(tmp_path, monkeypatch):
    """It removes its file between that the next one opens and locks it; a third one would find no file."""
    flock, ended = fcntl.flock, []

    def flock_after_the_end(file, operation):
        if not ended:
            ended.append((tmp_path / LOCK).unlink())
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock_after_the_end)
    with locked(tmp_path), pytest.raises(UsageError, match=f"in use by process {os.getpid()} on "), locked(tmp_path):
        raise AssertionError("two hold the lock")
    assert list(tmp_path.iterdir()) == []


def test_an_error_releases_it(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path):
        pass


def test_a_killed_process_leaves_no_lock_behind(tmp_path):
    program = "import sys, time; from pathlib import Path; from capsnet_jax.runs.lock import locked\n"
    program += "with locked(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match=f"in use by process {holder.pid} on "), locked(tmp_path):
            raise AssertionError("two hold the lock")
        holder.send_signal(signal.SIGKILL)
    with locked(tmp_path):
        pass


def test_training_in_a_locked_folder_is_refused_and_changes_nothing(tmp_path):
    run = Run(tmp_path, Config(ModelConfig((8, 8, 1), 3)), ("a", "b", "c"))
    folders = SeedFolders(run, [0, 1])
    with locked(tmp_path), pytest.raises(UsageError, match="is in use by process"):
        next(train_runs(Trainer.__new__(Trainer), folders, console=Console()))
    assert list(tmp_path.iterdir()) == []
