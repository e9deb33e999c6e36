"""Traces in the C core: who is sampled, and how both halves of a tunnel come to have one trace."""

from __future__ import annotations

import re

import pytest

from support.corelab import (
    DECISION,
    PORT,
    SERIES,
    SERVER_V4,
    Judged,
    Pair,
    hand_rule,
    inbound_rule,
    outbound_rule,
    pair,
)
from support.netns import wait_until
from ztunnel import _core

pytestmark = pytest.mark.netns

ALL = 1 << 32
NOBODY = bytes(8)
TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-0([01])")
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
BURST = 200
"""ZT_TRACE_BURST."""


def with_line(judged: Judged, upcall: _core.Upcall) -> None:
    """Forward everything; good ends have a line."""
    number = DECISION + upcall.id
    judged.core.decide_forward(number, SERIES, b"", 0)
    judged.core.describe(number, b"a line\n")
    judged.core.answer(upcall.id, upcall.epoch, number)


def call(lab: Pair, count: int = 1) -> None:
    """Open `count` connections, one after the other, and end them well."""
    with lab.listen() as listener:
        for _ in range(count):
            with lab.connect() as sock:
                app, _ = listener.accept()
                app.close()
                assert sock.recv(1) == b""


def asked(lab: Pair, *parts: int) -> list[dict[str, str]]:
    """Return the header fields of the CONNECTs of connections, each begun with so much sampled."""
    found = []
    with lab.hand_listen() as listener:
        server = None
        for part in parts:
            if part >= 0:
                lab.client.core.set_tracing(True, part)
            with lab.connect():
                server = server or lab.hand_server(listener)
                stream, fields = server.request()
                server.answer(stream, 200)
                found.append(fields)
        if server is not None:
            server.close()
    return found


def traced(ended: _core.Ended) -> tuple[str, str, bytes]:
    return ended.trace_id.hex(), ended.span_id.hex(), ended.parent_id


def test_off_no_byte_and_no_report_is_more_than_before() -> None:
    with pair(hand_rule) as lab:
        (fields,) = asked(lab, -1)
        assert fields.keys() == {":method", ":authority", "baggage", "forwarded"}
    with pair(with_line) as lab:
        call(lab)
        wait_until(lambda: lab.client.lines, "its line")
        assert lab.client.ended == []


def test_both_halves_have_one_trace_and_the_server_is_the_clients_child() -> None:
    with pair() as lab:
        for judged in (lab.client, lab.server):
            judged.core.set_tracing(True, ALL if judged is lab.client else 0)
        call(lab)
        (client,), (server,) = lab.client.wait_ended(1), lab.server.wait_ended(1)
        assert len(client.trace_id) == 16
        assert len(client.span_id) == 8
        assert any(client.trace_id)
        assert client.parent_id == NOBODY
        assert server.trace_id == client.trace_id
        assert server.parent_id == client.span_id
        assert server.span_id not in (client.span_id, NOBODY)
        for half in (client, server):
            assert half.started_us <= half.opened_us <= half.started_us + half.duration_us


def test_what_is_not_sampled_says_so_and_the_other_half_is_not_either() -> None:
    with pair() as lab:
        lab.client.core.set_tracing(True, 0)
        lab.server.core.set_tracing(True, ALL)
        call(lab)
        (client,), (server,) = lab.client.wait_ended(1), lab.server.wait_ended(1)
        assert (client.trace_id, server.trace_id) == (b"", b"")
        assert (client.span_id, client.parent_id, client.opened_us) == (b"", b"", 0)


def test_the_header_is_w3cs_and_new_for_each_connection() -> None:
    # One worker: each has connections of its own.
    with pair(hand_rule, workers=1) as lab:
        seen = set()
        for fields, flag in zip(asked(lab, ALL, 0, ALL), "101", strict=True):
            found = TRACEPARENT.fullmatch(fields["traceparent"])
            assert found is not None
            assert found[3] == flag
            seen |= {found[1], found[2]}
        assert len(seen) == 6


def test_a_traced_connection_is_reported_instead_of_its_line() -> None:
    with pair(with_line) as lab:
        lab.client.core.set_tracing(True, ALL)
        call(lab)
        (found,) = lab.client.wait_ended(1)
        assert (_core.REASONS[found.reason], len(found.trace_id)) == ("closed", 16)
        assert lab.client.lines == []
        lab.client.core.set_tracing(False, ALL)
        call(lab)
        wait_until(lambda: lab.client.lines, "its line")
        assert len(lab.client.ended) == 1


