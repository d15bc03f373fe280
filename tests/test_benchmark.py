"""The benchmark: what it counts, who takes turns when, what it tells, and what it refuses. All without torch."""

import json
import os
import signal
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from capsnet_jax.benchmark import command, worker
from capsnet_jax.benchmark.command import Benchmark
from capsnet_jax.benchmark.flops import forward_flops, training_flops
from capsnet_jax.benchmark.jax_gradient import forward_and_backward, random_like
from capsnet_jax.benchmark.jax_work import Work
from capsnet_jax.benchmark.measurements import MEASUREMENTS, Samples, measure
from capsnet_jax.benchmark.processes import Worker, WorkerError
from capsnet_jax.benchmark.results import origin, summarize
from capsnet_jax.benchmark.worker import WARM_UP, Stopwatch
from capsnet_jax.cli import main
from capsnet_jax.config import Config, ModelConfig, TrainingConfig
from capsnet_jax.errors import UsageError

pytestmark = pytest.mark.slow  # many start processes, and none depends on the version of Python

FAKE_WORK = '''
"""Work that writes down when it is called, and can go wrong."""

import os
import sys
import time


class Work:
    platform, device = "cpu", "cpu"

    def __init__(self, name="fake", log=os.devnull, trouble=(), seconds=0.06, **others):
        self.name, self.log, self.trouble, self.length = name, log, trouble, seconds

    def prepare(self, name):
        print("This is not a reply.")
        if name in self.trouble:
            getattr(self, self.trouble[name])()
        return [(lambda: self.call(name), 1)] if name != "epoch" else [(lambda: self.call(name), 10)] * 2

    def call(self, name):
        time.sleep(self.length)
        with open(self.log, "a") as file:
            print(self.name, name, file=file)

    def block(self, result):
        pass

    def warmed_up(self):
        pass

    def peak_device_memory(self):
        self.call("memory")
        return {"jax": 300, "torch-eager": 400, "torch-compile": 1200}.get(self.name)  # others have no device

    def error(self):
        raise RuntimeError("\\nNo working compiler.\\nMore of it.")

    def end(self):
        print("Out of luck.\\n", file=sys.stderr, flush=True)
        os._exit(3)

    def kill(self):
        os.kill(os.getpid(), 9)
'''


@pytest.fixture
def fake_worker(tmp_path, monkeypatch):
    """Starts workers of FAKE_WORK, and sees to it that they end."""
    (tmp_path / "fake_work.py").write_text(FAKE_WORK)
    monkeypatch.syspath_prepend(tmp_path)
    workers = []

    def start(row: str, **arguments) -> Worker:
        workers.append(Worker(row, "fake_work", {"name": row} | arguments))
        workers[-1].introduction()
        return workers[-1]

    yield start
    for started in workers:
        started.stop()


def test_operations_of_the_reference_model():
    flops = forward_flops(ModelConfig(), (28, 28, 1), 10)
    stem, primary, votes = 20**2 * 9**2 * 256, 6**2 * 9**2 * 256**2, 1152 * 8 * 10 * 16
    decoder = [160 * 512, 512 * 1024, 1024 * 784]
    assert flops == [2 * number for number in (stem, primary, votes, *decoder)]
    assert training_flops(ModelConfig(), (28, 28, 1), 10) == 3 * sum(flops) - flops[0]


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
    assert forward_flops(config, (13, 12, 2), 9) == [2 * number for number in expected]


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


