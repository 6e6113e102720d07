"""A real Chromium for the tests of the pages, and axe-core, which says what would keep people from using them.

Without chromium, chromedriver or axe-core the tests are skipped by name; with ``SLIMTRIM_TEST_SERVERS=required`` they fail.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

from tests.servers import REQUIRED

_GRAVE = ("serious", "critical")


def program(*names: str) -> str:
    """Return where one of the programs is."""
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        _missing(f"{names[0]} is not installed: apt-get install chromium chromium-driver")
    return found


def axe_script() -> str:
    """Return axe-core's text, from the package that brings it; the package itself is not loaded."""
    spec = importlib.util.find_spec("axe_playwright_python")
    if spec is None or spec.origin is None:
        _missing("axe-core is not installed: pip install --no-deps --require-hashes -r requirements-browser.txt")
    return (Path(spec.origin).parent / "axe.min.js").read_text()


def _missing(what: str) -> Any:
    if REQUIRED:
        pytest.fail(what)
    pytest.skip(f"NOT RUN: {what}")


@contextmanager
def a_browser(downloads: Path) -> Iterator[Chrome]:
    """A browser without a window, which speaks to this machine only and keeps what it downloads in a folder."""
    options = ChromeOptions()
    options.binary_location = program("chromium", "chromium-browser")
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--no-proxy-server", "--window-size=1280,900",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    driver = Chrome(options, Service(program("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def grave_faults(driver: Chrome, axe: str) -> list[str]:
    """Return what axe-core finds serious or critical on the page as it is."""
    # Through the debugger: the page's own policy lets no foreign script in.
    driver.execute_cdp_cmd("Runtime.evaluate", {"expression": axe})
    run = {"expression": "axe.run().then(r => JSON.stringify(r.violations))", "awaitPromise": True}
    answer = driver.execute_cdp_cmd("Runtime.evaluate", run)
    found = json.loads(answer["result"]["value"])
    return [
        f"{fault['id']}: {node['html'][:200]} {node.get('failureSummary', '')}"
        for fault in found
        if fault["impact"] in _GRAVE
        for node in fault["nodes"]
    ]


def show_in(driver: Chrome, scheme: str) -> None:
    """Let pages be light or dark."""
    features = [{"name": "prefers-color-scheme", "value": scheme}, {"name": "prefers-reduced-motion", "value": "reduce"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
