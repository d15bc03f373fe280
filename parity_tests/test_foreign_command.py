"""The command `capsnet verify --torch-model`, with a module in the user's folder and the config of a run."""

import html
import json
import re

import pytest

from capsnet_jax.cli.main import main
from parity_tests.foreign_models import LENGTHS, MODEL, SUBJECT

MODEL_OPTIONS = ["--torch-model", "my_capsnet:Lengths"]
RUN = ["verify", "run", *MODEL_OPTIONS]
# The input capsules of this module are in another order than those of capsnet_torch.
PROPOSED = """\
[weights]  # name in your module = name in capsnet_torch
"conv1.weight" = "encoder.image2primary_capsules.0.weight"
"conv1.bias" = "encoder.image2primary_capsules.0.bias"
"primary.weight" = "encoder.image2primary_capsules.2.weight"
"primary.bias" = "encoder.image2primary_capsules.2.bias"
"W" = { name = "encoder.primary2digit_capsules.input_caps2U.weight", axes = "1 i o h d -> i d o h" }
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The user's folder: a module, a map, and the config.json of a run without weights."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_capsnet.py").write_text("from parity_tests.foreign_models import *  # noqa: F403\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(SUBJECT.run.fields()))
    (tmp_path / "map.toml").write_text(LENGTHS)
    return tmp_path


def test_without_a_map_one_is_proposed_that_can_be_read_and_whose_mistake_is_found(folder, capsys):
    assert main(RUN) == 2
    said = capsys.readouterr()
    assert PROPOSED in said.out
    assert '"activations" = {}' in said.out
    assert "nothing was compared" in said.err
    (folder / "proposed.toml").write_text(said.out)
    assert main([*RUN, "--map", "proposed.toml"]) == 1
    said = capsys.readouterr().out
    assert "differ, first in activations" in said
    assert 'axes = "1 (g p) o h d -> (p g) d o h", sizes = { g = 3 } }, both agree' in said


def test_the_right_map_agrees_in_both_precisions(folder, capsys):
    assert main([*RUN, "--map", "map.toml", "--json", "out.json", "--dtype", "float64", "float32"]) == 0
    said = capsys.readouterr()
    assert said.err.count("| run ") == 2
    results = json.loads((folder / "out.json").read_text())["verifications"]
    assert [result["dtype"] for result in results] == ["float64", "float32"]
    assert [check["name"] for check in results[0]["checks"]][:3] == ["stem 0", "activations", "total loss"]
    assert max(check["error"] for check in results[0]["checks"]) < 1e-13
    assert 1e-8 < max(check["error"] for check in results[1]["checks"]) < 2e-5


def test_a_preset_with_other_sizes_needs_no_folder(folder, capsys):
    sizes = [f"{name}={json.dumps(getattr(MODEL, name))}" for name in ("num_classes", "stem_channels", "stem_kernel")]
    sizes += [f"{name}={json.dumps(getattr(MODEL, name))}" for name in ("primary_groups", "primary_dim", "class_dim")]
    sizes += ["primary_kernel=3", "primary_scale=1", "primary_squash=squash"]
    model = ["verify", "--preset", "readable", "--image-shape", "9", "8", "2", "--set", *sizes, *MODEL_OPTIONS]
    assert main([*model, "--map", "map.toml"]) == 0
    assert "JAX and PyTorch agree in all 8 checks of preset readable: " in capsys.readouterr().out


def test_a_difference_is_exit_status_1_and_shown_on_a_page_without_other_files(folder, capsys):
    model = ["verify", "run", "--torch-model", "my_capsnet:LengthsOverInputs", "--map", "map.toml"]
    assert main([*model, "--html", "page.html", "--tolerance", "total loss=99.5"]) == 1
    said = capsys.readouterr().out
    assert "first in activations" in said
    rows = [line.split("|") for line in said.splitlines() if line.startswith("| ")][2:]
    assert [row[4:6] for row in rows if row[1].strip() == "total loss"] == [["      99.5 ", "  agrees "]]
    page = (folder / "page.html").read_text()
    assert html.unescape(page).count(said.splitlines()[-1]) == 1
    assert page.count("<tr>") == len(rows) + 1
    assert page.count('<path class="jax"') == page.count('<path class="torch"') - 1 == len(rows)  # one is in the key
    assert not re.search("<script|<link|https?:|url\\(", page)
    assert "prefers-color-scheme: dark" in page


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--map", "map.toml"], "--map is given without --torch-model; expected both."),
        (
            [*RUN[1:], "--torch-weights", "a.pt"],
            "--torch-model and --torch-weights are given; expected one of them.",
        ),
        (
            [*RUN[2:], "--preset", "digits", "--all-routings"],
            "--all-routings and --torch-model are given; expected one of them.",
        ),
        ([*RUN[1:], "--map", "nowhere.toml"], "nowhere.toml does not exist; expected a map of weights."),
        ([*RUN[1:-1], "my_capsnet:nothing"], "'my_capsnet:nothing' cannot be imported: AttributeError"),
        (
            ["--preset", "digits", "--set", "num_classes"],
            "--set is 'num_classes'; expected a field of the model and its value, as in",
        ),
        (
            ["--preset", "digits", "--set", "classes=3"],
            "The model has no field 'classes'; the nearest is 'num_classes'.",
        ),
        (["--preset", "digits", "--set", "class_dim=a"], "class_dim"),
        (["--preset", "digits", "--set", "primary_scale=true"], "primary_scale"),
        (["--preset", "digits", "--set", "class_dim=" + "9" * 5000], "class_dim"),
        (["--set", "classes=3"], "The model has no field 'classes'; the nearest is 'num_classes'."),
        (
            [*RUN[1:], "--map", "map.toml", "--tolerance", "pose 0=1"],
            "which is no value or gradient here; the nearest is 'poses 0'.",
        ),
        (["nowhere", *RUN[2:]], "nowhere"),
        (RUN[2:], "--torch-model is given without a model or --preset; expected both."),
    ],
)
def test_wrong_options_are_refused_in_a_sentence(folder, capsys, arguments, sentence):
    assert main(["verify", *arguments]) == 2
    said = capsys.readouterr()
    assert sentence in said.err
    assert not said.out
