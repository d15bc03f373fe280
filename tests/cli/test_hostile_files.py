"""Damaged and hostile files: one sentence with file, value and expectation, and no code of a stranger runs."""

import gzip
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import capsnet_jax
from capsnet_jax import UsageError
from capsnet_jax.cli.main import main
from capsnet_jax.config import Config, DataConfig, ModelConfig, TrainingConfig
from capsnet_jax.runs.folder import Run, read_run, saved_runs

pytestmark = pytest.mark.usefixtures("without_type_checks")

MODEL = ModelConfig(
    (8, 8, 1), 3, stem_channels=4, stem_kernel=3, primary_groups=2, primary_kernel=3, class_dim=4, decoder_hidden=None
)
WHOLE, NUMBER, BOOL = "expected a whole number", "expected a finite number", "expected true or false"

# Section, option, wrong value in JSON, and what the message says after "option is value".
WRONG_VALUES = [
    # Another type.
    *(("model", "num_classes", value, WHOLE) for value in ("3", 3.0, None, True, [3], {"3": 3})),
    *(("model", "stem_channels", value, WHOLE) for value in ("4", 4.5, None, False, [])),
    *(("model", "primary_groups", value, WHOLE) for value in ("2", 2.0, [2, 2])),
    *(("model", "num_iterations", value, WHOLE) for value in ("3", 1.5, None)),
    *(("model", "primary_scale", value, NUMBER) for value in ("0.01", None, True, [0.01])),
    *(("model", "batch_norm", value, BOOL) for value in (1, "true", None)),
    *(("model", "matrix_poses", value, BOOL) for value in (0, "no")),
    *(
        ("model", "image_shape", value, "expected [a whole number, a whole")
        for value in (["8", "8", "1"], [8, 8], 8, None)
    ),
    *(
        ("model", "image_shape", value, "expected [a whole number, a whole")
        for value in ([8, 8, 1, 1], [8.0, 8, 1], "881")
    ),
    *(("model", "stem_below", value, "expected [[a whole number, a whole") for value in ([4, 3], [[4]], [["4", 3]], 4)),
    *(
        ("model", "conv_capsules", value, "expected [[a whole number")
        for value in ([[4, 4, 3]], [4, 4, 3, 1], {"4": 4})
    ),
    *(("model", "hidden_capsules", value, "expected [[a whole number") for value in ([[4, 4, 4]], [4], "4")),
    *(("model", "decoder_hidden", value, "expected [a whole number, a whole") for value in ([512], 512, [1.5, 2])),
    *(("model", "routing", value, "expected text") for value in (None, 3, ["dynamic"])),
    *(("model", "primary_squash", value, "expected none, squash") for value in ("Squash", None, 0, ["none"])),
    *(("model", "initial_weights", value, "expected torch, official") for value in ("", "keras")),
    *(("data", "dataset", value, "expected text") for value in (None, 3, ["mnist"])),
    *(("data", "data_dir", value, "expected a path") for value in (3, ["mnist"])),
    *(("data", "augment", value, "expected [text, ...]") for value in ("shift=0.1", [0.1], None)),
    *(("data", "validation", value, NUMBER) for value in ("0.1", None, True)),
    *(("data", "image_size", value, "expected [a whole number, a whole") for value in (8, [8], ["8", "8"])),
    *(("data", "train_limit", value, WHOLE) for value in ("100", 1.5)),
    *(("data", "stream", value, BOOL) for value in ("yes", 1)),
    *(("training", "epochs", value, WHOLE) for value in ("10", 1.5, None, True)),
    *(("training", "batch_size", value, WHOLE) for value in ("64", 64.0, [64])),
    *(("training", "learning_rate", value, NUMBER) for value in ("1e-3", None, float("nan"), float("inf"), 10**400)),
    *(("training", "seed", value, WHOLE) for value in ("0", 0.5, None)),
    *(("training", "loss", value, "expected margin, spread") for value in ("hinge", None)),
    *(("training", "precision", value, "expected float32, bfloat16") for value in ("float16", 32)),
    # Out of range; the sizes must be refused before anything of that size is allocated or computed.
    *(("model", "num_classes", value, "must be at") for value in (0, -1, 10**7, 2**63)),
    *(("model", "stem_channels", value, "must be at") for value in (0, 10**8, 2**70)),
    *(("model", "stem_kernel", value, "must be at") for value in (0, 10**9)),
    *(("model", "primary_stride", value, "must be at") for value in (0, -2)),
    *(("model", "num_iterations", value, "must be at") for value in (0, 10**9)),
    ("model", "image_shape", [0, 8, 1], "must be of sizes of at least 1"),
    ("model", "image_shape", [100000, 100000, 1], "must be of at most 100000000 values"),
    ("model", "stem_below", [[4, 10**9]], "must be of sizes"),
    ("model", "hidden_capsules", [[10**9, 4]], "must be of sizes"),
    ("model", "decoder_hidden", [10**12, 4], "must be of sizes"),
    ("data", "image_size", [100000, 100000], "must be of at most 100000000 pixels"),
    *(("training", "seed", value, "must be at") for value in (-1, 2**32, 2**64)),
    *(("training", "epochs", value, "must be at") for value in (0, -1)),
]

