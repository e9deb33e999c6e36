"""The C core's log lines of connections that end as they should: filled in, whole, and bounded."""

from __future__ import annotations

import re
import time
from calendar import timegm
from collections.abc import Callable

import pytest

from support.corelab import (
    CLIENT_V4,
    CLIENT_V6,
    DECISION,
    SERIES,
    SERVER_V4,
    SERVER_V6,
    Judged,
    Pair,
    pair,
)
from support.e2e import reset
from support.netns import wait_until
from ztunnel import _core

pytestmark = pytest.mark.netns

FORM = b"at=\x01 from=\x02 in=\x03 out=\x04 took=\x05ms\n"
FILLED = re.compile(r"at=(.{19})\.\d{3}Z from=(\S+) in=(\d+) out=(\d+) took=(\d+)ms")
LINE_MAX = 16384
"""ZT_LINE_MAX."""
LINES_MAX = 16 << 20
"""ZT_LINES_MAX."""
PLACES = 10
"""ZT_LINE_PLACES."""


def described(form: bytes) -> Callable[[Judged, _core.Upcall], None]:
    """Forward everything, with these lines for its ends."""

    def rule(judged: Judged, upcall: _core.Upcall) -> None:
        number = DECISION + upcall.id
        judged.core.decide_forward(number, SERIES, b"", 0)
        judged.core.describe(number, form)
        judged.core.answer(upcall.id, upcall.epoch, number)

    return rule


def call(lab: Pair, address: str = SERVER_V4) -> str:
    """Carry three bytes there and five back; whom the server saw."""
    listener = lab.listen(address)
    sock = lab.connect(address)
    app, source = lab.accept(listener)
    sock.sendall(b"abc")
    assert app.recv(3) == b"abc"
    app.sendall(b"12345")
    assert sock.recv(5) == b"12345"
    app.close()
    sock.close()
    listener.close()
    return f"[{source[0]}]:{source[1]}" if ":" in source[0] else f"{source[0]}:{source[1]}"


@pytest.mark.parametrize("address, client", [(SERVER_V4, CLIENT_V4), (SERVER_V6, f"[{CLIENT_V6}]")])
def test_an_end_is_its_decisions_lines_and_no_report(address: str, client: str) -> None:
    with pair(described(FORM + b"and " + FORM)) as lab:
        call(lab, address)
        wait_until(lambda: lab.client.lines, "the lines are written")
        first, second = lab.client.lines
        found = FILLED.fullmatch(first)
        assert found is not None
        assert second == f"and {first}"
        at, source, received, sent, took = found.groups()
        began = timegm(time.strptime(at, "%Y-%m-%dT%H:%M:%S"))
        assert abs(time.time() - began) < 120
        assert source.rpartition(":")[0] == client
        assert (received, sent) == ("3", "5")
        assert int(took) < 120_000
        assert lab.client.ended == []


def test_a_failure_is_reported_with_its_reason() -> None:
    with pair(described(FORM)) as lab:
        listener = lab.listen()
        sock = lab.connect()
        app, _ = lab.accept(listener)
        sock.sendall(b"abc")
        assert app.recv(3) == b"abc"
        reset(app)
        lab.client.wait_ended(1)
        assert lab.client.reasons() == ["server_reset"]
        assert lab.client.lines == []
        sock.close()


def test_only_whole_lines_of_a_decision_are_taken() -> None:
    with pair() as lab:
        core = lab.client.core
        core.decide_deliver(100, SERIES)
        wrong = (
            *(b"", b"no line feed", b"tab\there\n", b"\x06\n", b"\x00\n"),
            b"\x01" * (PLACES + 1) + b"\n",
            b"a" * LINE_MAX + b"\n",
        )
        for form in wrong:
            with pytest.raises(ValueError, match="whole lines of at most 16384 bytes"):
                core.describe(100, form)
        with pytest.raises(KeyError):
            core.describe(101, FORM)
        core.describe(100, b"\x01" * PLACES + b"a" * (LINE_MAX - PLACES - 1) + b"\n")
        with pytest.raises(ValueError, match="already in use"):
            core.describe(100, FORM)
        core.release_decision(100)


def test_lines_that_nobody_takes_are_bounded_and_counted() -> None:
    form = b"\x02 " + b"a" * (LINE_MAX - 4) + b"\n"
    calls = LINES_MAX // LINE_MAX + 20
    with pair(described(form), workers=1) as lab:
        call(lab)
        wait_until(lambda: lab.client.lines, "the collecting thread has taken a line")
        lab.client.stop_collecting()
        core = lab.client.core
        listener = lab.listen()
        for _ in range(calls):
            sock = lab.connect()
            app, _ = lab.accept(listener)
            app.close()
            assert sock.recv(1) == b""
            sock.close()
        wait_until(lambda: core.stats().connections == 0, "all have ended")
        text, count = core.lines()
        lost = core.stats().events_lost
        assert LINES_MAX // 2 < len(text) <= LINES_MAX
        assert count + lost == calls
        assert lost > 0
        assert text.count(b"\n") == count
        assert all(len(line) > LINE_MAX - 4 for line in text.splitlines())
        assert core.lines() == (b"", 0)
