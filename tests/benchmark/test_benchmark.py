"""The benchmark: what it counts, who takes turns when, what it tells, and what it refuses. All without torch."""

import os
from dataclasses import replace

import jax
import numpy as np
import pytest

from capsnet_benchmark import worker
from capsnet_benchmark.flops import forward_flops, training_flops
from capsnet_benchmark.measurements import Samples, measure
from capsnet_benchmark.processes import Worker, WorkerError
from capsnet_benchmark.results import origin, summarize
from capsnet_benchmark.worker import WARM_UP, Stopwatch
from capsnet_jax.config import ModelConfig

pytestmark = pytest.mark.slow  # many start processes, and none depends on the version of Python


@pytest.fixture
def fake_worker():
    """Starts workers of fake_work, and sees to it that they end."""
    workers = []

    def start(row: str, **arguments) -> Worker:
        workers.append(Worker(row, "tests.benchmark.fake_work", {"name": row} | arguments))
        workers[-1].introduction()
        return workers[-1]

    yield start
    for started in workers:
        started.stop()


def test_operations_of_the_reference_model():
    flops = forward_flops(ModelConfig())
    stem, primary, votes = 20**2 * 9**2 * 256, 6**2 * 9**2 * 256**2, 1152 * 8 * 10 * 16
    decoder = [160 * 512, 512 * 1024, 1024 * 784]
    assert flops == [2 * number for number in (stem, primary, votes, *decoder)]
    assert training_flops(ModelConfig()) == 3 * sum(flops) - flops[0]


def test_operations_of_layers_of_every_kind():
    """Counted vote by vote and pixel by pixel."""
    config = ModelConfig(
        stem_below=((3, 2),),
        stem_channels=12,
        stem_kernel=3,
        stem_stride=2,
        primary_groups=3,
        primary_dim=4,
        primary_kernel=2,
        primary_stride=1,
        primary_depthwise=True,
        conv_capsules=((5, 4, 2, 1),),
        matrix_poses=True,
        hidden_capsules=((7, 4),),
        class_dim=4,
        decoder_hidden=(6, 8),
    )
    # Images of 13 x 12, then grids of 12 x 11, 5 x 5, 4 x 4 and 3 x 3; poses are matrices of 2 x 2.
    expected = [
        12 * 11 * (2 * 2 * 2) * 3,
        5 * 5 * (3 * 3 * 3) * 12,
        4 * 4 * (2 * 2) * 12,
        3 * 3 * (2 * 2 * 3) * 5 * 2**3,
        (3 * 3 * 5) * 7 * 2**3,
        7 * 9 * 2**3,
        9 * 4 * 6,
        6 * 8,
        8 * 13 * 12 * 2,
    ]
    assert forward_flops(replace(config, image_shape=(13, 12, 2), num_classes=9)) == [2 * number for number in expected]


def test_a_stopwatch_waits_for_results_but_for_the_time_of_the_host(monkeypatch):
    clock = 0.0

    def take(seconds: float) -> None:
        nonlocal clock
        clock += seconds

    monkeypatch.setattr(worker.time, "perf_counter", lambda: clock)
    waiting = Stopwatch(lambda: take(0.25), lambda _: take(4))
    assert waiting.warm_up() == 4.25
    assert waiting.seconds() == 4.25
    host = Stopwatch(lambda: take(0.25), lambda _: take(4), host_only=True)
    assert (host.warm_up(), host.seconds()) == (0.25, 0.25)
    calls = clock
    short = Stopwatch(lambda: take(1 / 64), lambda _: None)
    assert short.warm_up() == 1 / 64
    assert clock == calls + (1 + WARM_UP) / 64
    assert short.seconds() == 1 / 64
    assert clock == calls + (1 + WARM_UP + 4) / 64  # 50 ms is more than three calls


def test_rows_take_turns_and_memory_is_read_after_steps_alone(fake_worker, tmp_path):
    log = tmp_path / "log"
    workers = [fake_worker(row, log=str(log)) for row in ("jax", "torch-eager")]
    *_, samples = measure(workers, ["step", "routing"], rounds=3)
    calls = log.read_text().splitlines()
    warm_up = [f"{row} step" for row in ("jax", "torch-eager") for _ in range(1 + WARM_UP)]
    memory = ["jax memory", "torch-eager memory"]
    of_step = [*warm_up, *(["jax step", "torch-eager step"] * 3), *memory]
    assert calls[: len(of_step)] == of_step
    assert calls[len(of_step) :] == [line.replace("step", "routing") for line in of_step if not line.endswith("memory")]
    assert samples.peak_memory == {"jax": 300, "torch-eager": 400}
    for row in ("jax", "torch-eager"):
        assert list(samples.seconds[row]) == list(samples.first_seconds[row]) == ["step", "routing"]
        assert all(len(seconds) == 3 and min(seconds) > 0.06 for seconds in samples.seconds[row].values())