@pytest.fixture
def fake_rows(tmp_path, monkeypatch):
    """All rows are those of FAKE_WORK, called in tiny sizes."""
    (tmp_path / "fake_work.py").write_text(FAKE_WORK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(command, "WORK", dict.fromkeys(command.ROWS, "fake_work"))
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(command, "origin", lambda rows, device: origin(["jax"], device))


def test_the_command_prints_tables_and_sentences_and_writes_them(fake_rows, tmp_path, monkeypatch, capsys):
    path = tmp_path / "result.json"
    monkeypatch.setattr(command.os, "getloadavg", lambda: (1.25, 0.0, 0.0))
    assert main(["benchmark", "--rounds", "2", "--measure", "gemm", "step", "--json", str(path)]) == 0
    printed = capsys.readouterr()
    results = json.loads(path.read_text())
    assert list(results["median_seconds"]["jax"]) == ["step", "gemm"]  # memory is read after steps alone
    assert results["ratios"]["step_vs_eager"] == pytest.approx(1, abs=0.3)
    measured = ("step", "gemm", "memory")
    assert results["ratios"].keys() == {f"{name}_vs_{row}" for name in measured for row in ("eager", "compile")}
    memory = results["peak_memory_bytes"]
    assert results["ratios"]["memory_vs_eager"] == memory["jax"] / memory["torch-eager"]
    expected = {"preset": "readable", "image_shape": [28, 28, 1], "num_classes": 10, "batch_size": 64, "rounds": 2}
    expected |= {"precision": "float32", "rows": ["jax", "torch-eager", "torch-compile"], "compile_mode": "best"}
    assert expected.items() <= results.items()
    assert {"device", "cores", "versions", "python", "commit"} <= results.keys()
    assert results["training_flops_per_image"] == training_flops(ModelConfig(), (28, 28, 1), 10)
    median = 1e3 * results["median_seconds"]["jax"]["step"]
    row = next(line for line in printed.out.splitlines() if line.startswith("| jax "))
    assert row.split("|")[3].strip() == f"{median:.1f}"
    ratio = results["ratios"]["step_vs_compile"]
    assert f"A training step of JAX takes {ratio:.2f} of the time of torch-compile.\n" in printed.out
    assert "The machine was busy before it began, with a load of 1.2; times and ratios mean little.\n" in printed.out
    assert results["load_before"] == 1.25
    assert [line.split()[0] for line in printed.err.splitlines()] == ["step", "gemm"]


def test_what_was_measured_before_an_interruption_is_in_the_file(fake_rows, tmp_path, monkeypatch):
    def interrupted(*args, **options):
        yield next(measure(*args, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "measure", interrupted)
    path = tmp_path / "result.json"
    assert main(["benchmark", "--rounds", "2", "--measure", "step", "gemm", "--json", str(path)]) == 130
    samples = json.loads(path.read_text())["samples_seconds"]
    assert {row: list(of) for row, of in samples.items()} == {row: ["step"] for row in command.ROWS}
    assert all(len(of["step"]) == 2 for of in samples.values())


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, UsageError("no")])
def test_no_process_is_left_behind(interruption, fake_rows, monkeypatch):
    started = []

    def interrupted(workers, *args, **options):
        started.extend(workers)
        raise interruption

    monkeypatch.setattr(command, "measure", interrupted)
    assert main(["benchmark"]) in (2, 130)
    assert len(started) == 3
    assert all(process._process.returncode == -signal.SIGKILL for process in started)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--preset", "nothing"), "preset is 'nothing'; expected readable, digits"),
        (("--rows", "jax", "tf"), "rows is 'tf'; expected jax, torch-eager, torch-compile"),
        (("--rows",), "rows is empty; expected jax"),
        (("--measure", "loss"), "measure is 'loss'; expected step, inference"),
        (("--rounds", "1"), "rounds is 1, and must be at least 2"),
        (("--batch-size", "0"), "batch_size is 0, and must be at least 1"),
        (("--batch-size", "60001"), "batch_size is 60001, and must be at most 60000"),
        (("--num-classes", "1"), "num_classes is 1, and must be at least 2"),
        (("--image-shape", "28", "0", "1"), "image_shape is (28, 0, 1), and every size in it must be at least 1"),
        (("--image-shape", "16", "28", "1"), "Images of 16 x 28 are too small"),
        (("--preset", "em", "--measure", "decoder"), "measure is decoder, and the model of em has none"),
        (("--json", "nowhere/result.json"), "nowhere does not exist"),
        (("--json", "."), "json is ., which cannot be written: it is a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_option_is_one_sentence_before_any_process(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", None)
    assert main(["benchmark", "--rows", "jax", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_torch_is_asked_for_only_if_it_is_needed(monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert main(["benchmark"]) == 2
    assert 'PyTorch is not installed: pip install ".[torch]", or --rows jax.' in capsys.readouterr().err
    assert Benchmark(rows=("jax",), batch_size=7).validated_config().training.batch_size == 7


def test_rows_on_different_devices_are_refused():
    on_cpu, on_gpu = {"platform": "cpu", "device": "cpu"}, {"platform": "gpu", "device": "A GPU"}
    assert command.same_device({"jax": on_gpu, "torch-eager": on_gpu}) == ("gpu", "A GPU")
    with pytest.raises(UsageError, match="jax on cpu, torch-eager on A GPU; expected"):
        command.same_device({"jax": on_cpu, "torch-eager": on_gpu})


def test_forward_and_backward_of_a_part():
    layer = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    inputs, fixed = jnp.array([[1.0, -2.0, 0.5]]), jnp.array([0.5, 2.0, -1.0, 3.0])
    call = forward_and_backward(layer, lambda layer, x, y: layer(x) * y, (inputs,), (fixed,))
    outputs, (of_weights, (of_inputs,)) = call()
    kernel = np.asarray(layer.kernel[...])
    # The random gradient of the outputs, times what they are multiplied by.
    cotangent = np.asarray(random_like(jax.ShapeDtypeStruct((1, 4), jnp.float32)) * fixed)
    np.testing.assert_allclose(outputs, (np.asarray(inputs) @ kernel) * np.asarray(fixed), rtol=1e-5)
    np.testing.assert_allclose(of_inputs, cotangent @ kernel.T, rtol=1e-5)
    np.testing.assert_allclose(of_weights["kernel"][...], np.asarray(inputs).T @ cotangent, rtol=1e-5)
    assert cotangent.std() > 0.1


@pytest.fixture(scope="module")
def work():
    """The measurements of a tiny model."""
    model = ModelConfig(stem_channels=6, stem_kernel=3, primary_groups=2, primary_dim=4, primary_kernel=3, class_dim=5)
    return Work(
        config=Config(model=model, training=TrainingConfig(batch_size=3)).to_json(),
        image_shape=[9, 11, 1],
        num_classes=7,
        shift=0.2,
        train_images=12,
        test_images=20,
        evaluation_batch=4,
        gemm_sizes={"cpu": 16, "gpu": 16},
    )


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_every_measurement_of_the_jax_model_computes(name, work):
    calls = work.prepare(name)
    for call, _ in calls:
        first, second = call(), call()
        work.block(second)
        leaves = [leaf for leaf in jax.tree.leaves(second) if isinstance(leaf, jax.Array)]
        assert leaves or name == "epoch"
        assert all(np.isfinite(leaf).all() and np.asarray(leaf).any() for leaf in leaves if leaf.ndim > 1)
        if name in ("step", "dispatch"):
            assert first.total != second.total  # it trains
    times = [times for _, times in calls]
    assert times == ([4, 5] if name == "epoch" else [1])


def test_inference_and_routing_are_those_of_the_model(work):
    model = work._new_model()
    (inference, _), (routing, _) = *work.prepare("inference"), *work.prepare("routing")
    np.testing.assert_allclose(inference().poses, model.encode(work._images).poses, rtol=1e-5)
    layer, capsules = work._last_layer()
    routed, (of_weights, (of_poses,)) = routing()
    np.testing.assert_allclose(routed.poses, layer(capsules).poses, rtol=1e-5)
    assert capsules.poses.shape == of_poses.shape == (3, 2 * 3 * 4, 4)
    assert of_weights["weight"][...].shape == layer.weight.shape


def test_an_epoch_on_cpu_is_steps_and_batches(work):
    (train, _), (evaluate, _) = work.prepare("epoch")
    assert [train().step, train().step] == [1, 2]
    assert evaluate().num_images == 4