def test_about_the_wanted_part_is_sampled() -> None:
    with pair(with_line) as lab:
        lab.client.core.set_tracing(True, ALL // 4)
        call(lab, 200)
        wait_until(lambda: len(lab.client.ended) + len(lab.client.lines) == 200, "all have ended")
        # Fifty are expected; 6 sigma of a binomial distribution are 37.
        assert 13 < len(lab.client.ended) < 87
        assert len({each.trace_id for each in lab.client.ended}) == len(lab.client.ended)


@pytest.mark.parametrize(
    "fields, expected",
    [
        ([f"00-{TRACE}-{SPAN}-01"], "child"),
        ([f"cc-{TRACE}-{SPAN}-03-and-more"], "child"),
        ([f"00-{TRACE}-{SPAN}-00"], "none"),
        ([], "root"),
        (["nonsense"], "root"),
        ([f"00-{TRACE}-{SPAN}-01-and-more"], "root"),
        ([f"00-{TRACE.upper()}-{SPAN}-01"], "root"),
        ([f"00-{'0' * 32}-{SPAN}-01"], "root"),
        ([f"00-{TRACE}-{'0' * 16}-01"], "root"),
        ([f"ff-{TRACE}-{SPAN}-01"], "root"),
        ([f"00-{TRACE}-{SPAN}-01"] * 2, "root"),
        ([f"00-{TRACE}-{SPAN}-01"] * 3, "root"),
        ([f"00-{TRACE}-{SPAN}-00"] * 2, "root"),
    ],
)
def test_a_peer_may_join_a_trace_and_do_nothing_else(fields: list[str], expected: str) -> None:
    with pair() as lab:
        lab.server.core.set_tracing(True, ALL)
        with lab.listen() as listener:
            client = lab.hand_client()
            extra = [(b"traceparent", each.encode()) for each in fields]
            stream = client.connect(f"{SERVER_V4}:{PORT}", *extra)
            assert client.status(stream) == 200
            app, _ = listener.accept()
            client.send(stream, b"", end=True)
            app.close()
            (found,) = lab.server.wait_ended(1)
            client.close()
        trace, span, parent = traced(found)
        if expected == "child":
            assert (trace, parent.hex()) == (TRACE, SPAN)
            assert span != SPAN
        elif expected == "root":
            assert trace not in (TRACE, "")
            assert parent == NOBODY
        else:
            assert (trace, span, parent) == ("", "", b"")


def test_who_asks_for_too_many_traces_is_carried_without() -> None:
    with pair(workers=1) as lab:
        lab.server.core.set_tracing(True, 0)
        traceparent = f"00-{TRACE}-{SPAN}-01".encode()
        with lab.listen() as listener:
            client = lab.hand_client()
            for number in range(1, 2 * BURST + 1):
                stream = client.connect(f"{SERVER_V4}:{PORT}", (b"traceparent", traceparent))
                assert client.status(stream) == 200
                app, _ = listener.accept()
                client.send(stream, b"", end=True)
                app.close()
                if number % 50 == 0:
                    lab.server.wait_ended(number)
            client.close()
        ended = lab.server.wait_ended(2 * BURST)
        left_out = lab.server.core.stats().traces_left_out
        assert sum(bool(each.trace_id) for each in ended) + left_out == 2 * BURST
        assert {_core.REASONS[each.reason] for each in ended} == {"closed"}
        # 200 a second come back; a run of a whole second needs no refusal.
        seconds = (ended[-1].started_us - ended[0].started_us) / 1e6
        assert left_out >= BURST - 200 * (seconds + 1)


def test_a_refusal_is_traced_too() -> None:
    def refuse(judged: Judged, upcall: _core.Upcall) -> None:
        if upcall.kind == _core.INBOUND_HBONE:
            number = DECISION + upcall.id
            judged.core.decide_refuse(number, SERIES, _core.REASONS.index("policy_denied"))
            judged.core.answer(upcall.id, upcall.epoch, number)
        else:
            inbound_rule(judged, upcall)

    with pair(outbound_rule, refuse) as lab:
        lab.client.core.set_tracing(True, ALL)
        lab.server.core.set_tracing(True, ALL)
        sock = lab.connect()
        (client,), (server,) = lab.client.wait_ended(1), lab.server.wait_ended(1)
        sock.close()
        assert lab.client.reasons() == ["denied_by_peer"]
        assert lab.server.reasons() == ["policy_denied"]
        assert (server.trace_id, server.parent_id) == (client.trace_id, client.span_id)
        assert (client.opened_us, server.opened_us) == (0, 0)


@pytest.mark.parametrize("parts", [ALL + 1, 1 << 63])
def test_more_than_all_cannot_be_sampled(parts: int) -> None:
    with pytest.raises(ValueError, match="more than 2"):
        Judged(with_line).core.set_tracing(True, parts)