# The content of config.json, and what the message says.
WRONG_FILES = [
    ("", "cannot be read"),
    ("{", "cannot be read"),
    ("[" * 100_000, "cannot be read"),
    ("[]", "It holds list; expected the options of a run"),
    ("null", "It holds NoneType; expected the options of a run"),
    ("{}", "class_names is None; expected a list of printable names"),
    (
        '{"model": {}, "seeds": 3, "device": "cpu"}',
        "It is of a comparison; expected the folder of a run in it, such as",
    ),
    ('{"class_names": "abc"}', "class_names is 'abc'; expected a list"),
    ('{"class_names": [1, 2, 3]}', "class_names is [1, 2, 3]; expected a list"),
    (
        '{"class_names": ["a", "b", "\\u001b[2J"]}',
        "class_names is ['a', 'b', '\\x1b[2J']; expected a list of printable",
    ),
    ('{"class_names": ["a", "b", "c"]}', "model is None; expected options by name"),
    ('{"class_names": ["a", "b", "c"], "model": []}', "model is []; expected options by name"),
    ('{"class_names": ["a", "b", "c"], "model": {"num_clases": 3}}', "model has the unknown option 'num_clases'"),
    ('{"class_names": ["a", "b"], "image_shape": [8, 8, 1]}', "model is None; expected options by name"),
    ('{"class_names": ["a", "b"], "image_shape": [8, 8, 1], "model": [1]}', "model is [1]; expected options by name"),
    ("\x00\x01", "cannot be read"),
    (b"\xff\xfe\x00", "cannot be read"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Run:
    """A folder of a run of a tiny model."""
    run = Run(tmp_path_factory.mktemp("hostile") / "run", Config(MODEL), ("a", "b", "c"))
    run.write_config()
    run.save_weights(run.new_model())
    return run


@pytest.fixture
def folder(trained, tmp_path, monkeypatch) -> Path:
    """A copy of its config, without weights, in a folder of the working directory."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps(trained.fields()))
    monkeypatch.chdir(tmp_path)
    return Path("run")


def error_of(arguments: list[str], capsys) -> str:
    """Run a command that must fail with one sentence; return it."""
    assert main(arguments) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("capsnet: error: ")
    assert error.count("\n") == 1
    return error


def change(folder: Path, section: str, **values: object) -> None:
    fields = json.loads((folder / "config.json").read_text())
    fields[section] |= values
    (folder / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(("section", "name", "value", "expected"), WRONG_VALUES)
def test_a_wrong_value_in_a_config_is_named_with_file_and_expectation(section, name, value, expected, folder, capsys):
    change(folder, section, **{name: value})
    error = error_of(["evaluate", "run"], capsys)
    assert error.startswith(f"capsnet: error: {folder}/config.json: {name} is ")
    assert expected in error


@pytest.mark.parametrize(("content", "expected"), WRONG_FILES, ids=range(len(WRONG_FILES)))
def test_a_damaged_config_is_named(content, expected, folder, capsys):
    (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    error = error_of(["evaluate", "run"], capsys)
    assert str(folder / "config.json") in error
    assert expected in error


def test_every_option_of_a_config_survives_the_file():
    config = Config(
        ModelConfig(
            stem_below=((4, 3),), conv_capsules=((2, 4, 3, 1),), hidden_capsules=((5, 4),), decoder_hidden=None
        ),
        DataConfig(
            data_dir=Path("/data"),
            augment=("shift=0.2", "flip"),
            image_size=(9, 7),
            transpose=True,
            train_limit=3,
            stream=True,
        ),
        TrainingConfig(learning_rate=1, clip_norm=2, seed=2**32 - 1),
    )
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


# Routings of other packages.


@pytest.fixture
def stranger(folder, monkeypatch) -> Path:
    """A run whose config names a routing of a module in the working directory, which tells when it is imported."""
    module = "routing_of_a_stranger"
    Path(f"{module}.py").write_text(
        "from pathlib import Path\n"
        "from capsnet_jax.routing import uniform\n"
        "Path('imported').touch()\n"
        "def f(votes, activations): return uniform(votes, activations)\n"
    )
    monkeypatch.syspath_prepend("")
    monkeypatch.delitem(sys.modules, module, raising=False)
    yield folder
    sys.modules.pop(module, None)


@pytest.mark.parametrize(
    "command",
    [
        "evaluate run",
        "predict run image.png",
        "export run",
        "convert run --to copy",
        "convert run/model.safetensors --to copy.safetensors",
        "verify run",
        "train --resume --run-dir run",
    ],
)
@pytest.mark.parametrize("routing", ["routing_of_a_stranger:f", "routing_of_a_stranger:f,option=1"])
def test_no_command_imports_the_routing_that_a_file_names(command, routing, stranger, trained, capsys):
    if command.startswith("verify"):
        pytest.importorskip("torch")
    change(stranger, "model", routing=routing)
    (stranger / "model.safetensors").write_bytes((trained.folder / "model.safetensors").read_bytes())
    error = error_of(command.split(), capsys)
    assert "its routing routing_of_a_stranger:f would import the module routing_of_a_stranger" in error.lower()
    assert "--trust-code" in error
    assert not Path("imported").exists()
    assert "routing_of_a_stranger" not in sys.modules


def test_python_does_not_import_it_either(stranger, trained):
    change(stranger, "model", routing="routing_of_a_stranger:f")
    (stranger / "model.safetensors").write_bytes((trained.folder / "model.safetensors").read_bytes())
    with pytest.raises(UsageError, match="trust_code=True"):
        capsnet_jax.load(stranger)
    assert not Path("imported").exists()
    assert capsnet_jax.load(stranger, trust_code=True).capsule_layers[0].routing.name == "routing_of_a_stranger:f"
    assert Path("imported").exists()


def test_with_trust_code_a_command_runs_it(stranger, trained, capsys):
    change(stranger, "model", routing="routing_of_a_stranger:f")
    (stranger / "model.safetensors").write_bytes((trained.folder / "model.safetensors").read_bytes())
    assert main(["convert", "run", "--to", "copy.safetensors", "--trust-code"]) == 0
    assert "copy.safetensors" in capsys.readouterr().out


def test_a_routing_given_on_the_command_line_may_be_resumed(stranger):
    change(stranger, "model", routing="routing_of_a_stranger:f")
    run, _ = saved_runs(stranger, trust_code=True)
    assert run.config.model.routing == "routing_of_a_stranger:f"
    assert not Path("imported").exists()


def test_modules_of_the_working_directory_do_not_replace_installed_ones(folder, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["--version"]) == 0
    assert main(["report", "nothing"]) == 2
    assert sys.path[-1] == ""


# Sizes that do not fit into memory.


def test_a_model_larger_than_memory_is_refused_before_it_is_created(folder, capsys):
    change(folder, "model", stem_channels=1_000_000, primary_groups=1000, stem_kernel=3)
    error = error_of(["evaluate", "run"], capsys)
    assert "The weights of this model take" in error
    assert "expected smaller sizes" in error


# Files of weights, images and data.

WEIGHTS = [
    (b"", "not a safetensors file"),
    (b"\xff" * 8 + b"{}", "not a safetensors file"),
    (b"\x02\0\0\0\0\0\0\0{}", "lack"),
    (safetensors.numpy.save({"a": np.zeros(2, np.int8)}), "lack"),
    (b"\x80\x04cposix\nsystem\n(X\x04\0\0\0touctR.", "not a safetensors file"),  # a pickle
]


@pytest.mark.parametrize(("content", "expected"), WEIGHTS, ids=range(len(WEIGHTS)))
def test_damaged_weights_are_named(content, expected, folder, capsys):
    (folder / "model.safetensors").write_bytes(content)
    error = error_of(["evaluate", "run"], capsys)
    assert "run/model.safetensors" in error
    assert expected in error


def idx(shape: tuple[int, ...], *, kind: int = 8, size: int | None = None) -> bytes:
    """The bytes of an idx file of zeros."""
    values = bytes(int(np.prod(shape)) if size is None else size)
    return bytes((0, 0, kind, len(shape))) + b"".join(n.to_bytes(4, "big") for n in shape) + values


IDX = [
    (b"", "is empty"),
    (idx((6, 8, 8))[:3], "begins with 000008"),
    (idx((6, 8, 8))[:9], "ends in its header, after 9 bytes; expected 16"),
    (idx((6, 8, 8), kind=13), "begins with 00000d03"),
    (idx((6, 8)), "begins with 00000802"),
    (idx((6, 8, 8), size=383), "has 383 values; its header says 384"),
    (idx((6, 8, 8), size=385), "has more than 384 values"),
    (idx((2**32 - 1,) * 3, size=9), "expected at most"),
]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(("content", "expected"), IDX, ids=range(len(IDX)))
def test_damaged_idx_files_are_named(content, expected, compressed, folder, capsys):
    suffix = ".gz" if compressed else ""
    for name in ("train", "t10k"):
        Path(f"{name}-images-idx3-ubyte").write_bytes(idx((6, 8, 8)))
        Path(f"{name}-labels-idx1-ubyte").write_bytes(idx((6,)))
    path = Path(f"train-images-idx3-ubyte{suffix}")
    path.write_bytes(gzip.compress(content) if compressed else content)
    error = error_of(["train", "--dataset", "mnist", "--data-dir", ".", "--run-dir", "new"], capsys)
    assert str(path) in error
    assert expected in error
    assert not Path("new").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"\x1f\x8b", gzip.compress(idx((6, 8, 8)))[:-9], b"text"],
    ids=["empty", "magic", "truncated", "text"],
)
def test_truncated_gzip_files_are_named(content, folder, capsys):
    for name in ("train", "t10k"):
        Path(f"{name}-images-idx3-ubyte").write_bytes(idx((6, 8, 8)))
        Path(f"{name}-labels-idx1-ubyte").write_bytes(idx((6,)))
    Path("train-images-idx3-ubyte.gz").write_bytes(content)
    error = error_of(["train", "--dataset", "mnist", "--data-dir", ".", "--run-dir", "new"], capsys)
    assert "train-images-idx3-ubyte.gz" in error
    assert not Path("new").exists()


def test_a_small_compressed_file_is_not_expanded_beyond_its_header(folder, monkeypatch, capsys):
    for name in ("train", "t10k"):
        Path(f"{name}-images-idx3-ubyte").write_bytes(idx((6, 8, 8)))
        Path(f"{name}-labels-idx1-ubyte").write_bytes(idx((6,)))
    Path("train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx((6, 8, 8), size=100_000_000), 1))
    read, sizes = gzip.GzipFile.read, []
    monkeypatch.setattr(gzip.GzipFile, "read", lambda file, size=-1: sizes.append(size) or read(file, size))
    arguments = ["train", "--dataset", "mnist", "--data-dir", ".", "--run-dir", "new"]
    assert "more than 384 values" in error_of(arguments, capsys)
    assert sizes == [16, 385]


# Seeds.


def test_the_largest_seed_is_another_one_than_its_neighbours():
    seeds = (0, 2**31, 2**32 - 1)
    weights = [Run(Path(), Config(MODEL, training=TrainingConfig(seed=seed)), ()).new_model() for seed in seeds]
    first, second, third = (model.capsule_layers[0].weight[...] for model in weights)
    assert (np.mean(first != second), np.mean(first != third), np.mean(second != third)) == (1, 1, 1)


@pytest.mark.parametrize(
    "arguments", ["--seed 4294967296", "--seed 4294967295 --seeds 2", "--seed 18446744073709551616"]
)
def test_seeds_of_more_than_32_bits_are_refused(arguments, folder, capsys):
    error = error_of(f"train {arguments} --run-dir new".split(), capsys)
    assert "must be at most 4294967295" in error
    assert not Path("new").exists()


# Output that nobody reads.


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the device that is always full exists on Linux")
@pytest.mark.parametrize("command", [["--help"], ["--version"], ["report", "run"]])
def test_a_full_output_is_said(command, folder, monkeypatch, capsys):
    (folder / "metrics.jsonl").write_text('{"kind": "epoch", "epoch": 1, "step": 1, "images_per_second": 1}\n')
    with open("/dev/full", "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert main(command) == 2
    assert capsys.readouterr().err == "capsnet: error: Cannot read or write the output: No space left on device.\n"


def test_an_output_whose_reader_has_ended_is_no_error(folder, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert main(["--help"]) == 141
    assert capsys.readouterr().err == ""


def test_an_unreadable_run_is_read_again_once_it_is_mended(folder):
    before = (folder / "config.json").read_text()
    change(folder, "model", num_classes="3")
    with pytest.raises(UsageError, match="num_classes is '3'"):
        read_run(folder)
    (folder / "config.json").write_text(before)
    assert read_run(folder).config.model == MODEL


@pytest.mark.parametrize("name", ["runs/[r]", "runs/back\\slash", "runs/[ab]/x", "\udcc3"])
def test_run_folders_whose_checkpoints_could_not_be_read_are_refused(name, folder, capsys):
    error = error_of(["train", "--run-dir", name], capsys)
    assert "The checkpoints in the run folder" in error or "is not text in this locale" in error
    assert not Path("runs").exists()


# Data sets that are not there, and modules that end the program.


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--dataset", ""], "dataset is , and must be the name or path of a data set"),
        (["--dataset", "digits", "--data-dir", "run"], "but digits is not read from it; expected no data_dir"),
        (["--dataset", "run", "--data-dir", "run"], "/run is not read from it; expected no data_dir"),
        (["--dataset", "mnist", "--data-dir", "nowhere"], "expected the folder of the data set's files"),
    ],
)
def test_data_sets_that_are_not_there_are_refused(options, expected, folder, capsys):
    assert expected in error_of(["train", *options, "--run-dir", "new"], capsys)
    assert not Path("new").exists()


@pytest.mark.parametrize("place", ["import", "call"])
def test_a_routing_that_ends_the_program_is_reported(place, folder, monkeypatch, capsys):
    module = f"ends_on_{place}"
    ending = {"import": "import sys\nsys.exit(0)\n", "call": "import sys\ndef f(votes, activations): sys.exit(0)\n"}
    Path(f"{module}.py").write_text(ending[place])
    monkeypatch.syspath_prepend("")
    error = error_of(["train", "--routing", f"{module}:f", "--run-dir", "new"], capsys)
    assert "SystemExit: 0" in error
    assert f"{module}:f" in error
    assert not Path("new").exists()
