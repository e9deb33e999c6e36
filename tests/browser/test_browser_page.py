"""The page as a whole in a real browser: for everybody, and against whoever chooses names."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path

import pytest
from selenium.webdriver.common.keys import Keys

from support import page, picture
from support.browser import Browser
from support.forward import forwarded

UNSEEN = re.compile("[\u202a-\u202e\u2066-\u2069\x07]")


def test_browser_works_without_a_mouse(browser: Browser, site: page.Site) -> None:
    browser.open(site)
    passed = browser.tab()
    assert passed[:7] == [
        "a Skip to the content",
        "a Graph",
        "a Connections",
        "a Workloads",
        "a Rollout to STRICT",
        "select Window",
        "button Pause",
    ]
    for wanted in (
        "select Namespace",
        "input Find",
        "application",
        "button Closer",
        "button Caller",
        "button sentences/frontend",
    ):
        assert any(each.startswith(wanted) for each in passed), (wanted, passed)


def test_browser_panel_takes_and_returns_the_focus(browser: Browser, site: page.Site) -> None:
    browser.open(site)
    browser.run("document.querySelectorAll('tbody button')[2].focus()")
    name = browser.focused()
    browser.press(Keys.ENTER)
    assert browser.focused() == "h2 Connection"
    browser.press(Keys.TAB)
    assert browser.focused() == "button Close"
    browser.press(Keys.ESCAPE)
    assert browser.focused() == name
    assert browser.run("return document.getElementById('panel').hidden")


def test_browser_skips_to_the_content(browser: Browser, site: page.Site) -> None:
    browser.open(site)
    browser.press(Keys.TAB)
    assert browser.focused() == "a Skip to the content"
    browser.press(Keys.ENTER)
    assert browser.run("return document.activeElement.id") == "main"
    browser.driver.refresh()
    browser.wait(lambda: browser.all("tbody tr"))


def test_browser_drawing_moves_by_keys(browser: Browser, site: page.Site) -> None:
    browser.open(site)
    view = "const c = document.getElementById('drawing').drawing.cy; return [c.zoom(), c.pan().x]"
    browser.run("document.getElementById('drawing').focus()")
    zoom, x = browser.run(view)
    browser.press(Keys.ARROW_LEFT)
    assert browser.run(view)[1] > x
    browser.press("+")
    assert browser.run(view)[0] > zoom
    browser.press("0")
    assert browser.run(view) == pytest.approx([zoom, x])


def test_browser_focus_can_be_seen(browser: Browser, site: page.Site) -> None:
    browser.open(site)
    browser.press(Keys.TAB, Keys.TAB)
    width = browser.run("return getComputedStyle(document.activeElement).outlineWidth")
    assert float(width.removesuffix("px")) >= 2


def test_browser_has_landmarks_headings_and_names(browser: Browser, site: page.Site) -> None:
    browser.open(site)
    for selector in ("header", "nav[aria-label]", "main", "aside[aria-label]", "h1"):
        assert len(browser.all(selector)) == 1, selector
    assert browser.run("return document.documentElement.lang") == "en"
    unnamed = browser.run(
        "return [...document.querySelectorAll('button, select, input, a')].filter(e => !("
        "e.innerText?.trim() || e.textContent.trim() || e.ariaLabel || e.labels?.length)).length"
    )
    assert unnamed == 0
    assert browser.run(
        "return [...document.querySelectorAll('tbody tr')].every(r => r.cells[0].scope === 'row')"
    )


def test_browser_reads_out_names_and_no_signs(browser: Browser, site: page.Site) -> None:
    browser.open(site)
    tree = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = [
        (each["role"]["value"], each["name"]["value"])
        for each in tree
        if not each.get("ignored") and each["role"]["value"] in {"button", "columnheader"}
    ]
    assert ("columnheader", "Caller") in named
    assert ("button", "Caller") in named
    assert not [name for _, name in named if set(name) & set("↑↓↕✕⤢↺")]


@pytest.mark.parametrize("view", ["graph", "connections", "workloads", "rollout"])
def test_browser_fits_a_narrow_screen_whatever_the_names(
    browser: Browser, site: page.Site, view: str
) -> None:
    """At 320 pixels, as on a telephone, or at 400 % (WCAG 1.4.10)."""
    long = f"{'n' * 63}/{'service-' * 20}"
    site.picture.vertices.append(picture.vertex(long))
    site.picture.pods.append(picture.pod(long))
    site.picture.edges.append(picture.edge(long, "sentences/age", mutual_tls=1))
    site.picture.connections.append(picture.connection(1, long, "sentences/age"))
    narrow = {"width": 320, "height": 640, "deviceScaleFactor": 1, "mobile": False}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", narrow)
    try:
        browser.open(site, f"/ui/#{view}")
        browser.wait(lambda: browser.all("tbody tr"))
        # Beside a scroll bar, which some have.
        wide, room = browser.run(
            "const e = document.documentElement; return [e.scrollWidth, e.clientWidth]"
        )
        assert wide == room <= 320
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_browser_shows_hostile_names_as_text(browser: Browser, site: page.Site) -> None:
    shown = site.picture
    shown.vertices.append(picture.vertex(picture.HOSTILE))
    shown.pods.append(picture.pod(picture.HOSTILE))
    shown.edges.append(
        picture.edge(
            picture.HOSTILE,
            "sentences/age",
            refused=1,
            reasons={picture.HOSTILE: 1},
            policies=(picture.HOSTILE,),
        )
    )
    browser.open(site)
    labels = browser.run(
        "return document.getElementById('drawing').drawing.cy.elements()"
        ".map(each => each.data('label') ?? '').join('')"
    )
    assert "img" in labels
    assert not UNSEEN.search(labels)
    for view in ("#graph", "#workloads"):
        browser.run("location.hash = arguments[0]", view)
        browser.wait(lambda: "onerror" in browser.text("main tbody"))
        browser.run(
            "[...document.querySelectorAll('tbody button')].find("
            "each => each.innerText.includes('onerror')).click()"
        )
        assert "onerror" in browser.text("#panel")
        whole = browser.run("return document.body.textContent + document.title")
        assert not UNSEEN.search(whole)
        assert "\\u{202e}" in whole
        assert not browser.all("main img, aside img")
        assert "owned" not in browser.driver.title


def luminance(colour: str) -> float:
    """Of "#rrggbb" (WCAG 2.2, relative luminance)."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_has_contrast_in_dark_and_light(
    browser: Browser, site: page.Site, scheme: str
) -> None:
    browser.emulate(prefers_color_scheme=scheme)
    browser.open(site)
    theme: dict[str, str] = browser.run("return document.getElementById('drawing').drawing.theme")
    theme["ground"] = browser.run(
        "return getComputedStyle(document.documentElement).getPropertyValue('--ground').trim()"
    )
    assert (luminance(theme["surface"]) > 0.5) == (scheme == "light")
    for ground in ("surface", "ground", "space"):
        # Text has 4.5, what is drawn 3 (WCAG 1.4.3, 1.4.11).
        for ink in ("text", "muted", "accent", "all", "some", "none", "nodata"):
            assert contrast(theme[ink], theme[ground]) >= 4.5, (ink, ground)
        assert contrast(theme["vertex"], theme[ground]) >= 3
    drawn = browser.drawn()["sentences/frontend > sentences/age"]["colour"]
    red, green, blue = (int(each) for each in re.findall(r"\d+", drawn)[:3])
    assert f"#{red:02x}{green:02x}{blue:02x}" == theme["all"]


