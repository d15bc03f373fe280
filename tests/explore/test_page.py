"""The page of the explorer in a real browser: what a user does, and what is then shown.

Needs selenium (the extra `explore-test`), Chromium and its driver.
"""

import base64
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from capsnet_jax.explore.server import Server
from tests.conftest import IMAGE_SHAPE
from tests.explore.conftest import NAMES

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
        self.wait(lambda: len(self.all("#examples button")) == 7)

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
        return self.one(selector).text

    def pixels(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0]).toDataURL()", selector)

    def draw(self) -> None:
        """Draw an angle by mouse."""
        drawing = self.one("#drawing")
        pen = ActionChains(self.driver, duration=30).move_to_element_with_offset(drawing, -60, -70).click_and_hold()
        pen.move_by_offset(120, 0).move_by_offset(-60, 130).release().perform()
        self.wait(lambda: self.text(".decoded figcaption"))
        self.settle()

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


@pytest.fixture(scope="module")
def page(server: Server) -> Iterator[Page]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        page = Page(driver, server.url)
        yield page
        urls = [request["url"] for request in page.all_requests()]
        assert len(urls) > 50
        assert [url for url in urls if not url.startswith(("http://127.0.0.1:", "data:"))] == []
        assert page.errors() == []
    finally:
        driver.quit()


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
    announced = f"{NAMES[int(np.argmax(answer['steps'][-1]['activations']))]} length"
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


def test_the_keyboard_alone_is_enough(page):
    page.open()
    keys = ActionChains(page.driver)
    page.run("document.activeElement.blur()")
    keys.send_keys(Keys.TAB * 2).perform()
    assert page.driver.switch_to.active_element.get_attribute("id") == "drawing"
    assert page.one("#pen").is_displayed()
    keys.send_keys(Keys.ARROW_UP * 9, Keys.SPACE, Keys.ARROW_DOWN * 18, Keys.SPACE, Keys.ARROW_RIGHT * 9).perform()
    page.wait(lambda: page.text("figcaption"))
    image = image_of(page.sent("/api/route")[-1])[..., 0]
    assert image.max() == 255
    assert image.any(axis=1).sum() > 2 * image.any(axis=0).sum()  # one upright line, as the pen was up to the right
    for _ in range(60):
        keys.send_keys(Keys.TAB).perform()
        if "row" in page.driver.switch_to.active_element.get_attribute("class").split():
            break
    keys.send_keys(Keys.TAB * 3).perform()
    page.wait(lambda: page.text("figcaption") == f"Pixels that voted for {NAMES[3]}")
    keys.send_keys(Keys.ENTER).perform()
    assert page.all(".row")[3].get_attribute("aria-pressed") == "true"


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


def test_a_large_photograph_is_scaled_down_and_another_file_is_refused(page, tmp_path):
    page.open()
    page.one("#fit").click()
    photo = np.full((3000, 4000), 250, np.uint8)
    photo[500:2500, 1800:2200] = 10
    Image.fromarray(photo).save(tmp_path / "photo.jpg")
    (tmp_path / "notes.txt").write_text("no image")
    page.one("#file").send_keys(str(tmp_path / "photo.jpg"))
    page.wait(lambda: page.text("figcaption"))
    image = image_of(page.sent("/api/route")[-1])[..., 0]
    assert page.one("#invert").is_selected()  # dark on light
    assert image[3:6, 5].min() > 200
    assert image[:, :4].max() < 30
    page.one("#file").send_keys(str(tmp_path / "notes.txt"))
    page.wait(lambda: page.text("#message") == "notes.txt is not an image that this browser can read.")


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


def test_the_page_waits_for_a_server_that_is_gone(page):
    page.open()
    condition = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.driver.execute_cdp_cmd("Network.enable", {})
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", condition | {"offline": True})
    page.all("#examples button")[0].click()
    page.wait(lambda: page.text("#message").startswith("The server does not answer. Is capsnet explore still running?"))
    assert page.text(".verdict") == "Nothing drawn yet"
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", condition | {"offline": False})
    page.wait(lambda: page.text("figcaption"))
    assert page.text("#message") == ""
    assert all("ERR_INTERNET_DISCONNECTED" in error for error in page.errors())  # the browser's own
