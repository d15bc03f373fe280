"""The command `predict`: the line for each image, how files are read, and which files are refused."""

import csv
import errno
import functools
import io
import json
import os
import re
import socket

import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from flax import nnx
from PIL import ExifTags, Image

from capsnet_jax import CapsNet, UsageError
from capsnet_jax.cli.main import main
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


@functools.cache
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


def pixels_of(path, run, **options):
    return read_image(str(path), run, **options)[0]


@functools.cache
def most_active_classes(seed: int) -> list[list[tuple[str, float]]]:
    """Names and activations of all classes for each of PIXELS, the most active first."""
    images = jnp.asarray(PIXELS[..., None] / np.float32(255))
    activations = np.asarray(nnx.jit(lambda model, images: model.encode(images))(new_model(seed), images).activations)
    return [[(NAMES[index], float(row[index])) for index in np.argsort(-row)] for row in activations]


def expected_lines(files, seed):
    lines = []
    for path, classes in zip(files, most_active_classes(seed), strict=True):
        (first, largest), (following, second) = classes[:2]
        assert largest - second > 0.01
        lines.append(f"{path}: {first} ({largest:.2f}; next {following} at {second:.2f})")
    return lines


def test_a_line_for_each_image_has_class_activation_and_runner_up(run_dir, files, capsys):
    tyro.cli(Predict, args=[str(run_dir), *map(str, files)]).run()
    last = capsys.readouterr().out.splitlines()
    assert last == expected_lines(files, 0)
    Predict(run_dir, tuple(map(str, files)), best=True).run()
    best = capsys.readouterr().out.splitlines()
    assert best == expected_lines(files, 1)
    assert best != last


def test_as_many_classes_are_named_as_an_image_has_labels():
    classes = [("bee", 0.875), ("cat", 0.3149), ("ant", 0.31)]
    assert describe(classes[:2], 1) == "bee (0.88; next cat at 0.31)"
    assert describe(classes, 2) == "bee and cat (0.88, 0.31; next ant at 0.31)"
    assert describe(classes[:2], 2) == "bee and cat (0.88, 0.31)"
    assert describe(classes, None) == "bee (0.88), cat (0.31), ant (0.31)"


def test_the_number_of_labels_is_read_from_the_run(tmp_path, files, capsys):
    run = new_run(tmp_path / "pairs", labels_per_image=2)
    run.write_config()
    save_weights(run.folder / WEIGHTS, new_model(0))
    Predict(run.folder, (str(files[0]),)).run()
    first, _, second = capsys.readouterr().out.removeprefix(f"{files[0]}: ").split()[:3]
    assert {first, second} < set(NAMES)


def test_pixels_are_those_of_the_file_in_the_channels_of_the_run(tmp_path):
    colour = np.random.default_rng(5).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    Image.fromarray(colour).save(tmp_path / "colour.png")
    Image.fromarray(PIXELS[0]).save(tmp_path / "grey.png")
    grey_run, colour_run = new_run(tmp_path), new_run(tmp_path, (9, 11, 3))
    np.testing.assert_array_equal(pixels_of(tmp_path / "grey.png", grey_run)[..., 0], PIXELS[0])
    np.testing.assert_array_equal(pixels_of(tmp_path / "colour.png", colour_run), colour)
    np.testing.assert_array_equal(pixels_of(tmp_path / "grey.png", colour_run), np.stack([PIXELS[0]] * 3, axis=-1))
    luma = colour @ np.array([0.299, 0.587, 0.114])  # ITU-R 601-2
    np.testing.assert_allclose(pixels_of(tmp_path / "colour.png", grey_run)[..., 0], luma, atol=1)


def test_files_are_resized_only_where_the_run_resized_its_own(tmp_path):
    halves = np.repeat(np.array([[0, 200]], np.uint8), 20, axis=0).repeat(15, axis=1)
    Image.fromarray(halves).save(tmp_path / "large.png")
    resized = pixels_of(tmp_path / "large.png", new_run(tmp_path, image_size=(9, 11)))
    assert resized.shape == (9, 11, 1)
    np.testing.assert_array_equal(resized[:, :4, 0], 0)
    np.testing.assert_array_equal(resized[:, -4:, 0], 200)
    with pytest.raises(UsageError, match=r"large.png is 20 x 30 pixels, height x width; expected 9 x 11, as the run"):
        pixels_of(tmp_path / "large.png", new_run(tmp_path))


def test_files_are_cropped_in_the_middle_if_the_run_cropped(tmp_path):
    run = new_run(tmp_path, (5, 5, 1), augment=("crop=5",))
    Image.fromarray(PIXELS[0]).save(tmp_path / "whole.png")
    np.testing.assert_array_equal(pixels_of(tmp_path / "whole.png", run)[..., 0], PIXELS[0][2:7, 3:8])
    resized = new_run(tmp_path, (5, 5, 1), augment=("crop=5",), image_size=(9, 11))
    np.testing.assert_array_equal(pixels_of(tmp_path / "whole.png", resized)[..., 0], PIXELS[0][2:7, 3:8])
    Image.fromarray(PIXELS[0][:4]).save(tmp_path / "low.png")
    with pytest.raises(UsageError, match=r"low.png is 4 x 11 pixels.* expected 5 x 5, or larger to be cropped"):
        pixels_of(tmp_path / "low.png", run)