def test_browser_does_not_move_where_motion_is_unwanted(browser: Browser, site: page.Site) -> None:
    moving = "return getComputedStyle(document.getElementById('live')).transitionDuration"
    browser.open(site)
    assert browser.run(moving) != "0s"
    browser.emulate(prefers_reduced_motion="reduce")
    assert browser.run(moving) == "0s"


def test_browser_says_what_is_not_there(browser: Browser) -> None:
    browser.expected = ["404 (Not Found)"]
    with page.site(graph=False) as site:
        picture.sentences(site.picture)
        browser.open(site)
        assert "This agent has no /graph: it is of an older release" in browser.text("#notices")
        browser.one("nav a[href='#workloads']").click()
        browser.wait(lambda: len(browser.rows()) == 6)


def test_browser_says_when_the_agent_is_gone(browser: Browser) -> None:
    browser.expected = ["net::ERR_"]
    with page.site() as site:
        picture.sentences(site.picture)
        browser.open(site)
    browser.refresh()
    browser.wait(lambda: "The agent does not answer" in browser.text("#notices"))
    assert "Shown is what was known at 2026-11-" in browser.text("#notices")
    assert browser.text("#verdict") == "no answer"
    # Nothing that is old passes for new.
    assert browser.text("#moment").startswith("Not answered since 2026-11-")
    assert len(browser.rows()) == 10


def test_browser_says_when_it_does_not_understand(browser: Browser, site: page.Site) -> None:
    browser.expected = ["of another shape"]
    browser.open(site)
    browser.run("page.view.update = () => { throw new Error('of another shape'); }")
    browser.refresh()
    assert browser.text("#notices") == "This page does not understand the answer: reload it."
    assert browser.text("#moment").startswith("Not answered since")
    # It goes on asking: the next answer may be another.
    browser.run("delete page.view.update")
    asked = browser.run("return page.asked")
    browser.wait(lambda: browser.run("return page.asked") > asked)
    browser.wait(lambda: browser.text("#notices") == "")


