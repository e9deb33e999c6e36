"""A real Chromium, without a window, for the tests of the page.

This module owns the browser and what it has said. It promises one browser for all tests with a
profile of its own, that every test ends with an empty log but for what it expects (a violation of
the page's policy is in there), and that no request has left the page's own origin.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from selenium import webdriver

from support import page, picture
from support.browser import Browser

BINARY: Final = Path("/usr/bin/chromium")
DRIVER: Final = Path("/usr/bin/chromedriver")

FLAGS: Final = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1440,1000",
)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    for needed in (BINARY, DRIVER):
        assert needed.exists(), f"{needed} is missing: make setup installs it"
    options = webdriver.ChromeOptions()
    options.binary_location = str(BINARY)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def site(browser: Browser) -> Iterator[page.Site]:
    browser.clock(picture.NOW)
    with page.site() as found:
        picture.sentences(found.picture)
        yield found


@pytest.fixture
def browser(chromium: webdriver.Chrome) -> Iterator[Browser]:
    found = Browser(chromium)
    found.emulate()
    found.complaints()
    found.requested()
    yield found
    complaints, requested = found.complaints(), found.requested()
    found.close()
    assert not complaints
    assert len(requested) == 1, requested
    assert all(each.startswith("http://127.0.0.1:") for each in requested), requested
