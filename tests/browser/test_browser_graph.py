"""The graph and its table in a real browser: what a person sees of a picture that the node has."""

from __future__ import annotations

import math
import re
from typing import Any

from selenium.webdriver.common.keys import Keys

from nodeagent.observe import graph_model as model
from support import page, picture
from support.browser import Browser

STATES = ("all", "some", "none", "no data")
OPERATIONS = "return document.getElementById('drawing').drawing.operations"


def places(browser: Browser) -> dict[str, Any]:
    found: dict[str, Any] = browser.run(
        "return Object.fromEntries(document.getElementById('drawing').drawing.cy.nodes('.vertex')"
        ".map(each => [each.data('vertex'), each.position()]))"
    )
    return found


def panel_opens(browser: Browser) -> str:
    browser.wait(lambda: browser.run("return !document.getElementById('panel').hidden"))
    return browser.text("#panel")


def test_browser_shows_who_talks_to_whom_and_how(browser: Browser, site: page.Site) -> None:
    browser.open(site)
    assert browser.text("#summary") == (
        "7 workloads, 10 lines in the last 5 min: 5 of 9 lines with traffic all mutual TLS, "
        "1 in part, 3 not at all; 12 refused, 2 failed."
    )
    rows = {(row[0], row[1]): row[2:] for row in browser.rows()}
    assert len(rows) == 10
    # One plaintext connection of 251 leaves the padlock half open.
    assert rows["ingress/gateway", "sentences/frontend"][1] == "some, 99.6 %"
    assert rows["sentences/frontend", "sentences/age"][:3] == ["8080", "all", "25/min"]
    assert rows["sentences/frontend", "sentences/name-v1"][1] == "none"
    refused = rows["outside", "sentences/age"]
    assert refused[1:6] == ["no data", "0/min", "✕ 12", "0", "strict requires mtls"]
    assert rows["sentences/age", "data/postgres"][4] == "✕ 2"


def test_browser_draws_the_same_as_the_table_says(browser: Browser, site: page.Site) -> None:
    browser.open(site)
    lines = browser.drawn()
    assert {name: line["state"] for name, line in lines.items()} == {
        f"{row[0]} > {row[1]}": row[3].partition(",")[0] for row in browser.rows()
    }
    assert lines["ingress/gateway > sentences/frontend"]["label"] == "some, 99.6 %\n50/min"
    assert lines["outside > sentences/age"]["label"] == "no data\n✕ 12 refused"
    assert lines["outside > sentences/age"]["arrow"] == "tee"
    # Nobody gets through: drawn as what is bad, and said so above.
    red = lines["sentences/frontend > sentences/name-v1"]["colour"]
    assert lines["outside > sentences/age"]["colour"] == red
    assert [each.text for each in browser.all("#summary .bad")] == ["12 refused", "2 failed"]
    spaces = browser.run(
        "return document.getElementById('drawing').drawing.cy.nodes(':parent')"
        ".map(each => each.data('label') + ' ' + each.children().length).sort()"
    )
    assert spaces == ["data 1", "ingress 1", "monitoring 1", "sentences 4"]


def test_browser_tells_padlocks_by_word_shape_and_colour(browser: Browser, site: page.Site) -> None:
    browser.open(site)
    found: list[list[str]] = browser.run(
        "return [...document.querySelectorAll('.chip')].slice(0, 4).map(chip => ["
        "chip.childNodes[1].textContent, chip.querySelector('svg').innerHTML, "
        "getComputedStyle(chip.querySelector('svg')).stroke])"
    )
    words, shapes, colours = (list(each) for each in zip(*found, strict=True))
    assert tuple(words) == STATES
    assert len(set(shapes)) == len(set(colours)) == 4
    lines = {line["state"]: line["style"] for line in browser.drawn().values()}
    # The two that are dashed differ in their dashes.
    assert lines == {"all": "solid", "some": "dashed", "none": "dotted", "no data": "dashed"}


def test_browser_draws_padlocks_above_the_lines(browser: Browser, site: page.Site) -> None:
    browser.expected = ["willReadFrequently"]
    browser.open(site)
    for name, line in browser.drawn().items():
        seen: int = browser.run(
            "const c = document.querySelector('.locks'), b = c.getBoundingClientRect();"
            "const k = c.width / b.width;"
            "return c.getContext('2d').getImageData((arguments[0] - b.x - 12) * k,"
            " (arguments[1] - b.y - 12) * k, 24 * k, 24 * k).data"
            ".filter((value, at) => at % 4 === 3 && value > 128).length",
            line["x"],
            line["y"],
        )
        assert seen > 100, name


