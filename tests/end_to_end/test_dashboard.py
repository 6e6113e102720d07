"""The dashboard in a real Chromium, before a real service whose library is a stand-in: what people do, and what they meet."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from jobs.keys import new_key
from tests.api.checkpoints import write_mixtral
from tests.end_to_end.browser import a_browser, axe_script, grave_faults, show_in
from tests.worker.stand import Stand, a_stand
from tests.worker.test_serve import free_port

_HANGS_S = 40


@dataclass
class House:
    """A service, a browser before it, and the words in which the tests speak of both."""

    stand: Stand
    client: httpx.Client
    driver: Chrome
    model: str
    downloads: Path
    axe: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.stand.settings.port}"

    def open(self, path: str) -> None:
        self.driver.get(self.url + path)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """What an element says; one that was replaced as it was read, which live pages do, is read again."""
        return self.wait(lambda: [self.one(selector).text], selector)[0]

    def click(self, selector: str) -> None:
        self.wait(lambda: [self.one(selector).click()], f"{selector} to click")

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        ignored = [StaleElementReferenceException]
        return WebDriverWait(self.driver, _HANGS_S, 0.05, ignored).until(lambda _: condition(), f"waited in vain for: {what}")

    def post(self, **plan: Any) -> str:
        body = {
            "model": self.model, "recipe": {"steps": [{"step": "quantize"}]}, "labels": {"team": "search"},
            "calibration": {"source": {"inline": [json.dumps(plan)]}},
        }  # fmt: skip
        answer = self.client.post("/v1/jobs", json=body)
        assert answer.status_code == 201, answer.text
        return answer.json()["id"]

    def faults_of_page(self) -> list[str]:
        """What axe, the console and the list of what was fetched say against the page, in light and dark."""
        found: list[str] = []
        for scheme in ("light", "dark"):
            show_in(self.driver, scheme)
            found += [f"{scheme}: {fault}" for fault in grave_faults(self.driver, self.axe)]
        found += [entry["message"] for entry in self.driver.get_log("browser")]
        names = self.driver.execute_script("return performance.getEntries().map(e => e.name)")
        return found + [name for name in names if "://" in name and not name.startswith(self.url)]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("house")
    downloads = folder / "downloads"
    downloads.mkdir()
    axe = axe_script()
    with a_stand(folder, PORT=free_port()) as stand, a_browser(downloads) as driver:
        model = write_mixtral(folder / "models" / "mixtral")
        stand.start("api")
        stand.start_worker()
        stand.start("worker.maintenance")
        with closing(served(stand)) as client:
            yield House(stand, client, driver, model.as_uri(), downloads, axe)


def served(stand: Stand) -> httpx.Client:
    """Return a client of the API that the stand started, once it answers."""
    client = httpx.Client(base_url=f"http://127.0.0.1:{stand.settings.port}", trust_env=False, timeout=120)

    def answers() -> bool:
        try:
            return client.get("/livez").status_code == 200
        except httpx.TransportError:
            return False

    stand.wait(answers, "the API")
    return client


def test_the_first_page_says_how_to_begin_and_is_sound(house: House):
    house.open("/")

    assert "No jobs yet" in house.text("main")
    assert f"curl {house.url}/v1/jobs" in house.text("pre")
    assert house.faults_of_page() == []


def test_the_form_plans_as_one_types_and_its_job_is_watched_to_the_end(house: House):
    house.open("/new")
    house.one("#model").send_keys(house.model)
    house.wait(lambda: "Choose a target between 135 kB and 3.73 MB" in house.text("#plan"), "the range of targets")
    house.one("#target").send_keys("100KB")
    house.wait(lambda: "smallest possible is 135072" in house.text("#fault-target_memory"), "the refusal beside its field")
    assert house.one("#target").get_attribute("aria-invalid") == "true"
    assert house.faults_of_page() == []
    house.one("#target").clear()
    house.one("#target").send_keys("1MB")
    house.wait(lambda: "It fits" in house.text("#plan"), "a plan that fits")
    assert house.one("#plan svg[role=img]").is_displayed()
    assert house.faults_of_page() == []
    house.click("details.more summary")
    house.one("#calibration_text").send_keys(json.dumps({"blocks": 12, "block_s": 0.4}))
    house.click("form.draft .strong")
    house.wait(lambda: "/jobs/job_" in house.driver.current_url, "the job's page")

    house.driver.execute_script("window.notLoadedAgain = true")
    bar = "[data-piece=progress] progress"
    house.wait(lambda: house.all(bar) and 0.1 < float(house.one(bar).get_attribute("value")) < 0.9, "progress")
    house.wait(lambda: re.search(r"block \d+ of 12(.|\n)* left", house.text("[data-piece=progress]")), "a block, and an estimate")
    assert house.faults_of_page() == []
    house.wait(lambda: "succeeded" in house.text("[data-piece=status]"), "the end")

    assert house.driver.execute_script("return window.notLoadedAgain"), "the page was loaded again"
    assert house.text("#said") == "succeeded"
    assert "job.succeeded" in house.text("[data-piece=events]")
    assert house.all(bar) == []


def test_a_file_of_the_artifact_is_the_file_and_the_report_opens(house: House):
    job_id = house.post(blocks=2)
    house.stand.wait_over(job_id)
    house.open(f"/jobs/{job_id}")
    row = next(row for row in house.all(".files tbody tr") if "block-2.bin" in row.text)
    row.find_element(By.TAG_NAME, "a").click()
    file = house.downloads / "block-2.bin"
    house.wait(file.exists, "the download")

    assert hashlib.sha256(file.read_bytes()).hexdigest() in row.text
    assert house.faults_of_page() == []
    house.click(".actions a.strong")
    house.wait(lambda: house.driver.current_url.endswith("/report"), "the report")
    assert "What was lost, the worst first" in house.text("main")
    assert house.faults_of_page() == []
    ActionChains(house.driver).move_to_element(house.one(".map img")).perform()
    assert re.match(r"Block \d+, expert \d+: ", house.text(".hint")), "its policy lets its own script run"


def test_a_job_is_cancelled_and_retried_by_its_buttons(house: House):
    job_id = house.post(blocks=400, block_s=0.1)
    house.open(f"/jobs/{job_id}")
    house.wait(lambda: "running" in house.text("[data-piece=status]"), "the start")
    house.click(".confirm summary")
    house.click(".confirm[open] .strong")
    house.wait(lambda: "cancelled" in house.text("[data-piece=status]"), "the end")

    assert house.stand.job(job_id).status == "cancelled"
    assert house.faults_of_page() == []
    house.click(".confirm summary")
    house.click(".confirm[open] .strong")
    house.wait(lambda: "/jobs/job_" in house.driver.current_url and job_id not in house.driver.current_url, "the new job")
    assert house.text(f'[data-piece=facts] a[href="/jobs/{job_id}"]') == job_id
    house.client.post(f"{api_path(house)}/cancel")


def test_the_list_moves_by_itself_and_is_filtered(house: House):
    job_id = house.post(blocks=8, block_s=0.3)
    house.open("/?label=team%3Dsearch")
    row = f'[data-job="{job_id}"]'
    house.wait(lambda: house.all(f"{row} progress"), "progress")
    assert house.faults_of_page() == []
    house.wait(lambda: "succeeded" in house.text(row), "the end")
    house.open("/?status=expired")

    assert "No job of yours is like that" in house.text("main")


def test_a_job_is_made_with_the_keyboard_alone(house: House):
    house.open("/")
    press(house, Keys.TAB)
    assert house.driver.switch_to.active_element.text == "Skip to content"
    press(house, Keys.ENTER)
    tab_to(house, "New job")
    press(house, Keys.ENTER)
    house.wait(lambda: house.driver.current_url.endswith("/new"), "the form")
    house.wait(lambda: house.driver.switch_to.active_element.get_attribute("id") == "model", "the first field")
    press(house, house.model)
    for _ in range(3):
        press(house, Keys.TAB)
    press(house, "2MB")
    tab_to(house, "Create job")
    press(house, Keys.ENTER)
    house.wait(lambda: "/jobs/job_" in house.driver.current_url, "the job's page")

    job = house.client.get(api_path(house)).json()
    assert (job["request"]["model"], job["request"]["target_memory"]) == (house.model, 2_000_000)


@pytest.mark.parametrize("path", ["/", "/new", "/nowhere"])
def test_a_narrow_screen_shows_everything_without_scrolling_sideways(house: House, path: str):
    metrics = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    house.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        house.open(path)
        assert house.driver.execute_script("return document.documentElement.scrollWidth") <= 400
        assert [fault for fault in house.faults_of_page() if "404" not in fault] == []
    finally:
        house.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_key_opens_a_session_and_the_page_without_one_is_the_door(house: House, tmp_path: Path):
    key, entry = new_key("ann")
    with a_stand(tmp_path, PORT=free_port(), API_KEYS=entry) as stand:
        process: subprocess.Popen[bytes] = stand.start("api")
        with closing(served(stand)) as client:
            locked = House(stand, client, house.driver, house.model, house.downloads, house.axe)
            locked.open("/new")
            assert "/sign-in" in house.driver.current_url
            assert locked.faults_of_page() == []
            locked.one("#key").send_keys("slim_wrong", Keys.ENTER)
            locked.wait(lambda: "not one of this service" in locked.text("main"), "the refusal")
            locked.driver.get_log("browser")  # which tells of the 401
            locked.one("#key").send_keys(key, Keys.ENTER)
            locked.wait(lambda: locked.all("#draft"), "the page that was asked for")
            assert locked.faults_of_page() == []
            assert key not in str(house.driver.get_cookies())
            locked.one(".out button").click()
            locked.wait(lambda: locked.all("#key"), "the door")
            locked.open("/")
            assert "/sign-in" in house.driver.current_url
        assert process.poll() is None


def api_path(house: House) -> str:
    return "/v1" + urlsplit(house.driver.current_url).path


def press(house: House, keys: str) -> None:
    ActionChains(house.driver).send_keys(keys).perform()


def tab_to(house: House, name: str) -> None:
    for _ in range(40):
        press(house, Keys.TAB)
        if house.driver.switch_to.active_element.text == name:
            return
    raise AssertionError(f"the keyboard does not reach {name!r}")
