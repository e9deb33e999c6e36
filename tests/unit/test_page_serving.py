"""The page over HTTP: its files and headers, and what a listener behind a token gives."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import re
import socket
import ssl
import time
import urllib.error
import urllib.request
from base64 import b64encode
from email.message import Message
from pathlib import Path
from typing import NamedTuple

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from nodeagent import daemon
from nodeagent.admin import bounded, server
from nodeagent.page import Files, Gate, tls_context
from nodeagent.settings.page import Page
from support import certificates, page, picture

TOKEN = "0123456789abcdef0123456789abcdef"


def get(
    url: str, method: str = "GET", trusted: ssl.SSLContext | None = None, **headers: str
) -> tuple[int, Message, bytes]:
    """Ask for `url`; redirects are not followed."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, method=method, headers=named)  # noqa: S310 - http, ours
    opener = urllib.request.build_opener(_Stay, urllib.request.HTTPSHandler(context=trusted))
    try:
        with opener.open(request, timeout=20) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


def test_page_is_strict_about_what_it_loads() -> None:
    with page.site() as site:
        code, headers, body = get(site.address + "/ui/")
        assert code == 200
        assert headers["Content-Type"] == "text/html; charset=utf-8"
        policy = dict(
            part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";")
        )
        assert policy == {
            "default-src": "'none'",
            "script-src": "'self'",
            "style-src": "'self'",
            "img-src": "'self'",
            "connect-src": "'self'",
            "base-uri": "'none'",
            "form-action": "'none'",
            "frame-ancestors": "'none'",
        }
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        # Nothing inline, nothing from elsewhere.
        html = body.decode()
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=|javascript:", html)
        assert "//" not in re.sub(r"<!--.*?-->|<!doctype html>", "", html, flags=re.DOTALL)