def test_browser_click_on_a_line_tells_all_of_it(browser: Browser, site: page.Site) -> None:
    browser.open(site)
    line = browser.drawn()["sentences/frontend > sentences/age"]
    browser.click_at(line["x"], line["y"])
    said = panel_opens(browser)
    for wanted in (
        "every connection was mutual TLS",
        "Port 8080, as age.default.svc",
        "125 mutual TLS",
        "AuthorizationPolicy/sentences/callers",
        "spiffe://cluster.local/ns/sentences/sa/frontend",
        "spiffe://cluster.local/ns/sentences/sa/age",
        "40 min left",
        "85 KiB sent, 635 KiB received by the caller",
    ):
        assert wanted in said, (wanted, said)
    assert re.search(r"First seen\n2026-11-\d\d \d\d:56:00[+-]\d\d:\d\d", said)
    chosen = browser.run("return document.querySelector('[aria-current=true] th').innerText")
    assert chosen == "sentences/frontend"


def test_browser_click_on_a_workload_tells_all_of_it(browser: Browser, site: page.Site) -> None:
    browser.open(site)
    place = browser.run(
        "const d = document.getElementById('drawing').drawing, b = d.box.getBoundingClientRect();"
        "const p = d.cy.getElementById('v sentences/age').renderedPosition();"
        "return [b.x + p.x, b.y + p.y]"
    )
    browser.click_at(*place)
    said = panel_opens(browser)
    assert browser.text("#panel h2") == "sentences/age"
    browser.wait(lambda: "ASDEX 1.00 of 1.00" in browser.text("#panel"))
    for wanted in (
        "STRICT",
        "peers.yaml:3",
        "Called by (3)",
        "Calls (1)",
        "✕ 12 refused",
        "AuthorizationPolicy/sentences/age",
    ):
        assert wanted in said, (wanted, said)


def test_browser_filters_drawing_and_table_alike(browser: Browser, site: page.Site) -> None:
    browser.open(site)
    refused = browser.all(".chip")[4]
    refused.click()
    assert refused.get_attribute("aria-pressed") == "true"
    assert [row[:2] for row in browser.rows()] == [["outside", "sentences/age"]]
    bright = [name for name, line in browser.drawn().items() if "faded" not in line["classes"]]
    assert bright == ["outside > sentences/age"]
    refused.click()
    browser.one("#search").send_keys("postgres")
    assert [row[1] for row in browser.rows()] == ["data/postgres"]
    for _ in "postgres":
        browser.one("#search").send_keys(Keys.BACKSPACE)
    browser.one("#namespace option[value=monitoring]").click()
    assert {row[0] for row in browser.rows()} == {"monitoring/prometheus"}


def test_browser_sorts_the_table_and_says_so(browser: Browser, site: page.Site) -> None:
    browser.open(site)
    assert browser.run("return document.querySelector('thead th').ariaSort") == "ascending"
    header = browser.all("thead button")[5]
    header.click()
    assert browser.rows()[0][:2] == ["outside", "sentences/age"]
    assert browser.run("return document.querySelectorAll('thead th')[5].ariaSort") == "descending"
    header.click()
    assert browser.rows()[-1][:2] == ["outside", "sentences/age"]


def test_browser_asks_for_the_chosen_window(browser: Browser, site: page.Site) -> None:
    browser.open(site)
    assert site.picture.asked[-1] == 300
    offered = [each.text for each in browser.all("#window option")]
    assert offered == [
        "1 minute",
        "5 minutes",
        "15 minutes",
        "1 hour",
        "6 hours",
        "24 hours",
        "7 days",
    ]
    browser.all("#window option")[-1].click()
    browser.wait(lambda: "in the last 7 d" in browser.text("#summary"))
    assert site.picture.asked[-1] == 7 * 86400
    # It is in the address, so that it can be sent to somebody.
    browser.driver.refresh()
    browser.wait(lambda: browser.run("return window.page?.view.seconds") == 7 * 86400)


def test_browser_follows_the_traffic(browser: Browser, site: page.Site) -> None:
    browser.open(site)
    site.picture.edges = [picture.edge("sentences/frontend", "sentences/age", plaintext=9)]
    browser.wait(lambda: [row[3] for row in browser.rows()] == ["none"])
    assert browser.drawn()["sentences/frontend > sentences/age"]["state"] == "none"
    browser.one("#live").click()
    assert browser.one("#live").text == "Resume"
    assert browser.text("#moment").startswith("Paused, 2026-11-")


