"""The benchmark without PyTorch: counts of operations, timing, worker processes and results."""

import os
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from capsnet_benchmark import worker
from capsnet_benchmark.flops import forward_flops, training_flops
from capsnet_benchmark.measurements import Samples, measure
from capsnet_benchmark.processes import Worker, WorkerError, start_workers
from capsnet_benchmark.results import describe, origin, summarize
from capsnet_benchmark.worker import WARM_UP, Timer
from capsnet_jax.config import ModelConfig
from capsnet_jax.errors import UsageError


@pytest.fixture
def fake_worker():
    """Starts workers of `fake_work`, and stops them at the end."""
    workers = []

    def start(row: str, **arguments) -> Worker:
        workers.append(Worker(row, "tests.benchmark.fake_work", {"name": row} | arguments))
        workers[-1].wait_until_ready()
        return workers[-1]

    yield start
    for started in workers:
        started.stop()


def test_flops_of_the_reference_model():
    stem, primary, votes = 2 * 20**2 * 9**2 * 256, 2 * 6**2 * 9**2 * 256**2, 2 * 1152 * 8 * 10 * 16
    decoder = [2 * 160 * 512, 2 * 512 * 1024, 2 * 1024 * 784]
    flops = {"stem": [stem], "primary_capsules": [primary], "votes": [votes], "decoder": decoder}
    assert forward_flops(ModelConfig()) == flops
    training = {"stem": 2 * stem, "primary_capsules": 3 * primary, "votes": 3 * votes, "decoder": 3 * sum(decoder)}
    assert training_flops(ModelConfig()) == training


@pytest.mark.parametrize("shared", [False, True])
def test_flops_of_every_kind_of_layer(shared):
    config = ModelConfig(
        image_shape=(13, 12, 2),
        num_classes=9,
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
        class_dim=4,
        decoder_hidden=(6, 8),
    )
    # Images of 13 x 12, then grids of 12 x 11, 5 x 5, 4 x 4 and 3 x 3; poses are matrices of 2 x 2.
    convolutions = [12 * 11 * (2 * 2 * 2) * 3, 5 * 5 * (3 * 3 * 3) * 12, 4 * 4 * (2 * 2) * 12]
    conv_capsules, decoder = 3 * 3 * (2 * 2 * 3) * 5 * 2**3, [9 * 4 * 6, 6 * 8, 8 * 13 * 12 * 2]
    if shared:
        capsules = [conv_capsules, (3 * 3 * 5) * 9 * 2**3]
        config = replace(config, shared_class_transform=True)
    else:
        capsules = [conv_capsules, (3 * 3 * 5) * 7 * 2**3, 7 * 9 * 2**3]
        config = replace(config, hidden_capsules=((7, 4),))
    *stem, primary = convolutions
    expected = {"stem": stem, "primary_capsules": [primary], "votes": capsules, "decoder": decoder}
    assert forward_flops(config) == {part: [2 * number for number in numbers] for part, numbers in expected.items()}
    # The lowest convolution needs no gradient of the images.
    assert training_flops(config)["stem"] == 2 * (2 * stem[0] + 3 * stem[1])


@pytest.fixture
def clock(monkeypatch):
    """A clock that runs only when `take(seconds)` is called."""
    now = SimpleNamespace(seconds=0.0)

    def take(seconds: float) -> None:
        now.seconds += seconds

    monkeypatch.setattr(worker.time, "perf_counter", lambda: now.seconds)
    return SimpleNamespace(take=take, now=now)


def timer(calls, block=lambda result: None, warmed_up=lambda: None) -> Timer:
    return Timer(SimpleNamespace(prepare=lambda name: calls, block=block, warmed_up=warmed_up))


def test_a_sample_lasts_until_the_result_is_there_except_for_dispatch(clock):
    calls = [(lambda: clock.take(0.25), 1)]
    waiting = timer(calls, block=lambda result: clock.take(4))
    assert (waiting.prepare("step"), waiting.sample()) == (4.25, 4.25)
    assert (waiting.prepare("dispatch"), waiting.sample()) == (0.25, 0.25)


def test_short_calls_are_repeated_and_their_mean_counts(clock):
    short = timer([(lambda: clock.take(1 / 64), 1)])
    assert short.prepare("step") == 1 / 64
    assert clock.now.seconds == (1 + WARM_UP) / 64
    assert short.sample() == 1 / 64
    assert clock.now.seconds == (1 + WARM_UP + 4) / 64  # four calls are the first to reach 50 ms
    short.prepare("dispatch")
    before = clock.now.seconds
    short.sample()
    assert clock.now.seconds == before + 1 / 64


def test_a_sample_is_a_weighted_sum_of_calls(clock):
    weighted = timer([(lambda: clock.take(0.25), 4), (lambda: clock.take(2), 0.5)])
    assert weighted.prepare("epoch") == 2.25
    assert weighted.sample() == 4 * 0.25 + 0.5 * 2


def test_rows_take_turns_and_memory_is_read_after_the_steps(fake_worker, tmp_path):
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
        assert all(len(seconds) == 3 and min(seconds) > 0 for seconds in samples.seconds[row].values())


