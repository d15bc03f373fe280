"""The command `predict`: the line for each image, how files are read, and which files are refused."""

import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from flax import nnx
from PIL import Image

from capsnet_jax import CapsNet, UsageError
from capsnet_jax.cli.predict import Predict, describe, read_image
from capsnet_jax.config import Config, DataConfig, ModelConfig
from capsnet_jax.interchange.weights import save_weights
from capsnet_jax.runs.folder import BEST, WEIGHTS, Run
from tests.conftest import IMAGE_SHAPE, SMALL

NAMES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay")
PIXELS = np.random.default_rng(4).integers(0, 256, (3, *IMAGE_SHAPE[:2]), dtype=np.uint8)


def new_run(folder, image_shape=IMAGE_SHAPE, labels_per_image=1, **data) -> Run:
    return Run(
        folder, Config(ModelConfig(image_shape, len(NAMES), **SMALL), DataConfig(**data)), NAMES, labels_per_image
    )


@pytest.fixture
def run_dir(tmp_path, small_model):
    """A run with two models whose activations differ within two decimals."""
    run = new_run(tmp_path / "run")
    run.write_config()
    for name, seed in ((WEIGHTS, 0), (BEST, 1)):
        save_weights(run.folder / name, new_model(seed))
    return run.folder


def new_model(seed: int) -> CapsNet:
    model = CapsNet(IMAGE_SHAPE, 10, **SMALL, rngs=nnx.Rngs(seed))
    weight = model.capsule_layers[-1].weight
    weight[...] = 3 * weight[...]
    return model


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(len(PIXELS))]
    for path, pixels in zip(paths, PIXELS, strict=True):
        Image.fromarray(pixels).save(path)
    return paths


def expected_lines(files, model):
    lines = []
    for path, pixels in zip(files, PIXELS, strict=True):
        activations = np.asarray(model.encode(jnp.asarray(pixels[None, ..., None] / np.float32(255))).activations[0])
        following, first = np.argsort(activations)[-2:]
        assert activations[first] - activations[following] > 0.01
        first_text, following_text = (f"{activations[index]:.2f}" for index in (first, following))
        lines.append(f"{path}: {NAMES[first]} ({first_text}; next {NAMES[following]} at {following_text})")
    return lines


def test_a_line_for_each_image_has_class_activation_and_runner_up(run_dir, files, capsys):
    tyro.cli(Predict, args=[str(run_dir), *map(str, files)]).run()
    last = capsys.readouterr().out.splitlines()
    assert last == expected_lines(files, new_model(0))
    Predict(run_dir, tuple(files), best=True).run()
    best = capsys.readouterr().out.splitlines()
    assert best == expected_lines(files, new_model(1))
    assert best != last


def test_as_many_classes_are_named_as_an_image_has_labels():
    activations = np.array([0.31, 0.875, 0.3149, 0.06], np.float32)
    assert describe(activations, NAMES) == "bee (0.88; next cat at 0.31)"
    assert describe(activations, NAMES, 2) == "bee and cat (0.88, 0.31; next ant at 0.31)"
    assert describe(activations[:2], NAMES, 2) == "bee and ant (0.88, 0.31)"


def test_the_number_of_labels_is_read_from_the_run(tmp_path, files, capsys):
    run = new_run(tmp_path / "pairs", labels_per_image=2)
    run.write_config()
    save_weights(run.folder / WEIGHTS, new_model(0))
    Predict(run.folder, (files[0],)).run()
    first, _, second = capsys.readouterr().out.removeprefix(f"{files[0]}: ").split()[:3]
    assert {first, second} < set(NAMES)


def test_pixels_are_those_of_the_file_in_the_channels_of_the_run(tmp_path):
    colour = np.random.default_rng(5).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    Image.fromarray(colour).save(tmp_path / "colour.png")
    Image.fromarray(PIXELS[0]).save(tmp_path / "grey.png")
    grey_run, colour_run = new_run(tmp_path), new_run(tmp_path, (9, 11, 3))
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png", grey_run)[..., 0], PIXELS[0])
    np.testing.assert_array_equal(read_image(tmp_path / "colour.png", colour_run), colour)
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png", colour_run), np.stack([PIXELS[0]] * 3, axis=-1))
    luma = colour @ np.array([0.299, 0.587, 0.114])  # ITU-R 601-2
    np.testing.assert_allclose(read_image(tmp_path / "colour.png", grey_run)[..., 0], luma, atol=1)


def test_files_are_resized_only_where_the_run_resized_its_own(tmp_path):
    halves = np.repeat(np.array([[0, 200]], np.uint8), 20, axis=0).repeat(15, axis=1)
    Image.fromarray(halves).save(tmp_path / "large.png")
    resized = read_image(tmp_path / "large.png", new_run(tmp_path, image_size=(9, 11)))
    assert resized.shape == (9, 11, 1)
    np.testing.assert_array_equal(resized[:, :4, 0], 0)
    np.testing.assert_array_equal(resized[:, -4:, 0], 200)
    with pytest.raises(UsageError, match=r"large.png is 20 x 30 pixels, height x width; expected 9 x 11, as the run"):
        read_image(tmp_path / "large.png", new_run(tmp_path))


def test_files_are_cropped_in_the_middle_if_the_run_cropped(tmp_path):
    run = new_run(tmp_path, (5, 5, 1), augment=("crop=5",))
    Image.fromarray(PIXELS[0]).save(tmp_path / "whole.png")
    np.testing.assert_array_equal(read_image(tmp_path / "whole.png", run)[..., 0], PIXELS[0][2:7, 3:8])
    resized = new_run(tmp_path, (5, 5, 1), augment=("crop=5",), image_size=(9, 11))
    np.testing.assert_array_equal(read_image(tmp_path / "whole.png", resized)[..., 0], PIXELS[0][2:7, 3:8])
    Image.fromarray(PIXELS[0][:4]).save(tmp_path / "low.png")
    with pytest.raises(UsageError, match=r"low.png is 4 x 11 pixels.* expected 5 x 5, or larger to be cropped"):
        read_image(tmp_path / "low.png", run)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.png", r"missing.png does not exist; expected an image file\."),
        ("folder", r"folder is a folder; expected an image file\."),
        ("text.png", r"text.png cannot be read as an image"),
        ("cut.png", r"cut.png cannot be read as an image"),
        ("wide.png", r"wide.png is 9 x 12 pixels, height x width; expected 9 x 11, as the run was trained on\."),
    ],
)
def test_a_wrong_file_is_named_and_nothing_is_printed(run_dir, files, tmp_path, name, message, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "cut.png").write_bytes(files[0].read_bytes()[:-40])
    Image.fromarray(np.zeros((9, 12), np.uint8)).save(tmp_path / "wide.png")
    with pytest.raises(UsageError, match=message):
        Predict(run_dir, (files[0], tmp_path / name, files[1])).run()
    assert capsys.readouterr().out == ""


def test_a_wrong_run_or_no_images_is_an_error(run_dir, files, tmp_path):
    with pytest.raises(UsageError, match="There are no images to predict; expected one file or more"):
        tyro.cli(Predict, args=[str(run_dir)]).run()
    with pytest.raises(UsageError, match="is of images of 2 channels; expected 1 or 3"):
        read_image(files[0], new_run(tmp_path, (9, 11, 2)))
    with pytest.raises(UsageError, match="is not the folder of a run"):
        Predict(tmp_path, tuple(files)).run()
