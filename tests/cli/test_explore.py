"""The command `explore`: what it prints, shows and refuses."""

import socket
import webbrowser
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from flax import nnx

import capsnet_jax.cli.explore as command
from capsnet_jax import CapsNet, UsageError
from capsnet_jax.cli.explore import read_examples
from capsnet_jax.cli.main import main
from capsnet_jax.config import Config, DataConfig, ModelConfig
from capsnet_jax.explore.explorer import mnist_examples
from capsnet_jax.explore.server import Server
from capsnet_jax.runs.folder import Run
from tests.conftest import IMAGE_SHAPE, SMALL, make_small_dataset, write_idx_folder

NAMES = tuple("abcdefghij")


@pytest.fixture
def run(tmp_path):
    data = DataConfig(dataset="mnist", data_dir=write_idx_folder(tmp_path / "idx", make_small_dataset()))
    return save(Run(tmp_path / "run", Config(ModelConfig(IMAGE_SHAPE, 10, **SMALL), data), NAMES))


def save(run: Run) -> Run:
    run.write_config()
    run.save_weights(CapsNet.from_config(run.config.model, rngs=nnx.Rngs(0)))
    return run


class Shown(NamedTuple):
    """What the command gives to `Explorer`, which would compile it."""

    models: dict[str, CapsNet]
    class_names: tuple[str, ...]
    labels_per_image: int
    examples: Callable


@pytest.fixture
def opened(monkeypatch):
    """The pages opened in a browser, and what is then shown, until Ctrl-C."""
    opened = []

    def serve(server, explorer):
        opened.append(explorer)
        raise KeyboardInterrupt

    monkeypatch.setattr(webbrowser, "open", opened.append)
    monkeypatch.setattr(Server, "serve", serve)
    monkeypatch.setattr(command, "Explorer", Shown)
    return opened


def test_the_page_is_opened_at_the_address_that_is_printed(run, opened, capsys):
    assert main(["explore", str(run.folder)]) == 0
    url, shown = opened
    assert capsys.readouterr() == (f"Explore {run.folder} at {url} (Ctrl-C ends it)\n\n", "")
    assert url.startswith("http://127.0.0.1:")
    assert list(shown.models) == [str(run.folder)]
    assert (shown.class_names, shown.labels_per_image) == (NAMES, 1)
    np.testing.assert_array_equal(shown.examples()[0], make_small_dataset().test_images)


def test_a_routing_or_a_run_is_shown_beside_it(run, opened, tmp_path, capsys):
    other = save(run._replace(folder=tmp_path / "other"))
    for compare in ("dynamic,leaky=true", "uniform", str(other.folder)):
        assert main(["explore", str(run.folder), "--compare", compare, "--no-browser"]) == 0
        (shown,) = opened
        assert list(shown.models) == [str(run.folder), compare]
        first, second = (model.capsule_layers[-1] for model in shown.models.values())
        np.testing.assert_array_equal(first.weight[...], second.weight[...])
        assert (first.routing == second.routing) is (compare == str(other.folder))
        opened.clear()


def test_other_computers_are_let_in_with_a_warning_only(run, opened, capsys):
    assert main(["explore", str(run.folder), "--host", "0.0.0.0", "--no-browser"]) == 0
    assert capsys.readouterr().err == "capsnet: all who reach 0.0.0.0 in the network can use the page.\n"


def test_the_page_is_written_into_a_folder(run, tmp_path, capsys):
    folder = tmp_path / "my page"
    command = ["explore", str(run.folder), "--static", str(folder)]
    assert main([*command, "--compare", "uniform"]) == 2
    assert capsys.readouterr().err.startswith("capsnet: error: compare is uniform; expected none with --static")
    assert main(command) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{folder}: {len(list(folder.iterdir()))} files, 0.1 MB.")
    assert second == f"python -m http.server --directory '{folder}'"
    written = (folder / "model.json").read_text()
    assert '"name": "run"' in written
    assert str(tmp_path) not in written
    assert main(command) == 2
    assert capsys.readouterr().err == (
        f"capsnet: error: {folder} exists already; expected the name of a new or empty folder.\n"
    )


def test_mistakes_are_explained_in_a_sentence(run, opened, tmp_path, capsys):
    other = save(run._replace(folder=tmp_path / "other", class_names=tuple("klmnopqrst")))
    folder = str(run.folder)
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        for arguments, message in (
            (["no/such/run"], "no/such/run is not the folder of a run: it does not exist"),
            ([folder, "--port", port], f"Port {port} of 127.0.0.1 cannot be used: "),
            ([folder, "--compare", folder], f"compare is {folder}, the run itself"),
            ([folder, "--compare", "emm"], "compare is emm; expected a run, or a routing: dynamic, em, "),
            ([folder, "--compare", "em,depth=3"], "Routing em has no option 'depth'"),
            ([folder, "--compare", str(other.folder)], f"The classes of {other.folder} are k, l, m"),
        ):
            assert main(["explore", *arguments]) == 2
            error = capsys.readouterr().err
            assert error.startswith("capsnet: error: ")
            assert message in error
            assert error.count("\n") == 1
    assert opened == []


def test_test_images_are_those_of_the_run(run):
    images, labels = read_examples(run)
    np.testing.assert_array_equal(images, make_small_dataset().test_images)
    np.testing.assert_array_equal(labels, make_small_dataset().test_labels)


def with_data(run: Run, shape=IMAGE_SHAPE, **data) -> Run:
    model = replace(run.config.model, image_shape=shape)
    return run._replace(config=replace(run.config, model=model, data=DataConfig(**data)))


def test_without_the_files_of_mnist_the_digits_of_the_page_are_shown(run):
    images, _ = read_examples(with_data(run, (28, 28, 1), dataset="mnist"))
    np.testing.assert_array_equal(images, mnist_examples()[0])


def test_test_images_of_another_shape_or_from_elsewhere_are_not_read(run):
    with pytest.raises(UsageError, match=r"The test images are of shape \(8, 8, 1\); expected \(9, 11, 1\)"):
        read_examples(with_data(run, dataset="digits"))
    with pytest.raises(UsageError, match="The folder of the test images of cifar10 is not known"):
        read_examples(with_data(run, dataset="cifar10"))