def test_a_sample_counts_each_call_as_often_as_it_is_to_be(fake_worker):
    *_, samples = measure([fake_worker("jax")], ["epoch"], rounds=2)
    assert all(20 * 0.06 < seconds < 20 * 0.1 for seconds in samples.seconds["jax"]["epoch"])
    assert samples.first_seconds["jax"]["epoch"] < 1


def test_memory_without_a_gpu_is_that_of_the_process_itself(fake_worker):
    ballast = np.ones(2**26)  # half a gigabyte here must not count there
    peak = fake_worker("other").peak_memory()
    assert peak is not None
    assert 2**22 < peak < 2**28 < ballast.nbytes


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("error", "jax failed at measuring step: RuntimeError: No working compiler."),
        ("end", "The process of jax ended with status 3 at measuring step; its last line was: Out of luck."),
        ("kill", "The process of jax was ended by SIGKILL at measuring step; its last line was: This is not a reply."),
    ],
)
def test_what_goes_wrong_in_a_process_is_told_in_a_sentence(trouble, message, fake_worker):
    with pytest.raises(WorkerError) as error:
        list(measure([fake_worker("jax", trouble={"step": trouble})], ["step"], rounds=1))
    assert str(error.value) == message


def test_a_row_that_may_fail_is_left_out_and_named(fake_worker, capsys):
    workers = [fake_worker("jax"), fake_worker("torch-compile", trouble={"routing": "error"})]
    *_, samples = measure(workers, ["step", "routing", "votes"], rounds=1, may_fail=["torch-compile"])
    reason = "torch-compile failed at measuring routing: RuntimeError: No working compiler."
    assert samples.left_out == {"torch-compile": reason}
    assert {row: list(seconds) for row, seconds in samples.seconds.items()} == {
        "jax": ["step", "routing", "votes"],
        "torch-compile": ["step"],
    }
    assert f"torch-compile is left out from here on. {reason}\n" in capsys.readouterr().err


SAMPLES = Samples(
    seconds={
        "jax": {"step": [0.5, 9.0, 0.4], "gemm": [0.03, 0.02, 0.02], "epoch": [60.0, 50.0, 70.0]},
        "torch-eager": {"step": [1.0, 1.0, 7.0], "gemm": [0.05, 0.04, 0.04], "epoch": [240.0, 240.0, 240.0]},
        "torch-compile": {"step": [0.8, 0.7, 0.9]},
    },
    first_seconds={
        "jax": {"step": 3.0, "gemm": 1.0, "epoch": 2.0},
        "torch-eager": {"step": 2.0, "gemm": 1.0},
        "torch-compile": {"step": 30.0},
    },
    peak_memory={"jax": 600, "torch-eager": 800, "torch-compile": None},
    left_out={"torch-compile": "It failed."},
)


def test_results_against_values_by_hand():
    results = summarize(SAMPLES, batch_size=50, flops_per_image=10**9, platform="cpu")
    assert results["median_seconds"]["jax"] == {"step": 0.5, "gemm": 0.02, "epoch": 60.0}
    assert results["ratios"] == pytest.approx(
        {
            "step_vs_eager": 0.5,
            "gemm_vs_eager": 0.5,
            "epoch_vs_eager": 0.25,
            "memory_vs_eager": 0.75,
            "step_vs_compile": 0.625,
        }
    )
    assert results["first_step_seconds"] == {"jax": 3.0, "torch-eager": 2.0, "torch-compile": 30.0}
    assert results["images_per_second"] == pytest.approx({"jax": 100, "torch-eager": 50, "torch-compile": 62.5})
    limit = 2 * 2048**3 / 0.02
    assert results["limit_flops_per_second"] == pytest.approx(limit)
    assert results["fraction_of_limit"]["jax"] == pytest.approx(50 * 10**9 / 0.5 / limit)
    assert results["fraction_of_limit"]["torch-compile"] == pytest.approx(50 * 10**9 / 0.8 / limit)
    assert results["extrapolated"] == ["epoch"]
    assert results["left_out"] == {"torch-compile": "It failed."}
    assert results["samples_seconds"] == SAMPLES.seconds
    assert summarize(SAMPLES, batch_size=50, flops_per_image=1, platform="gpu")["extrapolated"] == []


def test_where_results_come_from():
    told = origin(["jax"], "cpu")
    assert told["versions"]["jax"] == jax.__version__
    assert "torch" not in told["versions"]
    assert told["cores"] == len(os.sched_getaffinity(0))
    assert told["device"]
    assert origin(["jax"], "A GPU")["device"] == "A GPU"
