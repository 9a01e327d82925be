"""The pages in headless Chromium, on a server that works: live data, no errors, readable on laptop and phone.

Needs Chromium and its driver (Debian: chromium, chromium-driver). Screenshots are kept in build/screenshots.
"""

import json
import shutil
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes.look import DEADLINE
from tests.server.server_process import ServerProcess

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not CHROMIUM or not DRIVER, reason="needs the packages chromium and chromium-driver"),
]
SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
SIZES = {"laptop": (1280, 1100), "phone": (390, 844)}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server that streams a few long answers all the time."""
    with ServerProcess(tmp_path_factory.mktemp("server"), "--plan", "1+2") as process:
        url = process.wait_until_ready()
        stop = threading.Event()
        threads = [threading.Thread(target=keep_busy, args=(url, stop)) for _ in range(3)]
        for thread in threads:
            thread.start()
        yield url
        stop.set()
        for thread in threads:
            thread.join()


def keep_busy(url: str, stop: threading.Event) -> None:
    body = {"prompt": "A list is", "max_tokens": 900, "ignore_eos": True, "stream": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    while not stop.is_set():
        with urllib.request.urlopen(request, timeout=DEADLINE) as answer:
            for _ in answer:
                if stop.is_set():
                    return


class Browser:
    """One page of Chromium."""

    def __init__(self, folder: Path) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM or ""
        flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
        for flag in (*flags, f"--user-data-dir={folder}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))

    def look(self, url: str, device: str, scheme: str) -> None:
        width, height = SIZES[device]
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": device == "phone"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get(url)

    def evaluate(self, expression: str) -> Any:
        return self.driver.execute_script(f"return {expression}")

    def until(self, expression: str, holds: Callable[[Any], bool] = bool) -> Any:
        """The value of an expression, as soon as it is as wanted."""
        deadline = time.monotonic() + DEADLINE
        while not holds(value := self.evaluate(expression)):
            assert time.monotonic() < deadline, f"{expression} stays {value!r}; console: {self.console()}"
            time.sleep(0.05)
        return value

    def text(self, selector: str) -> str:
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).textContent"))

    def console(self) -> list[Any]:
        return [entry for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]

    def keep(self, name: str) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(str(SCREENSHOTS / f"{name}.png"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.driver.quit()


def count(selector: str) -> str:
    return f"document.querySelectorAll({json.dumps(selector)}).length"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", ["laptop", "phone"])
def test_the_fleet_page_is_filled_from_live_data(server: str, browser: Browser, device: str, scheme: str) -> None:
    browser.look(f"{server}/fleet", device, scheme)
    browser.until("document.getElementById('running').textContent", lambda text: text.isdigit() and int(text) > 0)
    assert browser.text("#state") == "ready"
    assert browser.evaluate(count("#devices .card")) == 3
    assert browser.text("#devices .card strong") == "rank 0: primary"
    browser.until(count("#map .sequence"), lambda found: found >= 1)
    groups = browser.evaluate("document.querySelector('#map .cells').querySelectorAll('[data-rank]').length")
    assert groups >= 2
    ranks = "[...document.querySelectorAll('#map [data-rank]')].map((cell) => cell.dataset.rank)"
    assert {"0", "1", "2"} == set(browser.evaluate(ranks)), "even dispatch uses every rank"
    browser.until(count("#links tr"), lambda found: found == 4)  # two links, both ways
    browser.until("parseFloat(document.getElementById('output-rate').textContent)", lambda rate: rate > 0)
    browser.until("document.querySelector('#throughput polyline').points.length", lambda points: points >= 2)
    steps = int(browser.text("#step"))
    browser.until("parseInt(document.getElementById('step').textContent)", lambda now: now > steps)
    assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing is cut off"
    browser.keep(f"fleet-{device}-{scheme}")
    assert browser.console() == []


@pytest.mark.parametrize("device", ["laptop", "phone"])
def test_the_chat_page_streams_an_answer(server: str, browser: Browser, device: str) -> None:
    browser.look(f"{server}/", device, "light")
    browser.until("document.getElementById('model').textContent", lambda name: name == "hetis-small")
    assert browser.evaluate("document.getElementById('mode').value") == "text", "the model has no chat template"
    send(browser, "A list is")
    browser.until("document.querySelector('.message.assistant').textContent")
    browser.until("document.getElementById('note').textContent", lambda note: "tokens/s" in note)
    assert browser.evaluate("document.getElementById('stop').hidden"), "the answer is complete"
    assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    browser.keep(f"chat-{device}")
    assert browser.console() == []


def test_an_answer_can_be_stopped_and_an_error_is_shown(server: str, browser: Browser) -> None:
    browser.look(f"{server}/", "laptop", "dark")
    browser.until("document.getElementById('model').textContent")
    browser.evaluate("(document.getElementById('max-tokens').value = 900)")
    send(browser, "A list is")
    browser.until("document.querySelector('.message.assistant').textContent")
    browser.evaluate("document.getElementById('stop').click()")
    browser.until("document.getElementById('stop').hidden")
    browser.evaluate("(document.getElementById('temperature').value = 9)")
    send(browser, "A tuple is")
    message = browser.until("document.querySelector('.message.error')?.textContent")
    assert message.startswith("temperature is 9")
    browser.console()  # Chromium itself reports the status 400 there


def send(browser: Browser, text: str) -> None:
    from selenium.webdriver.common.by import By

    browser.driver.find_element(By.ID, "prompt").send_keys(f"{text}\n")


def test_with_a_key_a_browser_is_asked_for_it(directory: Path, browser: Browser) -> None:
    with ServerProcess(directory, HETIS_API_KEY="secret") as process:
        url = process.wait_until_ready()
        browser.look(url.replace("http://", "http://any:secret@") + "/fleet", "laptop", "light")
        browser.look(f"{url}/fleet", "laptop", "light")  # a page may not fetch from an address that has a password
        browser.until("document.getElementById('state').textContent", lambda state: state == "ready")