def test_page_files_name_nothing_elsewhere() -> None:
    """The page's own files; what a library has in comments and licences is not asked for."""
    found = []
    for path in page.static_files().iterdir():
        if path.is_file():
            for url in re.findall(r"https?://[^\s\"')]+", path.read_text(encoding="utf-8")):
                found.append((path.name, url))
    # Names of XML, which nobody fetches.
    assert {url for _, url in found} <= {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize(
    "name,media_type",
    [
        ("main.js", "text/javascript"),
        ("style.css", "text/css"),
        ("icon.svg", "image/svg+xml"),
        ("vendor/cytoscape.mjs", "text/javascript"),
        ("vendor/cytoscape.LICENSE.txt", "text/plain"),
    ],
)
def test_page_files_have_types_and_validators(name: str, media_type: str) -> None:
    with page.site() as site:
        code, headers, body = get(f"{site.address}/ui/{name}")
        assert code == 200
        assert body
        assert headers["Content-Type"] == f"{media_type}; charset=utf-8"
        assert headers["Cache-Control"] == "no-cache"
        again, kept, nothing = get(f"{site.address}/ui/{name}", If_None_Match=headers["ETag"])
        assert (again, nothing) == (304, b"")
        assert kept["ETag"] == headers["ETag"]
        assert get(f"{site.address}/ui/{name}", If_None_Match='"other"')[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/ui/nothing.js",
        "/ui/../server.py",
        "/ui/..%2f..%2fsettings.py",
        "/ui//etc/passwd",
        "/ui/vendor/",
        "/ui/%00",
    ],
)
def test_page_has_only_its_own_files(path: str) -> None:
    with page.site() as site:
        assert get(site.address + path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_page_changes_nothing(method: str) -> None:
    with page.site() as site:
        assert get(f"{site.address}/ui/", method)[0] == 405


def test_browsers_are_led_to_the_page_and_curl_to_a_list() -> None:
    with page.site() as site:
        code, headers, _ = get(f"{site.address}/", Accept="text/html,*/*;q=0.8")
        assert (code, headers["Location"]) == (302, "/ui/")
        code, _, body = get(f"{site.address}/", Accept="*/*")
        assert code == 200
        assert b"/ui/" in body
        assert get(f"{site.address}/ui")[0] == 308


def test_page_is_for_everybody_on_the_node_and_its_answers_for_root(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "socket_owner", lambda *_: 65534)
    with page.site() as site:
        assert get(f"{site.address}/ui/")[0] == 200
        assert get(f"{site.address}/status")[0] == 403
        assert get(f"{site.address}/graph")[0] == 403
        assert get(f"{site.address}/connections")[0] == 403


def test_foreign_names_do_not_reach_the_page() -> None:
    """As when a name of somebody else's is made to point at loopback (DNS rebinding)."""
    with page.site() as site:
        assert get(f"{site.address}/ui/", Host="evil.example")[0] == 421


def basic(token: str) -> str:
    return "Basic " + b64encode(b"x:" + token.encode()).decode()


def test_a_listener_behind_a_token_gives_what_the_page_needs() -> None:
    with page.site(gate=Gate(TOKEN.encode())) as site:
        for path in ("/", "/ui/", "/status", "/graph", "/connections", "/metrics", "/ui/main.js"):
            code, headers, body = get(site.address + path)
            assert code == 401
            assert headers["WWW-Authenticate"].startswith("Basic ")
            assert b"worker-1" not in body
        for path in (
            "/ui/",
            "/ui/main.js",
            "/status",
            "/graph?seconds=60",
            "/connections?limit=1",
        ):
            assert get(site.address + path, Authorization=basic(TOKEN))[0] == 200
        # No more than that: neither the configuration nor who has called in full.
        for path in ("/metrics", "/config_dump", "/configuration", "/flows", "/healthz/ready"):
            assert get(site.address + path, Authorization=basic(TOKEN))[0] == 404
        assert get(f"{site.address}/", Authorization=basic(TOKEN))[0] == 308


def test_a_listener_behind_a_token_slows_guessing_down() -> None:
    with page.site(gate=Gate(TOKEN.encode())) as site:
        codes = [get(f"{site.address}/ui/", Authorization=basic("x"))[0] for _ in range(12)]
        assert codes == [401] * 10 + [429] * 2


class Tls(NamedTuple):
    """The server's side, and that of a client who trusts it."""

    server: ssl.SSLContext
    client: ssl.SSLContext


@pytest.fixture
def tls(tmp_path: Path) -> Tls:
    now = time.time()
    made = certificates.issue(
        None, subject="node", dns=["localhost"], not_before=now - 60, not_after=now + 600
    )
    (tmp_path / "page.crt").write_bytes(made.certificate.public_bytes(Encoding.PEM))
    (tmp_path / "page.key").write_bytes(
        made.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    context = tls_context(tmp_path / "page.crt", tmp_path / "page.key")
    trusting = ssl.create_default_context(cafile=str(tmp_path / "page.crt"))
    return Tls(context, trusting)


def test_a_page_over_tls_asks_for_the_token_too(tls: Tls) -> None:
    with page.site(gate=Gate(TOKEN.encode()), context=tls.server) as site:
        address = site.address.replace("127.0.0.1", "localhost")
        assert get(f"{address}/status", trusted=tls.client)[0] == 401
        code, _, body = get(f"{address}/status", trusted=tls.client, Authorization=basic(TOKEN))
        assert code == 200
        assert b"worker-1" in body
        # Nothing at all is told without TLS.
        with pytest.raises((OSError, http.client.HTTPException)):
            get(address.replace("https", "http") + "/ui/", Authorization=basic(TOKEN))


def test_handshakes_that_come_to_nothing_end_and_are_limited(
    tls: Tls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded, "HANDSHAKE_SECONDS", 0.5)
    monkeypatch.setattr(bounded, "MAX_CONNECTIONS", 2)
    with page.site(gate=Gate(TOKEN.encode()), context=tls.server) as site:
        port = int(site.address.rpartition(":")[2])
        with contextlib.ExitStack() as stack:
            silent = [
                stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
                for _ in range(6)
            ]
            for each in silent:
                with contextlib.suppress(ConnectionResetError):
                    assert each.recv(1) == b""
        address = site.address.replace("127.0.0.1", "localhost")
        found = get(f"{address}/ui/", trusted=tls.client, Authorization=basic(TOKEN))
        assert found[0] == 200


def test_who_opens_many_and_asks_nothing_keeps_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "MAX_CONNECTIONS", 2)
    with page.site() as site, contextlib.ExitStack() as stack:
        port = int(site.address.rpartition(":")[2])
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
            for _ in range(6)
        ]
        assert get(f"{site.address}/ui/")[0] == 200
        for each in silent[:-2]:
            with contextlib.suppress(ConnectionResetError):
                assert each.recv(1) == b""


def test_a_file_too_large_is_none_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nodeagent.page._files.MAX_FILE_BYTES", 10)
    (tmp_path / "index.html").write_bytes(b"x" * 11)
    with pytest.raises(OSError, match="larger than 10 bytes"):
        Files(tmp_path)


def test_files_of_other_kinds_are_not_served(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("here")
    (tmp_path / "notes.bak").write_text("there")
    with page.site(files=Files(tmp_path)) as site:
        assert get(f"{site.address}/ui/")[2] == b"here"
        assert get(f"{site.address}/ui/notes.bak")[0] == 404


def test_the_daemon_does_not_start_with_a_page_that_it_cannot_protect(tmp_path: Path) -> None:
    shown = Page(address="127.0.0.1:15010", token_file=tmp_path / "none")

    with pytest.raises(daemon.DaemonError, match=r"page\.token_file"):
        asyncio.run(daemon._show_page(page.admin_server(picture.Picture()), shown))
