"""Models that ship with the package: what is packaged, and that their names work wherever a run folder does."""

import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from sklearn.datasets import load_digits

import capsnet_jax
from capsnet_jax import PRETRAINED, CapsNet, UsageError, load
from capsnet_jax.cli.main import main
from capsnet_jax.cli.train import Train
from capsnet_jax.config import Config, DataConfig, ModelConfig
from capsnet_jax.interchange.weights import to_torch
from capsnet_jax.runs.folder import Run, read_run
from capsnet_jax.runs.origin import Source
from tests.conftest import IMAGE_SHAPE, SMALL, make_small_dataset, write_idx_folder
from tests.tiny_run import contents, printed

MODEL = ModelConfig(IMAGE_SHAPE, 10, **SMALL, routing="uniform")  # quick to compile
NAMES = tuple("0123456789")


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Run:
    """An untrained model among those that ship, under the name tiny; the working directory is another, empty folder."""
    run = Run(tmp_path / "package" / "tiny", Config(MODEL, DataConfig("mnist")), NAMES)
    run.write_config()
    run.save_weights(run.new_model(seed=7))
    monkeypatch.setitem(PRETRAINED, "tiny", run.folder)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return run


def assert_same_weights(model: CapsNet, other: CapsNet) -> None:
    np.testing.assert_equal(to_torch(model), to_torch(other))


def test_load_takes_the_name(tiny):
    model = load("tiny")
    assert_same_weights(model, tiny.new_model(seed=7))
    assert model.config == MODEL
    assert read_run(Path("tiny")).class_names == NAMES


def test_a_folder_of_that_name_is_preferred(tiny):
    here = tiny._replace(folder=Path("tiny"), class_names=NAMES[::-1])
    here.write_config()
    here.save_weights(here.new_model(seed=8))
    assert_same_weights(load("tiny"), here.new_model(seed=8))
    assert read_run(Path("tiny")).class_names == NAMES[::-1]


def test_predict_and_evaluate_take_the_name(tiny):
    data = write_idx_folder(Path("idx"), make_small_dataset())
    Image.fromarray(make_small_dataset().test_images[0, ..., 0]).save("image.png")
    assert printed("predict", "tiny", "image.png") == printed("predict", str(tiny.folder), "image.png")
    evaluated = printed("evaluate", "tiny", "--data-dir", str(data), "--limit", "5")
    assert re.match(r"test accuracy \d\.\d{4} on 5 images", evaluated[-1])


def test_figures_export_and_convert_take_the_name_and_leave_the_package_as_it_is(tiny):
    before = contents(tiny.folder)
    data = write_idx_folder(Path("idx"), make_small_dataset())
    printed("figures", "tiny", "--only", "reconstructions", "--data-dir", str(data))
    assert Path("tiny-figures/reconstructions.png").exists()
    assert printed("export", "tiny")[0].startswith("tiny.stablehlo: ")
    printed("convert", "tiny", "--to", "copy")
    assert contents(tiny.folder) == before
    assert_same_weights(load("copy"), load("tiny"))
    assert read_run(Path("copy")).fields() == tiny.fields()


def test_training_starts_from_the_name(tiny):
    assert Train.default(["--from", "tiny"]).model == MODEL
    source = Source.read(Path("tiny"))
    assert source.path == str(tiny.folder)
    np.testing.assert_equal(source.state, to_torch(tiny.new_model(seed=7)))


def test_an_unknown_name_lists_those_that_ship(tiny, capsys):
    assert main(["predict", "tidy", "image.png"]) == 2
    error = capsys.readouterr().err
    assert "tidy is not the folder of a run: it does not exist; expected the --run-dir of a training, or" in error
    assert f"or the name of a pretrained model ({', '.join(PRETRAINED)})" in error
    assert "tiny" in PRETRAINED
    with pytest.raises(UsageError, match=r"tidy does not exist; .*, or the name of a pretrained model \(.*tiny\)"):
        load("tidy")


def test_all_models_together_are_small():
    files = [file for folder in PRETRAINED.values() for file in folder.iterdir()]
    assert sum(file.stat().st_size for file in files) < 2_500_000
    assert {file.name for file in files} <= {"config.json", "model.safetensors", "README.md"}


@pytest.mark.parametrize("name", PRETRAINED)
def test_a_model_that_ships(name):
    """It knows the upscaled digits of scikit-learn, which it was not trained on."""
    run = read_run(Path(name))
    assert run.config.data.data_dir is None  # a folder of the machine that it was trained on
    state = safetensors.numpy.load_file(run.folder / "model.safetensors")
    assert {str(array.dtype) for array in state.values()} == {"float16"}
    model = load(name)
    assert model.config.image_shape == (28, 28, 1)
    images, labels = load_digits(return_X_y=True)
    pixels = [
        np.asarray(Image.fromarray(np.uint8(15 * image.reshape(8, 8))).resize((20, 20), Image.Resampling.BICUBIC))
        for image in images[:200]
    ]
    padded = np.pad(np.stack(pixels), ((0, 0), (4, 4), (4, 4)))[..., None]
    predicted = capsnet_jax.predict(model, padded).activations.argmax(axis=1)
    assert (predicted == labels[:200]).mean() > 0.8
