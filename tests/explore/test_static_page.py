"""The page that needs no server: what is written, what is refused, and its numbers, in a browser, against JAX.

The browser needs selenium (the extra `explore-test`), Chromium and its driver.
"""

import base64
import functools
import http.server
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import capsnet_jax
from capsnet_jax import CapsNet, ModelConfig, UsageError
from capsnet_jax.explore.explorer import Explorer, Network, mnist_examples
from capsnet_jax.explore.server import HEADERS
from capsnet_jax.explore.static_page import check_static, weights_of, write_static
from tests.conftest import IMAGE_SHAPE, SMALL

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
TOLERANCE = 1e-4  # of the largest value
# Every part that the JavaScript computes; all sizes are different.
NETWORKS: dict[str, dict[str, Any]] = {
    "usual": {"image_shape": (9, 11, 1), "decoder_hidden": (12, 14), "num_iterations": 3},
    "large": {
        "image_shape": (17, 14, 3),
        "num_classes": 4,
        "stem_below": ((5, 3), (8, 2)),
        "stem_kernel": 4,
        "stem_stride": 2,
        "batch_norm": True,
        "primary_groups": 3,
        "primary_dim": 6,
        "primary_kernel": 2,
        "primary_stride": 3,
        "primary_scale": 0.7,
        "primary_squash": "squash",
        "decoder_hidden": (9, 13),
        "decoder_bias": True,
        "num_iterations": 5,
    },
    "exponential": {
        "image_shape": (8, 13, 2),
        "batch_norm": True,
        "primary_scale": 1.3,
        "primary_squash": "exponential",
        "decoder_hidden": None,
        "num_iterations": 4,
    },
    "sigmoid": {
        "image_shape": (12, 10, 1),
        "primary_activation": "sigmoid",
        "decoder_hidden": (7, 12),
        "routing": "dynamic,detach=true",
        "num_iterations": 12,
    },
}


