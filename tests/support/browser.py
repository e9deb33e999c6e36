"""Chromium at one page, as tests drive it.

This module owns what a test does and sees in the browser, in few words. It promises to wait for
what is to be shown with a deadline, and to keep what the console and the network have said.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final
from urllib.parse import urlsplit

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from support import page

__all__ = ["PATIENCE", "Browser"]

PATIENCE: Final = 20.0 * float(os.environ.get("NODEAGENT_TEST_PATIENCE", "1"))
"""Seconds for the page to show something."""


class Browser:
    """Chromium at one page."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver
        self.expected: list[str] = []
        """Parts of messages in the console that a test provokes."""
        self._scripts: list[str] = []

    def open(self, site: page.Site | str, path: str = "/ui/") -> None:
        """Open the page of a site, or at an address, and wait until it has shown its answers."""
        self.driver.get((site if isinstance(site, str) else site.address) + path)
        self.wait(lambda: self.run("return document.documentElement.dataset.refreshes"))
        # Where there is a drawing: until its library has come, or is known to be missing.
        self.wait(
            lambda: self.run(
                "const d = document.getElementById('drawing');"
                "return !d || d.drawing !== undefined || d.getAttribute('role') === 'note'"
            )
        )

    def run(self, script: str, *arguments: object) -> Any:  # noqa: ANN401 - JSON
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition: Callable[[], object], patience: float = PATIENCE) -> None:
        """Return once `condition` is true, within `patience` seconds."""
        deadline = time.monotonic() + patience
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {patience} s; page: {self.text('body')}")
            time.sleep(0.02)

    def refresh(self) -> None:
        """Have the page ask again, and wait until it has shown the answer."""
        self.run("page.refresh()")
        wanted = self.run("return page.asked")
        self.wait(
            lambda: int(self.run("return document.documentElement.dataset.refreshes")) >= wanted
        )

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0]).innerText", selector))

    def rows(self) -> list[list[str]]:
        """The texts of the table's cells, as they are shown."""
        found: list[list[str]] = self.run(
            "return [...document.querySelectorAll('tbody tr')]"
            ".map(row => [...row.cells].map(cell => cell.innerText.trim()))"
        )
        return found

    def press(self, *keys: str) -> None:
        for key in keys:
            webdriver.ActionChains(self.driver).send_keys(key).perform()

    def focused(self) -> str:
        """What has the focus: its role or element, and its name."""
        return str(
            self.run(
                "const e = document.activeElement;"
                "return (e.getAttribute('role') || e.tagName.toLowerCase()) + ' ' + "
                "(e.getAttribute('aria-label') || e.labels?.[0]?.innerText.split('\\n')[0]"
                " || e.innerText.split('\\n')[0])"
            )
        ).strip()

    def tab(self, most: int = 200) -> list[str]:
        """Press Tab until the focus leaves the page; return what it has passed."""
        passed: list[str] = []
        for _ in range(most):
            self.press(Keys.TAB)
            if self.run("return document.activeElement === document.body"):
                return passed
            passed.append(self.focused())
        raise AssertionError(f"the focus never leaves the page: {passed[-5:]}")

    def drawn(self) -> dict[str, dict[str, Any]]:
        """The lines of the drawing by "caller > callee": label, classes, place on the screen."""
        lines: dict[str, dict[str, Any]] = self.run(
            "const d = document.getElementById('drawing').drawing;"
            "const box = d.box.getBoundingClientRect();"
            "return Object.fromEntries(d.cy.edges().map(e => {"
            "  const p = d.pairs.get(e.id()), m = e.midpoint(), z = d.cy.zoom(), pan = d.cy.pan();"
            "  return [p.source + ' > ' + p.destination, {label: e.data('label'),"
            "    classes: e.classes(), state: p.state, style: e.style('line-style'),"
            "    colour: e.style('line-color'), arrow: e.style('target-arrow-shape'),"
            "    x: box.x + m.x * z + pan.x, y: box.y + m.y * z + pan.y}]; }))"
        )
        return lines

    def click_at(self, x: float, y: float) -> None:
        actions = webdriver.ActionChains(self.driver)
        actions.w3c_actions.pointer_action.move_to_location(round(x), round(y))
        actions.w3c_actions.pointer_action.click()
        actions.perform()

    def emulate(self, **features: str) -> None:
        """Set media features such as prefers_color_scheme="dark"; without any: the default."""
        values = [
            {"name": name.replace("_", "-"), "value": value} for name, value in features.items()
        ]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": values})

    def clock(self, now: datetime) -> None:
        """Have pages that are opened from now on begin at `now`, until `close`."""
        source = (
            f"(begin => {{ const real = Date.now, ahead = begin - real();"
            f" Date.now = () => real() + ahead; }})({now.timestamp() * 1000})"
        )
        self._scripts.append(
            self.driver.execute_cdp_cmd(
                "Page.addScriptToEvaluateOnNewDocument", {"source": source}
            )["identifier"]
        )

    def close(self) -> None:
        """Leave the page, and forget its clock."""
        for each in self._scripts:
            self.driver.execute_cdp_cmd(
                "Page.removeScriptToEvaluateOnNewDocument", {"identifier": each}
            )
        self._scripts.clear()
        self.driver.get("about:blank")

    def complaints(self) -> list[str]:
        """What the console has said since the last call, but for what is expected."""
        said = [str(entry["message"]) for entry in self.driver.get_log("browser")]
        return [each for each in said if not any(known in each for known in self.expected)]

    def requested(self) -> set[str]:
        """The origins that something was asked of since the last call."""
        urls = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                urls.append(urlsplit(message["params"]["request"]["url"]))
        return {f"{url.scheme}://{url.netloc}" for url in urls}