def test_browser_says_that_clocks_differ(browser: Browser, site: page.Site) -> None:
    browser.open(site)
    assert "clocks" not in browser.text("#notices")
    browser.clock(picture.NOW - timedelta(hours=2, seconds=50))
    browser.driver.refresh()
    browser.wait(lambda: "this computer’s is 2 h behind the node’s" in browser.text("#notices"))


def test_browser_comes_by_a_forwarded_socket(browser: Browser, tmp_path: Path) -> None:
    """As with `ssh -L PORT:admin.sock`."""
    with page.site(unix=tmp_path / "admin.sock") as site:
        picture.sentences(site.picture)
        with forwarded(tmp_path / "admin.sock") as address:
            browser.open(address)
            assert len(browser.rows()) == 10


def test_browser_says_that_nobody_called(browser: Browser, site: page.Site) -> None:
    site.picture.edges = []
    site.picture.complete = False
    site.picture.missing = ("ztunnel is not connected",)
    browser.open(site)
    assert "Nobody has called anybody in this window" in browser.text("main")
    assert "The recording does not cover the whole window" in browser.text("main")
    assert browser.text("#verdict") == "not ready, 1 reason"


def test_browser_has_a_view_of_workloads(browser: Browser, site: page.Site) -> None:
    browser.open(site, "/ui/#workloads")
    browser.wait(lambda: len(browser.rows()) == 6)
    rows = {row[0]: row[1:] for row in browser.rows()}
    assert rows["sentences/frontend"][:5] == [
        "Enrolled",
        "STRICT",
        "40 min left",
        "0.94",
        "as it must be",
    ]
    assert rows["sentences/name-v2"][2] == "expired"
    assert rows["sentences/late"][0] == "Waiting"
    assert rows["sentences/late"][4] == "not captured"
    assert browser.driver.title == "Workloads · worker-1"
    assert browser.text("section > .summary") == (
        "5 of 6 workloads enrolled; 4 take mutual TLS only. ASDEX of the node: 0.71 of 1.00."
    )
    next(each for each in browser.all("tbody button") if each.text.endswith("name-v1")).click()
    said = browser.text("#panel")
    for wanted in (
        "ASDEX 0.41 of 1.00",
        "−0.30 policy: no policy names who may call (60 connections)",
        "−less than 0.01 strict: plaintext is let in on this port (5 connections)",
        "PeerAuthentication sentences/default (peers.yaml:3)",
    ):
        assert wanted in said, (wanted, said)


def test_browser_opens_without_the_drawing_library(browser: Browser, tmp_path: Path) -> None:
    for path in page.static_files().iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    browser.expected = ["404 (Not Found)"]
    with page.site(files=page.Files(tmp_path)) as site:
        picture.sentences(site.picture)
        browser.open(site)
        browser.wait(lambda: "built without npm" in browser.text("#drawing"))
        assert len(browser.rows()) == 10


def test_browser_says_whether_strict_is_safe(browser: Browser, site: page.Site) -> None:
    browser.open(site, "/ui/#rollout")
    browser.wait(lambda: len(browser.rows()) == 5)
    # A week is asked about: what comes once a week must not be overlooked.
    assert site.picture.asked[-1] == 7 * 86400
    rows = browser.rows()
    assert rows[0][:2] == ["monitoring/prometheus", "? not known"]
    assert rows[1][:5] == ["sentences/name-v1", "✕ not safe", "PERMISSIVE", "125", "640"]
    assert rows[1][6] == "2 callers would be refused"
    assert rows[2][:2] == ["sentences/name-v2", "→ safe"]
    assert {row[1] for row in rows[3:]} == {"✓ STRICT"}
    steps = [each.text.split("\n")[:2] for each in browser.all(".steps li")]
    assert steps == [["2", "✓ STRICT"], ["1", "→ safe"], ["1", "✕ not safe"], ["1", "? not known"]]
    browser.all("tbody button")[1].click()
    said = browser.text("#panel")
    for wanted in ("✕ would break outside (198.51.100.7)", "legacy/cron (10.0.0.7)", "✓ stays",
                   "port 8080, 31 connections", "STRICT asks for mutual TLS"):  # fmt: skip
        assert wanted in said, (wanted, said)
    browser.one("#search").send_keys("cron")
    assert [row[0] for row in browser.rows()] == ["sentences/name-v1"]
