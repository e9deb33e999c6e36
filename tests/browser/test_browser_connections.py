"""The view of connections in a real browser: what is open, between whom, and who let it in."""

from __future__ import annotations

from datetime import timedelta

import msgspec
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from support import page, picture
from support.browser import Browser
from ztunnel.protocol import Connection


def rows(browser: Browser) -> list[dict[str, str]]:
    """The table's rows, by its headers."""
    names = [each.text for each in browser.all("#view thead th")]
    return [dict(zip(names, row, strict=True)) for row in browser.rows()]


def opened(browser: Browser, site: page.Site, query: str = "") -> None:
    browser.open(site, f"/ui/#connections{query}")
    browser.wait(lambda: browser.all("tbody tr"))


def says(browser: Browser, wanted: str) -> None:
    browser.wait(lambda: wanted in browser.text("#summary"))


def test_browser_shows_what_is_open(browser: Browser, site: page.Site) -> None:
    opened(browser, site)
    assert browser.text("#summary") == (
        "4 connections of this node: 2 mTLS, 1 same node, not encrypted, 1 plaintext."
    )
    first, second, third, fourth = rows(browser)
    assert first == {
        "Caller": "sentences/frontend",
        "Caller’s identity": "ns/sentences/sa/frontend",
        "Callee": "sentences/age:8080",
        "Callee’s identity": "ns/sentences/sa/age",
        "How": "mTLS\nTLS_AES_128_GCM_SHA256\nX25519MLKEM768",
        "Policy": "sentences/callers",
        "Bytes": "1.9 MiB",
        "Rate": "–",
        "Age": "3 s",
        "Seen at": "callee",
    }
    assert (second["Caller"], second["Caller’s identity"]) == ("198.51.100.7", "none proved")
    assert (second["How"], second["Policy"]) == ("plaintext", "default:allow")
    assert (third["Policy"], third["Seen at"]) == ("judged at the callee", "caller")
    assert (fourth["How"], fourth["Age"]) == ("same node, not encrypted", "2 h 1 min")
    # It shows now: there is no window to choose.
    assert not browser.one("#window").is_displayed()
    assert browser.driver.title == "Connections · worker-1"


def test_browser_measures_rates_between_two_looks(browser: Browser, site: page.Site) -> None:
    opened(browser, site)
    first, *others = site.picture.connections
    site.picture.connections = [msgspec.structs.replace(first, sent=first.sent + 40_960), *others]
    site.picture.now += timedelta(seconds=4)
    browser.refresh()
    assert [row["Rate"] for row in rows(browser)] == ["10 KiB/s", "0 B/s", "0 B/s", "0 B/s"]


def test_browser_tells_all_of_a_connection(browser: Browser, site: page.Site) -> None:
    opened(browser, site)
    browser.run("document.querySelector('tbody button').focus()")
    browser.press(Keys.ENTER)
    assert browser.focused() == "h2 Open connection"
    said = browser.text("#panel")
    for wanted in (
        "encrypted, and both sides have proved who they are.",
        "spiffe://cluster.local/ns/sentences/sa/frontend",
        "spiffe://cluster.local/ns/sentences/sa/age",
        "10.0.0.1:40003",
        "10.0.1.1:15008",
        "TLSv1.3",
        "sentences/callers rules[0] (policies.yaml:3)",
        "3 s ago",
    ):
        assert wanted in said, (wanted, said)
    site.picture.connections = site.picture.connections[1:]
    browser.refresh()
    assert browser.text("#panel .content") == "It has ended."
    browser.press(Keys.ESCAPE)
    assert browser.run("return document.getElementById('panel').hidden")


