"""Take the pictures of docs/explorer.md: run `python docs/explorer_pictures.py`.

Needs selenium (the extra `explore-test`), Chromium and its driver.
"""

import io
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

DOCS = Path(__file__).parent
STROKE = [(-70, -80), (70, -80), (0, 90)]  # a seven; pixels from the middle of the drawing
EXAMPLE = 12  # the test image whose routing is animated
SCALE, COLOURS = 1.5, 128
# Ribbons and bars move from frame to frame of the browser. Here, they wait to be moved to a time in milliseconds.
BY_HAND = "performance.now = () => 0; requestAnimationFrame = (move) => { window.move = move; }"
STEP = "arguments[0].click(); window.bars = document.getAnimations(); for (const bar of bars) bar.pause();"
MOVE = "for (const bar of bars) bar.currentTime = arguments[0]; move(arguments[0]);"
TIMES, HELD = (0, 40, 80, 130, 190, 260, 399), 1600  # milliseconds, of a movement and of its end


def find(selector: str) -> list[WebElement]:
    return driver.find_elements(By.CSS_SELECTOR, selector)


def wait(condition: Callable[[], bool]) -> None:
    WebDriverWait(driver, 60).until(lambda _: condition())
    driver.execute_async_script("setTimeout(arguments[0], 1500)")


def settle() -> None:
    wait(lambda: all(caption.text for caption in find("figcaption")))


def open_page(width: int, height: int, scheme: str = "light") -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": SCALE, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    driver.get(url)
    wait(lambda: bool(find("#examples button")))


def draw() -> None:
    pen = ActionChains(driver, duration=100).move_to_element_with_offset(find("#drawing")[0], *STROKE[0])
    pen.click_and_hold()
    for before, after in pairwise(STROKE):
        pen.move_by_offset(after[0] - before[0], after[1] - before[1])
    pen.release().perform()
    settle()


def picture() -> Image.Image:
    return Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")


def routing_frames() -> list[tuple[Image.Image, int]]:
    """Frames of the routing of a test image, and how many milliseconds each is shown."""
    find("#examples button")[EXAMPLE].click()
    settle()
    result, maps = (find(selector)[0].rect for selector in (".result", ".flow h4"))
    box = [SCALE * side for side in (result["x"] - 16, result["y"] - 12, result["x"] + result["width"] + 16, maps["y"])]
    driver.execute_script(BY_HAND + "; document.querySelector('.poses').style.visibility = 'hidden'")
    frames: list[tuple[Image.Image, int]] = []
    for button in find("#steps button"):
        driver.execute_script(STEP, button)
        settle()
        for before, time in pairwise(TIMES if frames else TIMES[-2:]):
            driver.execute_script(MOVE, time)
            frames.append((picture().crop(box), time - before))
        frames[-1] = (frames[-1][0], HELD)
    return frames


options = webdriver.ChromeOptions()
for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars"):
    options.add_argument(argument)
command = [sys.executable, "-m", "capsnet_jax", "explore", "--no-browser"]
with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, webdriver.Chrome(options) as driver:
    url = server.stdout.readline().split()[3]
    open_page(1280, 985)
    draw()
    picture().quantize(COLOURS).save(DOCS / "explorer.png", optimize=True)

    open_page(1280, 1140, scheme="dark")
    Select(find("#beside")[0]).select_by_value("uniform")
    wait(lambda: len(find(".network")) == 2)
    draw()
    picture().quantize(COLOURS).save(DOCS / "explorer-two-routings.png", optimize=True)

    open_page(1230, 780)
    frames, durations = zip(*routing_frames(), strict=True)
    palette = frames[-1].quantize(COLOURS)
    first, *others = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    first.save(DOCS / "routing.gif", save_all=True, append_images=others, duration=durations, loop=0, optimize=True)
    server.terminate()