def hot_model(**fields: Any) -> CapsNet:
    """A model whose weights, biases and running averages are all random, and whose routing has an effect."""
    model = CapsNet(**({"num_classes": 7} | SMALL | fields), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    state = nnx.state(model)
    nnx.update(model, jax.tree.map(lambda leaf: leaf + rng.uniform(-0.3, 0.3, leaf.shape).astype(np.float32), state))
    return model


def explorer_of(name: str, model: CapsNet, images: np.ndarray, **options: Any) -> Explorer:
    names = [f"class {number}" for number in range(model.config.num_classes)]
    return Explorer({name: model}, names, examples=lambda: (images, np.arange(len(images)) % len(names)), **options)


def random_images(config: ModelConfig) -> np.ndarray:
    """Images of bytes; a third of the pixels is dark, and the last image all of it."""
    rng = np.random.default_rng(1)
    shape = (4, *config.image_shape)
    images = rng.integers(0, 256, shape) * (rng.random(shape) > 1 / 3)
    images[-1] = 0
    return images.astype(np.uint8)


def test_the_page_is_written_with_weights_and_test_images(tmp_path):
    model = hot_model(image_shape=IMAGE_SHAPE)
    images = random_images(model.config)
    explorer = explorer_of("small", model, images)
    folder = tmp_path / "new" / "folder"
    files = write_static(folder, explorer, model)
    assert sorted(files) == sorted(folder.iterdir())
    own = Path(capsnet_jax.__file__).parent / "explore"
    for path in (own / "page").iterdir():
        assert (folder / path.name).read_bytes() == (own / "page" / path.name).read_bytes() or path.name == "send.js"
    for path in (own / "static").iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    page = json.loads((folder / "model.json").read_text())
    assert page["images"] == explorer.images({})
    assert page["model"] == json.loads(json.dumps(explorer.describe({}))) | {"names": ["small", "uniform"]}
    assert [(each["name"], each["iterations"]) for each in page["networks"]] == [("small", [1, 2, 3]), ("uniform", [1])]
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    without_bias = model.decoder.from_capsules.shape[-1] + np.prod(IMAGE_SHAPE)  # zeros instead
    assert (folder / "weights.bin").stat().st_size == size + 4 * without_bias


def test_a_page_without_test_images_does_not_say_where_they_were(tmp_path):
    def fail() -> Any:
        raise UsageError("The folder /home/me/images does not exist.")

    model = hot_model(image_shape=IMAGE_SHAPE, decoder_hidden=None)
    write_static(tmp_path, Explorer({"small": model}, list("abcdefg"), examples=fail), model)
    images = json.loads((tmp_path / "model.json").read_text())["images"]
    assert images == {"images": [], "message": "No test images come with this page."}


def test_weights_are_in_half_precision_only_if_that_changes_none():
    model = hot_model(image_shape=IMAGE_SHAPE)
    for dtype in (np.float32, np.float16):
        kernel = model.stem.convolutions[0].kernel[...]
        layout, weights = weights_of(model)
        assert layout["type"] == np.dtype(dtype).name
        np.testing.assert_array_equal(np.frombuffer(weights, dtype)[: kernel.size], np.ravel(kernel))
        nnx.update(model, jax.tree.map(lambda leaf: leaf.astype(np.float16).astype(np.float32), nnx.state(model)))
    model.decoder.hidden_bias[...] = 2.0**20 * model.decoder.hidden_bias[...]  # too large
    assert weights_of(model)[0]["type"] == "float32"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"routing": "em"}, "The routing is em; expected dynamic"),
        ({"routing": "uniform"}, "The routing is uniform; expected dynamic"),
        ({"routing": "dynamic,leaky=true"}, "The routing is dynamic,leaky=true; expected dynamic, neither leaky"),
        ({"routing": "dynamic,capsule_bias=0.1"}, "neither leaky nor with learned weights"),
        ({"conv_capsules": ((3, 4, 2, 1),)}, "conv_capsules is ((3, 4, 2, 1),); expected ()"),
        ({"hidden_capsules": ((8, 4),)}, "hidden_capsules is ((8, 4),); expected ()"),
        ({"primary_depthwise": True}, "primary_depthwise is True; expected False"),
        ({"standardize_images": True}, "standardize_images is True; expected False"),
        ({"shared_class_transform": True}, "shared_class_transform is True; expected False"),
        ({"matrix_poses": True}, "matrix_poses is True; expected False"),
    ],
)
def test_a_network_with_other_parts_is_refused(fields, message, tmp_path):
    config = replace(ModelConfig(IMAGE_SHAPE, 10, **SMALL), **fields)
    with pytest.raises(UsageError) as refused:
        check_static(tmp_path / "page", config)
    assert message in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_has_files_is_refused(tmp_path):
    config = ModelConfig(IMAGE_SHAPE, 10, **SMALL)
    check_static(tmp_path, config)
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "file"):
        with pytest.raises(UsageError, match="exists already; expected the name of a new or empty folder"):
            check_static(folder, config)


