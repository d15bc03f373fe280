"""Plans: the description of a GPU, the summary of a program, its tables, and the script; without XLA for GPUs."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from capsnet_benchmark import plan
from capsnet_benchmark.flops import training_flops
from capsnet_benchmark.hlo import Kernel
from capsnet_benchmark.jax_work import random_trainer
from capsnet_jax.errors import UsageError
from capsnet_jax.presets import PRESETS

ROOT = Path(__file__).parents[2]
SMALL_PROGRAM = Path(__file__).with_name("small_program.hlo")
GPU = plan.Gpu("made up", "", bytes_per_second=1e9, flops_per_second={"f32": 4e12, "bf16": 8e12})


def kernel(**fields) -> Kernel:
    return Kernel(**{"name": "k", "kind": "fusion", "operations": [], "launches": 1, "dtype": "", **fields})


def test_a_bound_is_the_larger_of_memory_and_products():
    assert GPU.seconds(kernel(bytes=3000, flops=0)) == pytest.approx(3e-6)
    assert GPU.seconds(kernel(bytes=3000, flops=4_000_000, dtype="f32")) == pytest.approx(3e-6)
    assert GPU.seconds(kernel(bytes=3000, flops=40_000_000, dtype="f32")) == pytest.approx(1e-5)
    assert GPU.seconds(kernel(bytes=3000, flops=40_000_000, dtype="bf16")) == pytest.approx(5e-6)
    with pytest.raises(UsageError, match="k multiplies f64; expected flops_per_second for it, not only f32, bf16"):
        GPU.seconds(kernel(bytes=0, flops=1, dtype="f64"))


@pytest.mark.parametrize(("name", "bandwidth"), [("h100", 3.35e12), ("h200", 4.8e12)])
def test_the_gpus_have_their_public_figures(name, bandwidth):
    gpu = plan.read_gpu(name)
    assert gpu.name.startswith(f"NVIDIA {name.upper()}")
    assert gpu.bytes_per_second == pytest.approx(bandwidth, rel=1e-3)
    assert gpu.flops_per_second == {"bf16": 989.4e12, "f16": 989.4e12, "f32": 494.7e12}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("h99", "The GPU is 'h99'; expected h100, h200 or a file like "),
        (lambda text: text[:40], "does not describe a GPU (KeyError"),
        (lambda text: f"{text} =", "does not describe a GPU (TOMLDecodeError"),
        (
            lambda text: text.replace("memory_bandwidth", "bandwidth"),
            "(ValueError: target_config has no memory_bandwidth)",
        ),
        (
            lambda text: text.replace("  threads_per_warp: 32\n", ""),
            "(ValueError: target_config has no threads_per_warp)",
        ),
        (lambda text: text.replace("core_count: 132", "core_count: 0"), "(ValueError: core_count is not positive)"),
        (lambda text: text.replace("core_count: 132", "core_count: -1"), "(ValueError: core_count is not positive)"),
        (lambda text: text.replace("3352320000000", "fast"), "does not describe a GPU (ValueError"),
        (lambda text: text.replace("989.4e12", "'fast'"), "does not describe a GPU (ValueError"),
        (lambda text: text.replace("494.7e12", "-1"), "(ValueError: flops_per_second is not positive)"),
        (lambda text: text.replace("494.7e12", "nan"), "(ValueError: flops_per_second is not positive)"),
        (lambda text: text.replace("[flops_per_second]", "[[flops_per_second]]"), "does not describe a GPU (Attribute"),
    ],
)
def test_a_wrong_description_of_a_gpu_is_refused(wrong, message, tmp_path):
    name = wrong
    if callable(wrong):
        name = str(tmp_path / "mine.toml")
        Path(name).write_text(wrong((plan.GPUS / "h100.toml").read_text()))
    with pytest.raises(UsageError) as error:
        plan.read_gpu(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_description_in_another_file_is_read(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text((plan.GPUS / "h100.toml").read_text().replace("3352320000000", "7").replace("1.98", "0.5"))
    assert plan.read_gpu(str(path)).bytes_per_second == 7


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (NotImplementedError("topology not implemented for cuda"), "XLA for NVIDIA GPUs is not installed: pip install"),
        (
            jax.errors.JaxRuntimeError("Failed to parse\nit"),
            "XLA does not accept the target_config of made up (JaxRuntim",
        ),
    ],
)
def test_a_missing_compiler_or_one_that_refuses_the_gpu_is_told(error, message, monkeypatch):
    def fail(**options):
        raise error

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", fail)
    with pytest.raises(UsageError) as told:
        plan.compile_chunk(PRESETS["digits"], GPU, 3)
    assert str(told.value).startswith(message)
    with pytest.raises(UsageError, match="steps is 1, and must be at least 2"):
        plan.compile_chunk(PRESETS["digits"], GPU, 1)


def test_training_compiles_for_the_devices_of_the_gpu_and_chooses_as_on_one(monkeypatch):
    made = {}

    def trainer(new_model, dataset, config, **options):
        made.update(options, dataset=dataset, model=nnx.eval_shape(lambda: new_model(0)))
        made["backend"] = jax.default_backend()
        return SimpleNamespace(compiled=lambda steps: f"{steps} steps")

    monkeypatch.setattr(
        "jax.experimental.topologies.get_topology_desc", lambda **options: SimpleNamespace(devices=[options])
    )
    monkeypatch.setattr(plan, "Trainer", trainer)
    _, compiled = plan.compile_chunk(PRESETS["em"], GPU, 3)
    assert compiled == "3 steps"
    assert made["devices"] == [{"platform": "cuda", "target_config": GPU.target_config, "topology": "1x1x1"}]
    assert (made["backend"], made["stream"], made["augment"]) == ("gpu", False, PRESETS["em"].data.augment)
    assert jax.default_backend() != "gpu"
    assert (made["dataset"].train_images.shape, made["dataset"].num_classes) == ((60000, 32, 32, 2), 5)
    assert made["dataset"].train_images.strides == (0, 0, 0, 0)  # a single number in memory


def test_a_training_step_names_its_parts():
    config = PRESETS["digits"]
    training = dataclasses.replace(config.training, precision="bfloat16", batch_size=5)
    model = dataclasses.replace(config.model, routing_implementation="votes")
    config = dataclasses.replace(config, model=model, training=training)
    trainer = random_trainer(config, 10, 5, augment=("shift=0.1",))
    text = trainer._train_chunk.lower(*trainer._arguments(2)).as_text(debug_info=True)
    assert {plan.part_of([path]) for path in re.findall(r'loc\("([^"]*)"', text)} == {*plan.PARTS, "other"}


def test_the_innermost_part_of_the_first_path_that_names_one_counts():
    assert plan.part_of(["jit(f)/transpose(jvp(losses))/routing/votes/mul", "optimizer"]) == "votes"
    assert plan.part_of(["jit(f)/while/body/add", "x/jvp(stem)/y", "decoder"]) == "stem"
    assert plan.part_of(["jit(my_stem)/add"]) == plan.part_of([]) == "other"


@pytest.fixture(scope="module")
def summary():
    """The summary of the small program, as if it were a training step of the preset `digits`."""
    config = PRESETS["digits"]
    images = np.broadcast_to(np.uint8(0), (40, 7, 9, 32))
    analysis = {"peak_memory_in_bytes": 900_000, "temp_size_in_bytes": 300_000, "alias_size_in_bytes": 60}
    compiled = SimpleNamespace(
        as_text=SMALL_PROGRAM.read_text,
        memory_analysis=lambda: SimpleNamespace(**analysis),
        in_avals=(([jax.ShapeDtypeStruct((3, 5), np.float32)], images), {}),
    )
    trainer = SimpleNamespace(dataset=SimpleNamespace(train_images=images), steps_per_epoch=11)
    return plan.summarize(config, GPU, 7, trainer, compiled)


def test_a_summary_adds_the_kernels_of_each_part(summary):
    batch, features, matrix, weights = 4 * 8 * 7 * 9 * 32, 4 * 8 * 2 * 3 * 48, 4 * 288 * 24, 4 * 5 * 5 * 32 * 48
    stem = summary["parts"]["stem"]
    assert stem["kernels"] == 3
    assert stem["flops"] == 2 * (2 * 8 * 2 * 3 * 48 * 5 * 5 * 32)
    assert stem["bytes"] == 2 * (batch + weights + features) + 2 * batch + 4 * 8 + 4
    assert stem["seconds"] == pytest.approx(stem["bytes"] / 1e9)
    routing = summary["parts"]["routing"]
    assert (routing["kernels"], routing["bytes"]) == (6, 3 * (2 * matrix + 8))
    flops = training_flops(PRESETS["digits"].model)
    needed = {part: numbers["needed_flops"] for part, numbers in summary["parts"].items() if numbers["needed_flops"]}
    assert needed == {part: PRESETS["digits"].training.batch_size * number for part, number in flops.items()}
    convolutions = needed["stem"] + needed["primary_capsules"]
    assert summary["convolution_flops"] == pytest.approx(stem["flops"] / convolutions)


def test_a_summary_has_the_total_the_memory_and_what_should_not_be_there(summary):
    kernels = summary["kernels"]
    assert summary["total"]["kernels"] == sum(kernel["launches"] for kernel in kernels) == 19
    for name in ("flops", "bytes", "seconds"):
        assert summary["total"][name] == pytest.approx(sum(each["launches"] * each[name] for each in kernels))
    sizes = {"peak": 900_000, "temporary": 300_000, "aliased": 60, "state": 4 * 3 * 5, "images": 40 * 7 * 9 * 32}
    assert summary["memory"] == sizes
    assert (summary["dilated"], summary["host"], summary["steps_per_epoch"]) == (["cudnn-conv.2"], [], 11)


DESCRIPTION = {"preset": "digits", "batch_size": 32, "precision": "float32", "device": "made up"}


def test_a_description_shows_parts_memory_bounds_and_the_longest_kernels(summary):
    text = plan.describe(DESCRIPTION | summary, largest=2)
    table, sentences, bounds, longest = text.split("\n\n")
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in table.splitlines()}
    assert rows["part"] == ["kernels", "GFLOP", "needed", "MB", "bound us"]
    assert list(rows) == ["part", "-" * 16, *summary_names(summary), "total"]
    assert rows["stem"] == ["3", "0.0", "0.0", "0.6", "583.7"]
    assert "all of it written in place" in sentences
    assert "with zeros between the elements of an operand: cudnn-conv.2." in sentences
    assert "Exchanges with the host in a chunk of steps: none." in sentences
    assert "bounds, not measurements" in bounds
    assert [line.split("|")[1].strip() for line in longest.splitlines()[2:]] == [
        "input_subtract_transpose_fusion",
        "copy.21",
    ]


def summary_names(summary) -> list[str]:
    return [part.replace("_", " ") for part in (*plan.PARTS, "other") if part in summary["parts"]]


def test_two_plans_are_shown_side_by_side(summary):
    parts = {part: numbers for part, numbers in summary["parts"].items() if part != "decoder"}
    memory = summary["memory"] | {"aliased": 59}
    before = DESCRIPTION | summary | {"precision": "bfloat16", "parts": parts, "memory": memory}
    table, old, new, _ = plan.describe(DESCRIPTION | summary, before).split("\n\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert rows[0][:5] == ["part", "kernels before", "kernels", "GFLOP before", "GFLOP"]
    (decoder,) = (row for row in rows if row[0] == "decoder")
    assert decoder[1:3] == ["-", "2"]
    assert "bfloat16" in old
    assert "state 0 MB, 0 MB written in place" in old
    assert "float32" in new


MEASURED = {
    "preset": "digits",
    "batch_size": 32,
    "precision": "float32",
    "device": "a real one",
    "median_seconds": {
        "jax": {"step": 3e-3, "primary": 2.1e-3, "routing": 1.05e-3, "augmentation": 1e-6, "gemm": 5e-3},
        "torch-eager": {},
    },
}


BOUNDS = DESCRIPTION | {
    "parts": {part: {"seconds": number * 1e-4} for number, part in enumerate(plan.PARTS)},  # augmentation: 0
    "total": {"seconds": 2e-3},
    "steps_per_epoch": 11,
}


def test_bounds_are_shown_beside_measured_times():
    epoch = MEASURED | {"device": "another", "median_seconds": {"jax": {"epoch": 0.5}}}
    text = plan.describe_measured(BOUNDS, [MEASURED, epoch])
    assert text.startswith("Planned for made up, measured on a real one, another:\n\n")
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    assert header == ["part", "bound us", "measured us", "measured / bound"]
    assert rows == [
        ["primary", "200.0", "2,100.0", "10.50"],
        ["routing", "700.0", "1,050.0", "1.50"],  # with its votes
        ["step", "2,000.0", "3,000.0", "1.50"],
        ["epoch", "22,000.0", "500,000.0", "22.73"],
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "bfloat16"}, "The measured precision is bfloat16; expected float32, as in the plan."),
        ({"median_seconds": {"jax": {"gemm": 1.0}}}, "No time was measured of stem, primary, votes"),
    ],
)
def test_other_measurements_are_refused(change, message):
    with pytest.raises(UsageError, match=message):
        plan.describe_measured(BOUNDS, [MEASURED | change])


@pytest.fixture
def script(monkeypatch):
    """The script as a module; it sets a variable of the environment and changes the path."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import gpu_plan

    return gpu_plan


