"""Who may see the page from elsewhere: tokens, their files, guessing, and the setting for it."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import pytest

from nodeagent.api import ConfigError
from nodeagent.page import AccessError, Gate, read_token, tls_context
from nodeagent.page._access import FAILURE_SECONDS, MAX_ADDRESSES, MAX_FAILURES, Verdict
from nodeagent.settings import load_settings
from nodeagent.settings.page import Page

TOKEN = b"0123456789abcdef0123456789abcdef"


def basic(password: bytes, user: bytes = b"anybody") -> str:
    return "Basic " + base64.b64encode(user + b":" + password).decode()


def test_the_token_admits_under_any_name() -> None:
    gate = Gate(TOKEN)
    assert gate.judge("192.0.2.1", basic(TOKEN), 0) is Verdict.ADMITTED
    assert gate.judge("192.0.2.1", basic(TOKEN, b""), 0) is Verdict.ADMITTED


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Basic",
        "Basic !!!",
        "Basic " + base64.b64encode(TOKEN).decode(),
        "Bearer " + TOKEN.decode(),
        basic(b""),
        basic(TOKEN[:-1]),
        basic(TOKEN + b"x"),
        basic(b"\xff" * 32),
        "Basic \u00e4",
    ],
)
def test_anything_else_does_not(header: str) -> None:
    assert Gate(TOKEN).judge("192.0.2.1", header, 0) is Verdict.UNKNOWN


def test_guessing_is_slowed_down_for_the_guesser_alone() -> None:
    gate = Gate(TOKEN)
    for _ in range(MAX_FAILURES):
        assert gate.judge("192.0.2.1", basic(b"guess"), 5) is Verdict.UNKNOWN
    # Not even the right one is looked at: an answer would tell that it is right.
    assert gate.judge("192.0.2.1", basic(TOKEN), 6) is Verdict.SLOWED
    assert gate.judge("192.0.2.2", basic(TOKEN), 6) is Verdict.ADMITTED
    assert gate.judge("192.0.2.1", basic(TOKEN), 5 + FAILURE_SECONDS) is Verdict.ADMITTED


def test_a_browser_that_was_not_asked_yet_does_not_guess() -> None:
    gate = Gate(TOKEN)
    for _ in range(2 * MAX_FAILURES):
        assert gate.judge("192.0.2.1", "", 0) is Verdict.UNKNOWN
    assert gate.judge("192.0.2.1", basic(TOKEN), 0) is Verdict.ADMITTED


def test_what_is_remembered_of_guessers_is_bounded() -> None:
    gate = Gate(TOKEN)
    for number in range(2 * MAX_ADDRESSES):
        gate.judge(f"2001:db8::{number:x}", basic(b"guess"), 0)
    assert len(gate._failures) == MAX_ADDRESSES


def test_a_token_is_never_shown() -> None:
    gate = Gate(TOKEN)
    assert TOKEN.decode() not in repr(gate) + str(gate)


def test_a_token_is_read_without_its_line_end(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_bytes(TOKEN + b"\n")
    path.chmod(0o600)
    assert read_token(path) == TOKEN


def _shared(path: Path) -> None:
    path.write_bytes(TOKEN)
    path.chmod(0o640)


def _short(path: Path) -> None:
    path.write_bytes(b"secret")
    path.chmod(0o600)


def _long(path: Path) -> None:
    path.write_bytes(b"x" * 2000)
    path.chmod(0o600)


def _link(path: Path) -> None:
    path.with_name("other").write_bytes(TOKEN)
    path.with_name("other").chmod(0o600)
    path.symlink_to(path.with_name("other"))


@pytest.mark.parametrize(
    "make,reason",
    [
        pytest.param(lambda _: None, "No such file", id="none"),
        pytest.param(_shared, "others may read", id="shared"),
        pytest.param(_short, "must hold 32 to 1024 bytes", id="short"),
        pytest.param(_long, "must hold 32 to 1024 bytes", id="long"),
        pytest.param(_link, "symbolic links", id="link"),
        pytest.param(lambda path: path.mkdir(mode=0o700), "", id="directory"),
    ],
)
def test_a_file_that_is_no_good_is_refused(
    tmp_path: Path, make: Callable[[Path], None], reason: str
) -> None:
    path = tmp_path / "token"
    make(path)
    with pytest.raises(AccessError) as refused:
        read_token(path)
    assert reason in str(refused.value)
    assert str(path) in str(refused.value)
    assert "secret" not in str(refused.value)


def test_a_certificate_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pem").write_text("nonsense")
    with pytest.raises(AccessError, match="PEM"):
        tls_context(tmp_path / "x.pem", tmp_path / "x.pem")
    with pytest.raises(AccessError, match="No such file"):
        tls_context(tmp_path / "a.pem", tmp_path / "a.pem")


def load(tmp_path: Path, text: str) -> Page:
    path = tmp_path / "nodeagent.yaml"
    path.write_text(f"node: worker\n{text}")
    return load_settings(path).page


def test_the_page_is_shown_nowhere_else_by_default(tmp_path: Path) -> None:
    assert load(tmp_path, "") == Page()


def test_a_page_beyond_loopback_has_token_and_tls(tmp_path: Path) -> None:
    found = load(
        tmp_path,
        "page:\n  address: 192.0.2.1:15010\n  token_file: /etc/n/token\n"
        "  certificate_file: /etc/n/tls.crt\n  key_file: /etc/n/tls.key\n",
    )
    assert found == Page(
        address="192.0.2.1:15010",
        token_file=Path("/etc/n/token"),
        certificate_file=Path("/etc/n/tls.crt"),
        key_file=Path("/etc/n/tls.key"),
    )


@pytest.mark.parametrize(
    "section,reason",
    [
        ("{}", "add page.address"),
        ("{token_file: /t}", "add page.address"),
        ("{address: '127.0.0.1:1'}", "add page.token_file"),
        ("{address: '0.0.0.0:15010', token_file: /t}", "must not travel in the clear"),
        ("{address: '[::]:15010', token_file: /t}", "must not travel in the clear"),
        ("{address: '127.0.0.1:1', token_file: /t, key_file: /k}", "belong together"),
        ("{address: 'localhost:1', token_file: /t}", "is no address with a port"),
        ("{address: '127.0.0.1:0', token_file: /t}", "is no address with a port"),
        ("{address: '127.0.0.1:1', token_file: t}", "is no file"),
        ("{address: '127.0.0.1:1', token_file: /a/../t}", "is no file"),
    ],
)
def test_a_section_that_shows_it_unprotected_is_refused(
    tmp_path: Path, section: str, reason: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, f"page: {section}\n")
    assert reason in str(refused.value)
