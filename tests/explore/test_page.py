"""The page of the explorer in a real browser: what a user does, and what is then shown.

Needs selenium (the extra `explore-test`), Chromium and its driver.
"""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from capsnet_jax.explore.explorer import Explorer, mnist_examples
from capsnet_jax.explore.server import Server
from tests.conftest import IMAGE_SHAPE
from tests.explore.conftest import NAMES, hot_model, serving

pytest.importorskip("selenium")
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(None in (CHROMIUM, DRIVER), reason="needs chromium and chromedriver"),
]
LENGTH = re.compile(r"v([\d.e-]+)")  # width of a ribbon at its end


class Page:
    """The page in a browser, and the requests that it sent."""

    def __init__(self, driver: webdriver.Chrome, url: str):
        self.driver, self.url = driver, url
        self._requests: list[dict[str, Any]] = []

    def open(self, *, width: int = 1200, dark: bool = False) -> None:
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        motion = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme, motion]})
        self.driver.get(self.url)
        self.wait(lambda: self.all("#examples button"))

    def one(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition: Callable[[], Any]) -> None:
        WebDriverWait(self.driver, 20, poll_frequency=0.05).until(lambda _: condition())

    def settle(self) -> None:
        """Wait until the page has asked nothing for half a second."""
        number = -1
        while number != (number := len(self.all_requests())):
            time.sleep(0.5)

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0]).innerText", selector)

    def pixels(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0]).toDataURL()", selector)

    def draw(self, *, across: int = 120) -> None:
        """Draw a seven by mouse, or its mirror image if `across` is negative."""
        drawing = self.one("#drawing")
        pen = ActionChains(self.driver, duration=30).move_to_element_with_offset(drawing, -across // 2, -70)
        pen.click_and_hold().move_by_offset(across, 0).move_by_offset(-across // 2, 130).release().perform()
        self.wait(lambda: self.text("figcaption"))
        self.settle()

    def press(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def tab_to(self, selector: str) -> None:
        """Press Tab until the element has the focus."""
        for _ in range(100):
            if self.run("return document.activeElement.matches(arguments[0])", selector):
                return
            self.press(Keys.TAB)
        raise AssertionError(f"{selector} is not reached by Tab")

    def slide(self, selector: str, value: float) -> None:
        script = "const [slider, value] = arguments; slider.value = value; slider.dispatchEvent(new Event('input'))"
        self.run(script, self.one(selector), value)

    def lengths(self) -> list[str]:
        return [each.text for each in self.all(".row .value")]

    def sent(self, path: str) -> list[dict[str, Any]]:
        """The bodies of all requests to a path, in order."""
        return [json.loads(each["postData"]) for each in self.all_requests() if each["url"].endswith(path)]

    def all_requests(self) -> list[dict[str, Any]]:
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                self._requests.append(message["params"]["request"])
        return self._requests

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


@contextmanager
def browser(url: str, *, expected_error: str = "none") -> Iterator[Page]:
    """Open a browser, which may ask nobody but the server, and whose console stays empty."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        page = Page(driver, url)
        yield page
        urls = [request["url"] for request in page.all_requests()]
        assert len(urls) > 10
        assert [url for url in urls if not url.startswith((page.url, "data:"))] == []
        assert [error for error in page.errors() if expected_error not in error] == []
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def page(server: Server) -> Iterator[Page]:
    with browser(server.url) as page:
        yield page


def test_an_empty_drawing_says_so(page):
    page.open()
    assert page.text(".verdict") == "Nothing drawn yet"
    page.wait(lambda: page.run("return document.querySelector('#prediction').textContent") == "Nothing drawn yet.")
    assert set(page.lengths()) == {"0.00"}
    assert page.all(".ribbons path") == []
    page.draw()
    page.one("#clear").click()
    page.wait(lambda: page.text(".verdict") == "Nothing drawn yet")


def test_a_drawing_is_routed_and_its_numbers_are_those_of_the_model(page, explorer):
    page.open()
    page.draw()
    answer = explorer.route(page.sent("/api/route")[-1])
    for button, step in zip(page.all("#steps button"), answer["steps"], strict=True):
        button.click()
        assert button.get_attribute("aria-pressed") == "true"
        assert page.lengths() == [f"{activation:.2f}" for activation in step["activations"]]
        predicted = int(np.argmax(step["activations"]))
        assert page.text(".verdict b") == NAMES[predicted]
        for view, received in (("group", step["by_group"]), ("position", step["by_position"])):
            page.one(f"[data-view={view}]").click()
            ribbons = [path.get_attribute("d") for path in page.all(".ribbons path")]
            widths = np.array([float(match[1]) if (match := LENGTH.search(d)) else 0.0 for d in ribbons])
            received = np.ravel(received)
            scale = widths.max() / received.max()
            np.testing.assert_allclose(widths, scale * received, atol=0.101)  # thinner ones are not drawn
            assert widths.max() > 1
    announced = f"{NAMES[int(np.argmax(answer['steps'][-1]['activations']))]} activation"
    page.wait(lambda: announced in page.run("return document.querySelector('#prediction').textContent"))
    assert page.text("#time").startswith("Routed in ")


def test_the_pointed_class_shows_its_votes_and_its_reconstruction(page, explorer):
    page.open()
    page.draw()
    image = page.sent("/api/route")[-1]["image"]
    for place in (2, 6):
        ActionChains(page.driver).move_to_element(page.all(".row")[place]).perform()
        page.wait(lambda place=place: page.text(".decoded figcaption") == f"Reconstruction of {NAMES[place]}")
        assert page.text("figcaption") == f"Pixels that voted for {NAMES[place]}"
        sent = page.sent("/api/voters")[-1]
        assert (sent["image"], sent["class"], sent["step"]) == (image, place, 2)
        on = page.run("return [...document.querySelectorAll('.ribbons path')].map((path) => path.matches('.on'))")
        assert on == [place == o for _ in range(2) for o in range(len(NAMES))]
    page.all(".row")[6].click()
    ActionChains(page.driver).move_to_element(page.one("h1")).perform()
    assert page.all(".row")[6].get_attribute("aria-pressed") == "true"
    assert page.text("figcaption") == f"Pixels that voted for {NAMES[6]}"


def test_a_slider_of_the_pose_changes_the_reconstruction(page):
    page.open()
    page.draw()
    before = page.pixels(".reconstruction")
    pose = page.sent("/api/decode")[-1]["pose"]
    page.slide(".poses label:nth-child(3) input", 0.5)
    page.wait(lambda: page.pixels(".reconstruction") != before)
    changed = np.subtract(page.sent("/api/decode")[-1]["pose"], pose)
    np.testing.assert_allclose(changed, [0, 0, 0.5, 0, 0], atol=1e-9)
    page.one(".poses button").click()
    page.wait(lambda: page.pixels(".reconstruction") == before)


def image_of(request: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(request["image"]), np.uint8).reshape(IMAGE_SHAPE)


def test_a_test_image_is_sent_as_it_is_until_a_slider_changes_it(page, explorer):
    page.open()
    page.all("#examples button")[1].click()
    page.wait(lambda: page.text("figcaption"))
    sent = page.sent("/api/route")[-1]
    assert sent["image"] == explorer.images({})["images"][1]["pixels"]
    image = image_of(sent)
    for name, value, expected in (
        ("rotate", 180, image[::-1, ::-1]),
        ("right", 5 / 11, np.pad(image, ((0, 0), (5, 0), (0, 0)))[:, :11]),
        ("noise", 0.3, None),
    ):
        page.one("#reset").click()
        page.slide(f"#{name}", value)
        page.wait(lambda: not np.array_equal(image_of(page.sent("/api/route")[-1]), image))
        changed = image_of(page.sent("/api/route")[-1]).astype(int)
        if expected is None:
            assert 30 < np.abs(changed - image).mean() < 90
        else:
            assert np.abs(changed - expected).mean() < 25  # interpolation at the edges of pixels


def test_the_keyboard_alone_is_enough(page, explorer):
    page.open()
    page.tab_to("#beside")
    page.press("unif")  # chooses uniform
    page.wait(lambda: len(page.all(".network")) == 2)
    page.tab_to("#drawing")
    assert page.one("#pen").is_displayed()
    page.press(Keys.ARROW_UP * 9, Keys.SPACE, Keys.ARROW_DOWN * 18, Keys.SPACE, Keys.ARROW_RIGHT * 9)
    page.wait(lambda: page.text(".network:nth-child(2) .decoded figcaption"))
    page.settle()
    image = image_of(page.sent("/api/route")[-1])[..., 0]
    assert image.max() == 255
    assert image.any(axis=1).sum() > 2 * image.any(axis=0).sum()  # one upright line, as the pen was up to the right
    page.tab_to("#examples button:nth-child(2)")
    page.press(Keys.ENTER)
    page.settle()
    assert page.sent("/api/route")[-1]["image"] == explorer.images({})["images"][1]["pixels"]
    page.tab_to("#rotate")
    page.press(Keys.HOME)
    assert page.text("#rotate + output") == "-180°"
    page.tab_to("#steps button")
    page.press(Keys.ENTER)
    assert page.all("#steps button")[0].get_attribute("aria-pressed") == "true"
    page.tab_to("[data-view=position]")
    page.press(Keys.SPACE)
    assert len(page.all(".network:nth-child(1) .ribbons path")) == 12 * len(NAMES)
    page.tab_to(".row:nth-child(4)")
    page.wait(lambda: page.text("figcaption") == f"Pixels that voted for {NAMES[3]}")
    page.press(Keys.ENTER)
    assert page.all(".row")[3].get_attribute("aria-pressed") == "true"
    page.settle()
    before = page.pixels(".reconstruction")
    page.tab_to(".poses label:nth-child(2) input")
    page.press(Keys.END)
    page.wait(lambda: page.pixels(".reconstruction") != before)


def test_controls_have_names_for_screen_readers(page):
    page.open()
    page.draw()
    tree = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node["ignored"]]
    roles = {"button", "slider", "checkbox", "combobox", "application", "image", "img", "group", "article"}
    assert [role for role, name in named if role in roles and not name] == []
    for expected in (
        ("button", "Iteration 2"),
        ("slider", "Rotate"),
        ("slider", "Add to dimension 3 of the pose"),
        ("button", f"Class {NAMES[4]}, activation {page.lengths()[4]}"),
        ("button", "Test image 2, of class d"),
        ("application", "Drawing"),
    ):
        assert expected in named


@pytest.mark.parametrize("width", [360, 800, 1600])
def test_the_page_fits_its_window(width, page):
    page.open(width=width)
    page.draw()
    assert page.run("return document.documentElement.scrollWidth") <= width
    for selector in (".ribbons", ".rows", ".maps", ".seen", ".poses"):
        box = page.one(selector).rect
        assert 0 <= box["x"] < box["x"] + box["width"] <= width
        assert box["width"] > 50


def test_colours_follow_the_setting_of_the_system(page):
    brightness = []
    for dark in (False, True):
        page.open(dark=dark)
        paper, ink = (
            sum(map(int, re.findall(r"\d+", page.one("body").value_of_css_property(name))[:3]))
            for name in ("background-color", "color")
        )
        assert abs(paper - ink) > 500
        brightness.append(paper)
    assert brightness[0] > 700 > 100 > brightness[1]


DROP = """
    const [content, name] = arguments, data = new DataTransfer();
    data.items.add(new File([Uint8Array.from(atob(content), (each) => each.charCodeAt(0))], name));
    document.querySelector("#pad").dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true }));