def test_peak_memory_without_a_gpu_excludes_the_parent_process(fake_worker):
    ballast = np.ones(2**26)  # half a gigabyte
    peak = fake_worker("other").ask("peak_memory")
    assert 2**22 < peak < 2**28 < ballast.nbytes


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("error", "jax failed while measuring step: RuntimeError: No working compiler."),
        ("end", "The process of jax exited with status 3 while measuring step; its last line was: Out of luck."),
        ("kill", "The process of jax was killed by SIGKILL while measuring step; its last line was: This is not"),
    ],
)
def test_errors_and_deaths_of_a_process_are_reported(trouble, message, fake_worker):
    with pytest.raises(WorkerError) as error:
        list(measure([fake_worker("jax", trouble={"step": trouble})], ["step"], rounds=1))
    assert str(error.value).startswith(message)


def test_a_row_that_may_fail_is_left_out_and_named(fake_worker, capsys):
    workers = [fake_worker("jax"), fake_worker("torch-compile", trouble={"routing": "error"})]
    *_, samples = measure(workers, ["step", "routing", "votes"], rounds=1, may_fail=["torch-compile"])
    reason = "torch-compile failed while measuring routing: RuntimeError: No working compiler."
    assert samples.left_out == {"torch-compile": reason}
    assert {row: list(seconds) for row, seconds in samples.seconds.items()} == {
        "jax": ["step", "routing", "votes"],
        "torch-compile": ["step"],
    }
    assert f"torch-compile is left out from here on. {reason}\n" in capsys.readouterr().err


def test_rows_on_different_devices_are_refused_and_stopped(monkeypatch):
    stopped = []

    def fake(row: str, module: str, arguments: dict) -> SimpleNamespace:
        stop = lambda: stopped.append(row)  # noqa: E731
        return SimpleNamespace(row=row, wait_until_ready=lambda: None, stop=stop, **arguments)

    monkeypatch.setattr("capsnet_benchmark.processes.Worker", fake)
    on_cpu, on_gpu = {"platform": "cpu", "device": "cpu"}, {"platform": "gpu", "device": "A GPU"}
    with start_workers({"jax": ("m", on_gpu), "torch-eager": ("m", on_gpu)}) as workers:
        assert [each.row for each in workers] == ["jax", "torch-eager"]
    assert stopped == ["jax", "torch-eager"]
    with (
        pytest.raises(UsageError, match="jax on cpu, torch-eager on A GPU; expected"),
        start_workers({"jax": ("m", on_cpu), "torch-eager": ("m", on_gpu)}),
    ):
        pytest.fail("They are on different devices.")
    assert stopped == ["jax", "torch-eager"] * 2


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
    peak_memory={"jax": 600_000_000, "torch-eager": 800_000_000, "torch-compile": None},
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
    assert results["peak_memory_bytes"] == SAMPLES.peak_memory
    assert results["extrapolated"] == ["epoch"]
    assert results["left_out"] == {"torch-compile": "It failed."}
    assert results["samples_seconds"] == SAMPLES.seconds
    assert summarize(SAMPLES, batch_size=50, flops_per_image=1, platform="gpu")["extrapolated"] == []


def test_the_printed_tables_and_sentences():
    results = summarize(SAMPLES, batch_size=50, flops_per_image=10**9, platform="cpu")
    printed = describe(results | {"precision": "float32", "load_before": 1.25})
    rows, parts, sentences = printed.split("\n\n")
    assert [[cell.strip() for cell in line.strip("|").split("|")][:6] for line in rows.splitlines()[2:]] == [
        ["jax", "3.00", "500", "450 to 4,750", "100", "60.0"],
        ["torch-eager", "2.00", "1,000", "1,000 to 4,000", "50.0", "240"],
        ["torch-compile", "30.0", "800", "750 to 850", "62.5", "-"],
    ]
    assert [[cell.strip() for cell in line.strip("|").split("|")][6:] for line in rows.splitlines()[:3:2]] == [
        ["inference ms", "routing ms", "dispatch ms", "memory MB", "of the limit"],
        ["-", "-", "-", "600", "0.116"],
    ]
    assert parts.splitlines() == [
        "| part, ms | jax | torch-eager | torch-compile |",
        "| -------- | --: | ----------: | ------------: |",
        "| step     | 500 |       1,000 |           800 |",
    ]
    assert sentences.splitlines() == [
        "A training step of JAX takes 0.50 of the time of torch-eager.",
        "A training step of JAX takes 0.62 of the time of torch-compile.",
        "An epoch of JAX takes 0.25 of the time of torch-eager.",
        "Training by JAX takes 0.75 of the memory of torch-eager.",
        "The limit, by a large product of matrices in float32: 859 GFLOP/s.",
        "The epoch is extrapolated from steps and batches.",
        "The machine was busy before the run (load 1.2); times and ratios mean little.",
        "torch-compile was left out: It failed.",
    ]


def test_origin_of_results():
    told = origin(["jax"], "cpu")
    assert told["versions"]["jax"] == jax.__version__
    assert "torch" not in told["versions"]
    assert told["cores"] == len(os.sched_getaffinity(0))
    assert told["device"]
    assert origin(["jax"], "A GPU")["device"] == "A GPU"