def test_the_script_writes_what_it_shows_later_beside_another_plan(script, summary, monkeypatch, tmp_path, capsys):
    planned = []

    def compile_chunk(config, gpu, steps):
        planned.append((config.training.batch_size, config.training.precision, config.model.routing, gpu.name, steps))
        return None, SimpleNamespace(as_text=lambda: "the program")

    monkeypatch.setattr(script, "compile_chunk", compile_chunk)
    monkeypatch.setattr(script, "summarize", lambda *arguments: summary)
    files = ["--json", str(tmp_path / "plan.json"), "--hlo", str(tmp_path / "plan.hlo")]
    script.main(["--preset", "digits", "--batch-size", "7", "--gpu", "h200", "--steps", "4", *files])
    assert (tmp_path / "plan.hlo").read_text() == "the program"
    written = json.loads((tmp_path / "plan.json").read_text())
    assert (written["preset"], written["device"], written["total"]) == ("digits", "NVIDIA H200", summary["total"])
    capsys.readouterr()
    script.main(["--routing", "uniform", "--precision", "float32", "--against", files[1]])
    assert "kernels before" in capsys.readouterr().out
    results = MEASURED | {"batch_size": 7, "precision": "bfloat16"}
    (tmp_path / "measured.json").write_text(json.dumps(results))
    script.main(["--preset", "digits", "--batch-size", "7", "--measured", str(tmp_path / "measured.json")])
    assert "measured / bound" in capsys.readouterr().out
    del planned[2]
    assert planned == [
        (7, "bfloat16", "dynamic", "NVIDIA H200", 4),
        (256, "float32", "uniform", "NVIDIA H100 80GB HBM3", 10),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "huge"], "Unknown preset 'huge'; expected readable"),
        (["--gpu", "h99"], "The GPU is 'h99'; expected h100, h200 or a file like "),
        (["--steps", "1"], "steps is 1, and must be at least 2"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--json", "no/such/folder.json"], "The file is no/such/folder.json; expected one in a folder that exists"),
        (["--hlo", "."], "The file is .; expected one in a folder"),
        (["--against", __file__], f"{__file__} is not a plan; expected a file that --json has written."),
        (["--measured", __file__], f"{__file__} has no times of JAX; expected a file of capsnet benchmark --json."),
    ],
)
def test_the_script_tells_what_is_wrong_in_a_sentence(arguments, message, script, capsys):
    with pytest.raises(SystemExit) as exit:
        script.main(arguments)
    assert exit.value.code == 2
    assert f"error: {message}" in capsys.readouterr().err