"""


def test_a_large_photograph_is_scaled_down_and_another_file_is_refused(page, tmp_path):
    page.open()
    page.one("#fit").click()
    photo = np.full((3000, 4000), 250, np.uint8)
    photo[500:2500, 1800:2200] = 10
    content = io.BytesIO()
    Image.fromarray(photo).save(content, "JPEG")
    (tmp_path / "notes.txt").write_text("no image")
    page.run(DROP, base64.b64encode(content.getvalue()).decode(), "photo.jpg")
    page.wait(lambda: page.text("figcaption"))
    image = image_of(page.sent("/api/route")[-1])[..., 0]
    assert page.one("#invert").is_selected()  # dark on light
    assert image[3:6, 5].min() > 200
    assert image[:, :4].max() < 30
    page.one("#file").send_keys(str(tmp_path / "notes.txt"))
    page.wait(lambda: page.text("#message") == "notes.txt is not an image that this browser can read.")
    page.run(DROP, base64.b64encode(b"nor this").decode(), "notes.png")
    page.wait(lambda: page.text("#message") == "notes.png is not an image that this browser can read.")


def test_another_routing_is_shown_beside_it(page, explorer):
    page.open()
    page.draw()
    page.run("const select = document.querySelector('#beside'); select.value = 'uniform';"
             "select.dispatchEvent(new Event('change'))")  # fmt: skip
    page.wait(lambda: len(page.all(".network .decoded figcaption")) == 2)
    page.wait(lambda: page.all(".network .decoded figcaption")[1].text)
    assert [title.text for title in page.all(".network h3")] == ["small (dynamic)", "uniform"]
    answer = explorer.route({"image": page.sent("/api/route")[-1]["image"], "model": "uniform"})
    other = [each.text for each in page.all(".network:nth-child(2) .value")]
    assert other == [f"{activation:.2f}" for activation in answer["steps"][0]["activations"]]
    first = [each.text for each in page.all(".network:nth-child(1) .value")]
    assert first != other
    page.all("#steps button")[0].click()
    assert [each.text for each in page.all(".network:nth-child(1) .value")] == other  # one iteration is uniform routing


def test_a_model_without_decoder_has_no_reconstructions():
    models = {"plain": hot_model(decoder_hidden=None)}
    with serving(Explorer(models, NAMES, examples=mnist_examples)) as server, browser(server.url) as page:
        page.open()
        page.draw()
        assert page.text(".network").endswith("This model has no decoder, so there are no reconstructions.")
        assert page.text("figcaption").startswith("Pixels that voted for ")
        assert page.all(".reconstruction, .poses") == []
        assert page.sent("/api/decode") == []


def test_two_browsers_show_each_its_own_drawing(page, server, explorer):
    with browser(server.url) as other:
        for each in (page, other):
            each.open()
        page.draw()
        other.draw(across=-120)
        for each in (page, other):
            each.all("#steps button")[1].click()
        requests = [each.sent("/api/route")[-1] for each in (page, other)]
        assert requests[0] != requests[1]
        for each, request in zip((page, other), requests, strict=True):
            step = explorer.route(request)["steps"][1]
            assert each.lengths() == [f"{activation:.2f}" for activation in step["activations"]]


@contextmanager
def command(*arguments: str) -> Iterator[str]:
    """Run `capsnet explore`, and kill it at the end; gives the address that it prints."""
    words = [sys.executable, "-m", "capsnet_jax", "explore", "--no-browser", *arguments]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("Explore mnist-dynamic at http://127.0.0.1:")
            yield line.split()[3]
        finally:
            process.kill()


def test_a_newcomer_draws_a_seven_and_the_page_waits_for_a_server_that_is_gone():
    with ExitStack() as stack:
        with command() as url:
            page = stack.enter_context(browser(url, expected_error="net::ERR_"))
            page.open()
            page.draw()
            assert page.text(".verdict b") == "7"
        page.all("#examples button")[0].click()
        question = "The server does not answer. Is capsnet explore still running?"
        page.wait(lambda: page.text("#message").startswith(question))
        assert page.text(".verdict b") == "7"
        with command("--port", str(urlsplit(url).port)):
            page.wait(lambda: page.text(".verdict b") == "0")
            assert page.text("#message") == ""