def test_files_folders_and_standard_input_are_predicted_in_the_order_given(run_dir, files, monkeypatch, capsys):
    folder = files[0].parent
    monkeypatch.chdir(folder)
    (folder / "some").mkdir()
    for number, name in enumerate(["b.PNG", "a.bmp", ".hidden.png"]):
        Image.fromarray(PIXELS[number]).save(folder / "some" / name)
    (folder / "some" / "notes.txt").touch()
    (folder / "some" / "more.png").mkdir()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(files[2].read_bytes())))
    read, write = os.pipe()
    os.write(write, files[1].read_bytes())
    os.close(write)
    assert main(["predict", str(run_dir), "./2.png", "some", "-", f"/dev/fd/{read}", "0.png"]) == 0
    out, error = capsys.readouterr()
    descriptions = [line.split(": ")[1] for line in expected_lines(files, 0)]
    names = ["./2.png", "some/a.bmp", "some/b.PNG", "-", f"/dev/fd/{read}", "0.png"]
    expected = [f"{name}: {descriptions[number]}" for name, number in zip(names, [2, 1, 0, 2, 1, 0], strict=True)]
    assert out.splitlines() == expected
    assert error == "capsnet: some: 2 image files; skipped 2 without the suffix of one\n"
    os.close(read)


def test_top_json_and_csv_print_the_most_active_classes(run_dir, files, monkeypatch, capsys):
    monkeypatch.chdir(files[0].parent)
    odd = 'a "b", \n[b] $c$.png'
    files[1].rename(odd)
    arguments = ["predict", str(run_dir), "0.png", odd, "--top", "3"]
    best = [classes[:3] for classes in most_active_classes(0)[:2]]
    assert main(arguments) == 0
    texts = [", ".join(f"{name} ({activation:.2f})" for name, activation in classes) for classes in best]
    assert capsys.readouterr().out == f"0.png: {texts[0]}\n{odd}: {texts[1]}\n"
    assert main([*arguments, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["file"] for line in lines] == ["0.png", odd]
    for line, classes in zip(lines, best, strict=True):
        assert [each["class"] for each in line["predictions"]] == [name for name, _ in classes]
        np.testing.assert_allclose([each["activation"] for each in line["predictions"]], [a for _, a in classes], 1e-5)
    assert main([*arguments, "--csv"]) == 0
    heading, *rows = csv.reader(io.StringIO(capsys.readouterr().out))
    assert heading == ["file", "class", "activation", "class_2", "activation_2", "class_3", "activation_3"]
    assert [row[0] for row in rows] == ["0.png", odd]
    for row, classes in zip(rows, best, strict=True):
        assert row[1::2] == [name for name, _ in classes]
        np.testing.assert_allclose([float(cell) for cell in row[2::2]], [a for _, a in classes], 1e-5)


def test_resize_fits_an_image_into_the_size_of_the_model_and_pads_it(tmp_path):
    run = new_run(tmp_path)  # of 9 x 11
    halves = np.repeat(np.array([[40, 200]], np.uint8), 36, axis=0).repeat(6, axis=1)  # 36 x 12: a quarter is 9 x 3
    Image.fromarray(halves).save(tmp_path / "tall.png")
    image, changes = read_image(str(tmp_path / "tall.png"), run, resize=True)
    assert changes == "resized from 36 x 12 to 9 x 3, padded to 9 x 11"
    assert not image[:, :4].any()
    assert not image[:, 7:].any()
    np.testing.assert_allclose(image[:, [4, 6], 0], np.tile([40, 200], (9, 1)), atol=10)
    stripes = np.tile(np.array([0, 240], np.uint8), (9, 110))  # a pixel wide
    Image.fromarray(stripes).save(tmp_path / "wide.png")
    image, changes = read_image(str(tmp_path / "wide.png"), run, resize=True)
    assert changes == "resized from 9 x 220 to 1 x 11, padded to 9 x 11"  # 0.45 of a row, and never none
    np.testing.assert_allclose(image[4, :, 0].astype(float), 120, atol=15)
    assert not np.delete(image, 4, axis=0).any()
    Image.fromarray(PIXELS[0]).save(tmp_path / "same.png")
    image, changes = read_image(str(tmp_path / "same.png"), run, resize=True)
    np.testing.assert_array_equal(image[..., 0], PIXELS[0])
    assert changes == ""


def test_resize_turns_photographs_upright_and_replaces_what_the_run_did_with_its_images(tmp_path):
    run = new_run(tmp_path, (6, 6, 3), augment=("crop=6",), image_size=(8, 8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(np.repeat(PIXELS[0][:6, :3, None], 3, axis=-1)).save(tmp_path / "photo.png", exif=exif)
    image, changes = read_image(str(tmp_path / "photo.png"), run, resize=True)
    assert changes == "turned upright, padded to 6 x 6"
    np.testing.assert_array_equal(image[1:4, :, 0], np.rot90(PIXELS[0][:6, :3], -1))


def test_invert_swaps_light_and_dark_of_the_drawing_and_not_of_the_padding(tmp_path):
    Image.fromarray(PIXELS[0][:, :5]).save(tmp_path / "grey.png")
    image, changes = read_image(str(tmp_path / "grey.png"), new_run(tmp_path), resize=True, invert=True)
    assert changes == "inverted, padded to 9 x 11"
    np.testing.assert_array_equal(image[:, 3:8, 0], 255 - PIXELS[0][:, :5])
    assert not np.delete(image, range(3, 8), axis=1).any()
    strokes = np.zeros((9, 11, 4), np.uint8)  # black, and transparent around
    strokes[4, :, 3] = 255
    Image.fromarray(strokes).save(tmp_path / "strokes.png")
    image, changes = read_image(str(tmp_path / "strokes.png"), new_run(tmp_path), invert=True)
    assert changes == "inverted"
    np.testing.assert_array_equal(image[..., 0], strokes[..., 3])


def test_what_was_changed_is_printed(run_dir, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(255 - PIXELS[0].repeat(2, axis=0).repeat(2, axis=1)).save("large.png")
    arguments = ["predict", str(run_dir), "large.png", "--resize", "--invert"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.endswith(") [inverted, resized from 18 x 22 to 9 x 11]\n")
    assert main([*arguments, "--json"]) == 0
    out, error = capsys.readouterr()
    assert json.loads(out)["file"] == "large.png"
    assert error == "capsnet: large.png: inverted, resized from 18 x 22 to 9 x 11\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("-", r"- is standard input, which is closed; expected an image\."),
        ("missing.png", r"missing.png does not exist; expected an image file\."),
        ("folder", r"folder is a folder without image files \(\.png .*\) in it; expected some\."),
        ("text.png", r"text.png cannot be read as an image \(its format is unknown\); replace or remove it\."),
        ("cut.png", r"cut.png cannot be read as an image \("),
        (
            "wide.png",
            r"wide.png is 9 x 12 pixels, height x width; expected 9 x 11, as the run .* or --resize to fit it in\.",
        ),
    ],
)
def test_a_wrong_file_is_named_and_the_others_are_predicted(
    run_dir, files, tmp_path, name, message, monkeypatch, capsys
):
    monkeypatch.setattr("sys.stdin", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "cut.png").write_bytes(files[0].read_bytes()[:-40])
    Image.fromarray(np.zeros((9, 12), np.uint8)).save(tmp_path / "wide.png")
    assert main(["predict", str(run_dir), str(files[0]), name, str(files[1]), str(files[2])]) == 2
    out, error = capsys.readouterr()
    assert out.splitlines() == expected_lines(files, 0)
    assert re.match(f"capsnet: error: .*{message}", error)
    assert error.count("\n") == 1


class Unreadable(io.RawIOBase):
    """A stream as of a broken disk."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_files_that_the_system_refuses_are_named_and_the_others_are_predicted(run_dir, files, monkeypatch, capsys):
    monkeypatch.chdir(files[0].parent)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(Unreadable())))
        assert main(["predict", str(run_dir), "socket", "-", *map(str, files)]) == 2
    out, error = capsys.readouterr()
    assert out.splitlines() == expected_lines(files, 0)
    assert error.splitlines() == [
        "capsnet: error: socket cannot be read: No such device or address.",
        "capsnet: error: - cannot be read: Input/output error.",
    ]


def test_an_endless_input_is_read_up_to_a_limit(run_dir, files, monkeypatch, capsys):
    monkeypatch.setattr("capsnet_jax.cli.predict.MAX_BYTES", 4000)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(bytes(4001))))
    assert main(["predict", str(run_dir), "/dev/zero", "-", str(files[0])]) == 2
    out, error = capsys.readouterr()
    assert out.splitlines() == expected_lines(files, 0)[:1]
    assert error.splitlines() == [
        f"capsnet: error: {name} has more than 4,000 bytes; expected an image." for name in ("/dev/zero", "-")
    ]


def test_a_wrong_run_or_wrong_options_are_an_error(run_dir, files, tmp_path):
    with pytest.raises(UsageError, match="There are no images to predict; expected files, folders or -"):
        tyro.cli(Predict, args=[str(run_dir)]).run()
    with pytest.raises(UsageError, match="--json and --csv are given; expected one of them"):
        Predict(run_dir, ("0.png",), json=True, csv=True).run()
    for top in (0, 11):
        with pytest.raises(UsageError, match=f"top is {top}; expected 1 to 10, the number of classes"):
            Predict(run_dir, ("0.png",), top=top).run()
    with pytest.raises(UsageError, match="is not the folder of a run"):
        Predict(tmp_path, tuple(map(str, files))).run()
    run = new_run(tmp_path / "two", (9, 11, 2))
    run.write_config()
    run.save_weights(run.new_model())
    with pytest.raises(UsageError, match="is of images of 2 channels; expected 1 or 3"):
        Predict(run.folder, (str(files[0]),)).run()