def test_browser_leaves_everything_where_it_is(browser: Browser, site: page.Site) -> None:
    """What is the same is not touched; what is new finds room without moving the rest."""
    browser.open(site)
    browser.all("tbody button")[3].send_keys(Keys.ENTER)
    browser.run(
        "window.changes = []; new MutationObserver(list => { window.changes.push(...list.map("
        "each => each.target.nodeName + ' ' + (each.attributeName ?? ''))); })"
        ".observe(document.body, {subtree: true, childList: true, attributes: true,"
        " characterData: true})"
    )
    before = places(browser)
    done = browser.run(OPERATIONS)
    browser.refresh()
    assert browser.run(OPERATIONS) == done
    assert browser.run("return window.changes") == []
    # Nor does the library: at once, as what the panel's coming has it draw may come at any time.
    assert (
        browser.run(
            "let styled = 0; const count = () => { styled += 1; };"
            "const { cy } = document.getElementById('drawing').drawing;"
            "cy.on('style', count); page.view.update(page.known); cy.off('style', count);"
            "return styled"
        )
        == 0
    )
    site.picture.vertices = [*site.picture.vertices, picture.vertex("sentences/new")]
    site.picture.edges = [
        *site.picture.edges[1:],
        picture.edge("sentences/new", "sentences/age", mutual_tls=1),
    ]
    browser.refresh()
    after = places(browser)
    assert after.pop("sentences/new")
    assert after == before
    assert not browser.run("return document.getElementById('panel').hidden")


def test_browser_is_usable_at_five_hundred_workloads(browser: Browser, site: page.Site) -> None:
    picture.many(site.picture, 500, 20)
    browser.open(site)
    found = places(browser)
    assert len(found) == 500
    assert len({(place["x"], place["y"]) for place in found.values()}) == 500
    # A screen's shape, and not a thread.
    xs, ys = ([place[axis] for place in found.values()] for axis in "xy")
    assert 0.5 < (max(xs) - min(xs)) / (max(ys) - min(ys)) < 4
    assert len(browser.drawn()) == 2000
    # The table begins with a part, and a refresh touches nothing.
    assert len(browser.rows()) == 200
    assert browser.one(".more").text == "Show all 2,000 rows"
    done = browser.run(OPERATIONS)
    browser.refresh()
    assert browser.run(OPERATIONS) == done
    # One line less: one operation for it, and nothing for the others.
    site.picture.edges = site.picture.edges[:-1]
    browser.refresh()
    assert browser.run(OPERATIONS) == done + 1
    browser.one("#search").send_keys("service-499")
    assert 0 < len(browser.rows()) < 10


def test_browser_draws_who_calls_itself_and_leaves_out_half_lines(
    browser: Browser, site: page.Site
) -> None:
    site.picture.edges += [
        picture.edge("sentences/age", "sentences/age", mutual_tls=3),
        picture.edge("nobody/knows", "sentences/age", plaintext=1),
    ]
    browser.open(site)
    lines = browser.drawn()
    assert "nobody/knows > sentences/age" not in lines
    itself = lines["sentences/age > sentences/age"]
    zoom = browser.run("return document.getElementById('drawing').drawing.cy.zoom()")
    seen = browser.run(
        "const d = document.getElementById('drawing').drawing, b = d.box.getBoundingClientRect();"
        "const p = d.cy.getElementById('v sentences/age').renderedPosition();"
        "return [b.x + p.x, b.y + p.y]"
    )
    # Its padlock lies beside the workload, and not in it.
    assert math.hypot(itself["x"] - seen[0], itself["y"] - seen[1]) > 17 * zoom
    # The table has both.
    callers = {row[0] for row in browser.rows() if row[1] == "sentences/age"}
    assert {"sentences/age", "nobody/knows"} <= callers


def test_browser_panel_leads_on_from_what_it_tells_of(browser: Browser, site: page.Site) -> None:
    """Two workloads with the same caller: each one's link is its own."""
    browser.open(site)
    for name in ("sentences/name-v1", "sentences/age"):
        browser.run("page.choose({kind: 'vertex', id: arguments[0]}, null)", name)
        assert browser.text("#panel h2") == name
    link = (
        "[...document.querySelectorAll('#panel .pairs button')].find(b => b.innerText == 'outside')"
    )
    browser.run(f"{link}.click()")
    browser.wait(lambda: browser.text("#panel h2") == "Connection")
    assert browser.text("#panel .ends") == "outside calls sentences/age"


def test_browser_kinds_without_a_namespace_stand_alone(browser: Browser, site: page.Site) -> None:
    site.picture.vertices.append(picture.vertex("unknown", kind=model.Kind.UNKNOWN))
    site.picture.edges.append(picture.edge("unknown", "sentences/age", plaintext=1))
    browser.open(site)
    alone = browser.run(
        "return document.getElementById('drawing').drawing.cy.nodes('.vertex')"
        ".filter(each => each.parent().empty()).map(each => each.data('vertex')).sort()"
    )
    assert alone == ["node", "outside", "unknown"]