class Site:
    """A folder served at a path below the root of a host, with the strict headers of the explorer, and a browser."""

    def __init__(self, driver: Any, folder: Path, url: str):
        self.driver, self.folder, self.url = driver, folder, url

    def run(self, page: str, script: str, *arguments: Any) -> Any:
        """Run a script in a page; its value may be a promise."""
        if self.driver.current_url != f"{self.url}{page}/":
            self.driver.get(f"{self.url}{page}/")
        return self.driver.execute_async_script(
            f"""const done = arguments[arguments.length - 1];
            const load = (name) => import(new URL(name, document.baseURI));
            const read = async (name) => await fetch(new URL(name, document.baseURI));
            (async (...given) => {{ {script} }})(...arguments).then(done, (error) => done(`${{error.stack}}`))""",
            *arguments,
        )

    def wait(self, condition: Callable[[], Any]) -> None:
        from selenium.webdriver.support.ui import WebDriverWait  # not at the top, because other tests do without

        WebDriverWait(self.driver, 20, poll_frequency=0.05).until(lambda _: condition())

    def text(self, selector: str) -> str:
        script = "return document.querySelector(arguments[0])?.textContent ?? ''"
        return self.driver.execute_script(script, selector)

    def ask(self, page: str, path: str, request: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the answer of the page to a request."""
        script = "const { send } = await load('send.js'); return (await send(given[0], given[1])).json()"
        answer = self.run(page, script, path, request)
        assert isinstance(answer, dict), answer
        return answer

    def numbers(self, page: str, method: str, *arguments: Any) -> np.ndarray:
        """Return what a method of the JavaScript network returns, before it becomes bytes of pixels."""
        script = """const { CapsNet } = await load("capsnet.js");
            const { network } = await (await read("model.json")).json();
            const capsnet = new CapsNet(network, await (await read("weights.bin")).arrayBuffer());
            const [method, ...values] = given;
            const typed = values.map((value) => Array.isArray(value) ? Float32Array.from(value) : value);
            return [...capsnet[method](...typed)]"""
        values = self.run(page, script, method, *arguments)
        assert isinstance(values, list), values
        return np.array(values)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    webdriver = pytest.importorskip("selenium.webdriver")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def end_headers(self) -> None:
            for name, value in HEADERS.items():
                self.send_header(name, value)
            super().end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    root = tmp_path_factory.mktemp("root")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    handler = functools.partial(Handler, directory=root)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        url = f"http://127.0.0.1:{server.server_address[1]}/some/where/"
        try:
            yield Site(driver, root / "some" / "where", url)
            messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
            sent = [each["params"]["request"] for each in messages if each["method"] == "Network.requestWillBeSent"]
            assert len(sent) > 10
            assert [each["url"] for each in sent if not each["url"].startswith((url, "data:"))] == []
            assert {each["method"] for each in sent} == {"GET"}
            assert driver.get_log("browser") == []
        finally:
            driver.quit()
            server.shutdown()


def in_browser(test: Any) -> Any:
    needs = pytest.mark.skipif(None in (CHROMIUM, DRIVER), reason="needs chromium and chromedriver")
    return pytest.mark.exhaustive(needs(test))


def assert_close(actual: Any, expected: Any) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def assert_same_image(actual: str, expected: str) -> None:
    """Compare bytes of images; those halfway between two numbers may be rounded to either."""
    pixels = [np.frombuffer(base64.b64decode(each), np.uint8).astype(int) for each in (actual, expected)]
    assert pixels[0].shape == pixels[1].shape
    difference = np.abs(np.subtract(*pixels))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.02


def assert_same_answers(site: Site, page: str, explorer: Explorer, network: Network, images: np.ndarray) -> None:
    """Compare all answers, for each image and both routings that the page has."""
    rng = np.random.default_rng(2)
    config = network.config
    assert site.ask(page, "api/images") == explorer.images({})
    for name in (page, "uniform"):
        described = explorer.describe_network({"model": name})
        assert site.ask(page, "api/network", {"model": name}) == json.loads(json.dumps(described))
        for image in images:
            request = {"image": base64.b64encode(image.tobytes()).decode(), "model": name}
            actual, expected = site.ask(page, "api/route", request), explorer.route(request)
            assert actual.keys() == expected.keys()
            for key in ("primary", "sources"):
                assert_close(actual[key], expected[key])
            assert len(actual["steps"]) == len(expected["steps"])
            for ours, theirs in zip(actual["steps"], expected["steps"], strict=True):
                assert ours.keys() == theirs.keys()
                for key, values in theirs.items():
                    assert_close(ours[key], values)
            if config.decoder_hidden is None:
                assert actual["reconstruction"] is None
            else:
                assert_same_image(actual["reconstruction"], expected["reconstruction"])
            step, label = (int(rng.integers(number)) for number in (len(expected["steps"]), config.num_classes))
            request |= {"step": step, "class": label}
            votes = site.ask(page, "api/voters", request), explorer.voters(request)
            assert_same_image(*(each["pixels"] for each in votes))
            if config.decoder_hidden is not None:
                pose = rng.normal(0, 0.5, config.class_dim).tolist()
                request = {"class": label, "pose": pose, "model": name}
                decoded = site.ask(page, "api/decode", request), explorer.decode(request)
                assert_same_image(*(each["reconstruction"] for each in decoded))
                assert_close(site.numbers(page, "decode", pose, label), network.decode(np.float32(pose), label).ravel())
            if name == page:
                pixels = image / np.float32(255)
                actual = site.numbers(page, "voters", pixels.ravel().tolist(), network.iterations, step, label)
                assert_close(actual, network.voters(pixels, step, label).ravel())


@in_browser
@pytest.mark.parametrize("name", NETWORKS)
def test_answers_are_those_of_jax(name, site):
    model = hot_model(**NETWORKS[name])
    images = random_images(model.config)
    explorer = explorer_of(name, model, images)
    write_static(site.folder / name, explorer, model)
    steps = explorer.route({"image": base64.b64encode(images[0].tobytes()).decode()})["steps"]
    lengths = np.array([step["activations"] for step in steps])
    assert lengths.max() > 0.3
    assert len(steps) == 1 or np.abs(lengths[-1] - lengths[0]).max() > 0.05  # routing has an effect
    assert_same_answers(site, name, explorer, Network(model), images)


@pytest.fixture(scope="module")
def shipped(site) -> tuple[Explorer, CapsNet]:
    model = capsnet_jax.load("mnist-dynamic")
    explorer = explorer_of("mnist-dynamic", model, mnist_examples()[0])
    write_static(site.folder / "mnist-dynamic", explorer, model)
    assert (site.folder / "mnist-dynamic" / "weights.bin").stat().st_size < 1e6  # in half precision
    return explorer, model


@in_browser
def test_answers_of_the_pretrained_model_are_those_of_jax(shipped, site):
    explorer, model = shipped
    assert_same_answers(site, "mnist-dynamic", explorer, Network(model), mnist_examples()[0])


@in_browser
def test_the_page_works_without_a_server(shipped, site):
    explorer, _ = shipped

    def click(selector: str) -> None:
        site.driver.execute_script("document.querySelector(arguments[0]).click()", selector)

    site.driver.get(f"{site.url}mnist-dynamic/")
    site.wait(lambda: site.text("#about").startswith("mnist-dynamic"))
    site.wait(lambda: site.driver.execute_script("return document.querySelectorAll('#examples button').length") == 20)
    click("#examples button:nth-child(8)")
    site.wait(lambda: site.text(".decoded figcaption") == "Reconstruction of class 7")
    image = explorer.images({})["images"][7]["pixels"]
    for step, activations in enumerate(each["activations"] for each in explorer.route({"image": image})["steps"]):
        click(f"#steps button:nth-child({step + 1})")
        script = "return [...document.querySelectorAll('.value')].map((each) => each.textContent)"
        assert site.driver.execute_script(script) == [f"{activation:.2f}" for activation in activations]
    site.driver.execute_script(
        """const select = document.querySelector("#beside");
        select.value = "uniform";
        select.dispatchEvent(new Event("change"))"""
    )
    site.wait(lambda: site.text(".network:nth-child(2) .decoded figcaption"))
    assert site.text("#message") == ""


@in_browser
def test_missing_weights_are_reported(shipped, site):
    shutil.copytree(site.folder / "mnist-dynamic", site.folder / "damaged")
    (site.folder / "damaged" / "weights.bin").unlink()
    site.driver.get(f"{site.url}damaged/")
    message = "The file weights.bin of this page cannot be loaded. Reload the page to try again."
    site.wait(lambda: site.text("#message") == message)
    assert all("404" in entry["message"] for entry in site.driver.get_log("browser"))  # the browser's own
