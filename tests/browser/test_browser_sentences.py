"""The sentences exercise as a person follows it on the page: traffic, errors, padlocks.

The lab is the exercise's own, with all pods on one node, so that one page has all of it. Its steps
are done as the exercise does them, while calls go on as in its text, and after each of them the
page must show what the text says that one sees.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Self

import msgspec
import pytest
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from nodeagent.lab import Lab, LabSpec
from nodeagent.lab.steps import MutualTls
from nodeagent.rundir import ADMIN_SOCKET
from support import page, picture
from support.browser import PATIENCE, Browser
from support.e2e import running
from support.forward import forwarded

pytestmark = [pytest.mark.netns, pytest.mark.slow]

PAUSE: Final = 0.2
"""Seconds between two calls."""

PICTURES: Final = os.environ.get("NODEAGENT_PICTURES", "")
"""Directory for pictures of the page, for the documentation; empty: none are made. They show the
window that a person chooses, for whose end the test then waits after each step."""

CHOSEN, SHORTEST = 60, 5
"""Seconds of a window: one that the page offers, and one after which what was before a step has
soon gone."""

CLIENT, SENTENCES, AGE = "default/client", "default/sentences", "default/age"
NAME_V1, NAME_V2 = "default/name-v1", "default/name-v2"

Row = dict[str, str]
Rows = dict[tuple[str, str], Row]


class OneNode(MutualTls):
    """The exercise, all on one node."""

    @classmethod
    def described(cls) -> LabSpec:
        spec = super().described()
        (node, *_) = spec.nodes
        pods = tuple(msgspec.structs.replace(pod, node=node.name) for pod in spec.pods)
        return msgspec.structs.replace(spec, nodes=(node,), pods=pods)


class Viewer:
    """Somebody who looks at the page while calls go on."""

    def __init__(self, lab: Lab, browser: Browser) -> None:
        self.browser = browser
        self._lab = lab
        self._exercise = OneNode(lab, print)
        self._steps = iter(enumerate(self._exercise.steps(), start=1))
        self._ending = threading.Event()
        self._calling = threading.Thread(target=self._call)

    def __enter__(self) -> Self:
        self._calling.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._calling.join()

    def _call(self) -> None:
        while not self._ending.wait(PAUSE):
            self._lab.run(CLIENT, ["curl", "-sS", "--max-time", "5", "sentences:5000"])

    def step(self, title: str) -> None:
        """Do the exercise's next step, which is called so."""
        number, step = next(self._steps)
        assert step.title == title
        done = self._exercise.step(number, step)
        assert not [claim.text for claim in done.claims if not claim.holds]

    def sees(self, what: Callable[[Rows], object]) -> Rows:
        """Look at the table again and again until it shows `what`; return what it shows."""
        found: Rows = {}

        def shown() -> object:
            self.browser.refresh()
            found.clear()
            found.update(self._rows())
            return what(found)

        # On a busy machine calls are few: both versions of `name` must be in one window.
        self.browser.wait(shown, CHOSEN + PATIENCE)
        return found

    def _rows(self) -> Rows:
        names = [each.text for each in self.browser.all("#view thead th")]
        rows = [dict(zip(names, row, strict=True)) for row in self.browser.rows()]
        return {(row["Caller"], row["Callee"]): row for row in rows}

    def picture(self, name: str) -> None:
        """Arrange the drawing, as somebody does who wants to see all of it, and keep it."""
        if PICTURES:
            self.sees(lambda _: not self.browser.all("#view .notice"))
        self.browser.one("button[aria-label='Arrange anew']").click()
        if PICTURES:
            self.browser.driver.save_screenshot(str(Path(PICTURES) / f"{name}.png"))


@pytest.fixture
def viewer(browser: Browser) -> Iterator[Viewer]:
    with running(OneNode.described()) as lab:
        socket = lab.layout.run(lab.nodes[0].name) / ADMIN_SOCKET
        with forwarded(socket) as address, Viewer(lab, browser) as found:
            browser.open(page.Site(address, picture.Picture()))
            Select(browser.one("#window")).select_by_value(str(CHOSEN))
            if not PICTURES:
                browser.run("page.view.seconds = arguments[0]", SHORTEST)
            yield found


def padlocks(rows: Rows) -> dict[tuple[str, str], str]:
    return {ends: row["Padlock"] for ends, row in rows.items()}


def test_browser_follows_the_sentences_exercise(viewer: Viewer) -> None:
    viewer.step("Deploy the sentences application, without sidecars")
    viewer.sees(lambda rows: padlocks(rows) == {(CLIENT, SENTENCES): "none"})

    viewer.step("peer-auth/strict.yaml")
    viewer.sees(lambda rows: padlocks(rows) == {(CLIENT, SENTENCES): "none"})

    viewer.step("Enable the sidecar for age")
    rows = viewer.sees(lambda rows: padlocks(rows).get((SENTENCES, AGE)) == "no data")
    assert rows[SENTENCES, AGE]["Refused"].startswith("✕ ")
    assert rows[SENTENCES, AGE]["Why"] == "strict requires mtls"
    line = viewer.browser.drawn()[f"{SENTENCES} > {AGE}"]
    assert line["arrow"] == "tee"
    assert "refused" in line["label"]
    viewer.picture("sentences-errors")

    viewer.step("peer-auth/permissive.yaml")
    rows = viewer.sees(
        lambda rows: (
            padlocks(rows).get((SENTENCES, AGE)) == "none"
            and rows[SENTENCES, AGE]["Refused"] == "0"
        )
    )
    # What sentences calls besides nobody can see: neither end is in the mesh.
    assert rows.keys() == {(CLIENT, SENTENCES), (SENTENCES, AGE)}

    viewer.step("Inject sidecars into all services, and strict.yaml again")
    everything = {(CLIENT, SENTENCES), (SENTENCES, AGE), (SENTENCES, NAME_V1), (SENTENCES, NAME_V2)}
    viewer.sees(lambda rows: padlocks(rows) == dict.fromkeys(everything, "all"))
    assert {each["state"] for each in viewer.browser.drawn().values()} == {"all"}
    said = selected(viewer, SENTENCES, AGE)
    assert "every connection was mutual TLS" in said
    assert "spiffe://cluster.local/ns/default/sa/sentences" in said
    assert "spiffe://cluster.local/ns/default/sa/age" in said
    viewer.picture("sentences-all-strict")
    viewer.browser.press(Keys.ESCAPE)

    viewer.step("dest-rule/name.yaml: no mTLS for v1")
    expected = {ends: "none" if NAME_V1 in ends else "all" for ends in everything}
    viewer.sees(lambda rows: padlocks(rows) == expected)
    states = {name: each["state"] for name, each in viewer.browser.drawn().items()}
    assert states[f"{SENTENCES} > {NAME_V1}"] == "none"
    assert states[f"{SENTENCES} > {NAME_V2}"] == "all"
    viewer.picture("sentences-missing-padlock")
    said = selected(viewer, SENTENCES, NAME_V1)
    assert "default/name-v1-disable" in said
    assert "none proved" in said


def selected(viewer: Viewer, source: str, destination: str) -> str:
    """Click on a line of the drawing; return what the panel says of it."""
    line = viewer.browser.drawn()[f"{source} > {destination}"]
    viewer.browser.click_at(line["x"], line["y"])
    viewer.browser.wait(
        lambda: viewer.browser.run("return !document.getElementById('panel').hidden")
    )
    return viewer.browser.text("#panel")