def test_browser_leads_from_a_line_to_its_connections(browser: Browser, site: page.Site) -> None:
    browser.open(site)
    for source, destination, asked, shown in (
        (
            "sentences/frontend",
            "sentences/age",
            {"pod": "sentences/age", "direction": "inbound"},
            "1 connection from sentences/frontend to sentences/age",
        ),
        # Of who is called elsewhere the caller's side is known.
        (
            "sentences/age",
            "data/postgres",
            {"pod": "sentences/age", "direction": "outbound"},
            "1 connection from sentences/age to data/postgres",
        ),
        (
            "outside",
            "sentences/name-v1",
            {"pod": "sentences/name-v1", "direction": "inbound"},
            "1 connection from who is no workload to sentences/name-v1",
        ),
    ):
        browser.run("location.hash = '#graph'")
        browser.wait(lambda: len(browser.rows()) == 10)
        browser.run(
            "page.choose({kind: 'pair', id: JSON.stringify([arguments[0], arguments[1]])}, null)",
            source,
            destination,
        )
        browser.one("#panel .content a").click()
        says(browser, shown)
        assert len(browser.rows()) == 1
        assert site.picture.queries[-1] == {"limit": "1000"} | asked
    browser.one("#summary a").click()
    browser.wait(lambda: len(browser.rows()) == 4)


def test_browser_leads_from_a_workload_to_its_connections(
    browser: Browser, site: page.Site
) -> None:
    browser.open(site)
    for uid, seen in (("sentences/age", 2), ("data/postgres", 1)):
        browser.run("location.hash = '#graph'")
        browser.wait(lambda: len(browser.rows()) == 10)
        browser.run("page.choose({kind: 'vertex', id: arguments[0]}, null)", uid)
        browser.one("#panel .content a").click()
        says(browser, f"of {uid}:")
        assert len(browser.rows()) == seen


def test_browser_finds_a_connection(browser: Browser, site: page.Site) -> None:
    opened(browser, site)
    Select(browser.one("#way")).select_by_value("plaintext")
    assert [row["Callee"] for row in rows(browser)] == ["sentences/name-v1:8080"]
    Select(browser.one("#way")).select_by_value("")
    browser.one("#search").send_keys("5432")
    assert [row["Callee"] for row in rows(browser)] == ["data/postgres:5432"]
    browser.one("#search").send_keys("0")
    assert browser.text(".empty") == "No connection is open that fits."


def test_browser_says_which_connections_it_does_not_show(browser: Browser, site: page.Site) -> None:
    site.picture.connections = [
        picture.connection(each, "sentences/frontend", "sentences/age") for each in range(1200)
    ]
    site.picture.missed = 7
    opened(browser, site)
    said = browser.text("main")
    assert "1,200 are open: of these only the 1,000 newest were looked at." in said
    assert "7 connections found no room in the snapshot" in said
    assert len(browser.rows()) == 200


def test_browser_says_that_connections_are_old(browser: Browser, site: page.Site) -> None:
    browser.expected = ["503 (Service Unavailable)"]
    opened(browser, site)
    site.picture.mute = "ztunnel is not connected"
    browser.refresh()
    said = browser.text("#notices")
    assert "ztunnel is not connected Shown is what was known at 2026-11-" in said
    assert len(browser.rows()) == 4


def test_browser_shows_hostile_connections_as_text(browser: Browser, site: page.Site) -> None:
    names = {field.name for field in msgspec.structs.fields(Connection) if field.type is str}
    site.picture.connections = [
        picture.connection(1, "a/b", "c/d", **dict.fromkeys(names, picture.HOSTILE))
    ]
    browser.open(site, "/ui/#connections?from=%3Cimg%20src%3Dx%3E%E2%80%AE")
    browser.wait(lambda: "from <img src=x>\\u{202e}" in browser.text("#summary"))
    assert browser.rows() == []
    browser.one("#summary a").click()
    browser.wait(lambda: len(browser.rows()) == 1)
    browser.one("tbody button").click()
    whole = browser.run("return document.body.textContent + document.title")
    assert "\u202e" not in whole
    assert "\\u{202e}" in whole
    assert not browser.all("main img, aside img")
