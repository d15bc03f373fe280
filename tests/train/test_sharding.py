"""Training on one device, on several, and in two processes: equal in float64 to the last digits."""

import functools
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from capsnet_jax import UsageError
from capsnet_jax.cli.main import main
from capsnet_jax.train import sharding
from tests.train.sharded_run import train

ROOT = Path(__file__).parents[2]
OPTIONS = """
    --stem-channels 6 --stem-kernel 3 --primary-groups 2 --primary-dim 4 --primary-kernel 3 --class-dim 5
    --routing uniform --decoder-hidden None --reconstruction-weight 0 --batch-size 8
""".split()  # noqa: SIM905
pytestmark = pytest.mark.slow


def environment(num_devices: int) -> dict[str, str]:
    # With the flags of this process, programs that do not depend on the number of devices are found in its cache.
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={num_devices}"
    cache = {"JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir)}
    cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    settings = {"XLA_FLAGS": flags, "JAX_ENABLE_X64": "true", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return os.environ | settings | cache


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def in_processes(commands: list[list[str]], num_devices: int, *, status: int = 0) -> list[str]:
    """Run the commands side by side, check that each exits with this status, and return their outputs."""
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            env=environment(num_devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands
    ]
    outputs = [process.communicate(timeout=500)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == status, output
    return outputs


def results_of(output: Path, variant: str, num_devices: int, num_processes: int) -> dict[str, np.ndarray]:
    script, port = str(ROOT / "tests" / "train" / "sharded_run.py"), free_port()
    joined = [[f"127.0.0.1:{port}", str(num_processes), str(number)] for number in range(num_processes)]
    commands = [[script, str(output), variant, *(arguments if num_processes > 1 else [])] for arguments in joined]
    in_processes(commands, num_devices)
    with np.load(output) as results:
        return dict(results)


@functools.cache
def alone(variant: str) -> dict[str, np.ndarray]:
    with jax.enable_x64(True):
        return train(variant)


@pytest.mark.parametrize(
    ("variant", "num_devices", "num_processes"),
    [
        ("all options", 2, 2),
        *(
            pytest.param(variant, *numbers, marks=pytest.mark.exhaustive)
            for variant, *numbers in (("plain", 2, 2), ("plain", 8, 1), ("plain", 1, 2))
        ),
        *(pytest.param("all options", *numbers, marks=pytest.mark.exhaustive) for numbers in ((8, 1), (1, 2))),
    ],
)
def test_training_does_not_depend_on_the_number_of_devices_and_processes(variant, num_devices, num_processes, tmp_path):
    expected = alone(variant)  # before the others, which then need not compile everything
    shared = results_of(tmp_path / "results.npz", variant, num_devices, num_processes)
    assert shared.pop("devices") == num_devices * num_processes
    assert expected.keys() == shared.keys()
    errors = {name: np.abs(shared[name] - array).max() / np.abs(array).max() for name, array in expected.items()}
    losses, weights = (
        max(errors[name] for name in errors if (name == "losses") == is_loss) for is_loss in (True, False)
    )
    print(f"\nlosses are off by at most {losses:.1e}, weights by {weights:.1e}")  # quoted in docs/scaling.md
    assert {name: error for name, error in errors.items() if not error <= 1e-12} == {}
    first, last = expected["losses"][[0, -1], 0, 0]
    assert last < first


def test_a_number_of_devices_that_does_not_divide_a_batch_raises(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sharding.jax, "devices", lambda: [jax.local_devices()[0]] * 6)
    with pytest.raises(UsageError, match="accumulate is 32, and must be a multiple of the 6 devices"):
        sharding.data_mesh(32)
    assert main(["train", "--run-dir", str(tmp_path / "run")]) == 2
    assert "batch_size / accumulate is 32, and must be a multiple of the 6 devices" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.exhaustive
def test_a_distributed_run_writes_one_run_folder(idx_folder, tmp_path):
    """Two processes of the command, resumed by two more."""

    def run(epochs: int, *more: str, status: int = 0) -> list[str]:
        data = ["--dataset", "mnist", "--data-dir", str(idx_folder), "--run-dir", str(tmp_path / "run")]
        program = "import sys; from capsnet_jax.cli.main import main; sys.exit(main())"
        joined = ["--distributed", "--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2"]
        options = ["train", *data, *OPTIONS, "--epochs", str(epochs), *joined, *more]
        commands = [["-c", program, *options, "--process-id", number] for number in "01"]
        return in_processes(commands, num_devices=1, status=status)

    primary, other = run(1)
    assert "epoch 1/1  step 6 " in primary
    assert "epoch" not in other
    primary, other = run(2, "--resume")
    assert "Resuming after step 6 of 12" in primary
    assert "epoch" not in other
    for output in run(3, status=2):  # none of them waits for another
        assert "already holds a run; give a new one, or --resume" in output
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 14
    assert main(["evaluate", str(tmp_path / "run")]) == 0
