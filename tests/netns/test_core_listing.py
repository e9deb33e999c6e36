"""The C core's list of the connections that are there: whole, each once, while they come and go."""

from __future__ import annotations

import select
import socket
import threading
import time

import pytest

from support.corelab import (
    CLIENT_V4,
    DECISION,
    PORT,
    SERIES,
    SERVER_V4,
    Judged,
    Pair,
    packed,
    pair,
)
from support.netns import wait_until
from ztunnel import _core

pytestmark = pytest.mark.netns

MANY = 600
"""More than two slices of each of two workers."""


def listed(judged: Judged) -> tuple[list[_core.Listed], int]:
    """Take one whole listing."""
    judged.core.list_connections()
    return take(judged)


def take(judged: Judged) -> tuple[list[_core.Listed], int]:
    found: list[_core.Listed] = []
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        some, over, missed = judged.core.listed(100)
        found += some
        if over:
            return found, missed
        # The collecting thread reads the descriptor too: whoever is late finds it empty.
        select.select([judged.core.event_fd], [], [], 0.01)
    raise AssertionError(f"no end of the listing after {len(found)} connections")


def state(one: _core.Listed) -> str:
    return _core.CONNECTION_STATES[one.state]


def forward(judged: Judged, upcall: _core.Upcall) -> None:
    number = DECISION + upcall.id
    judged.core.decide_forward(number, SERIES, b"", 0)
    judged.core.answer(upcall.id, upcall.epoch, number)


Ends = list[tuple[socket.socket, socket.socket]]


def open_many(lab: Pair, listener: socket.socket, count: int) -> Ends:
    return [(lab.connect(), listener.accept()[0]) for _ in range(count)]


def close_all(ends: Ends) -> None:
    for both in ends:
        for end in both:
            end.close()


def test_both_halves_of_a_tunnel_say_what_they_carry_and_how() -> None:
    with pair() as lab:
        listener = lab.listen()
        sock = lab.connect()
        app, _ = lab.accept(listener)
        sock.sendall(b"abc")
        assert app.recv(3) == b"abc"
        app.sendall(b"12345")
        assert sock.recv(5) == b"12345"
        (out,), missed = listed(lab.client)
        assert missed == 0
        (inside,), _ = listed(lab.server)
        source = sock.getsockname()[1]
        assert (out.kind, inside.kind) == (_core.OUTBOUND, _core.INBOUND_HBONE)
        for one in (out, inside):
            assert state(one) == "open"
            assert (one.source, one.destination) == (packed(CLIENT_V4), packed(SERVER_V4))
            assert one.destination_port == PORT
            assert (one.received, one.sent) == (3, 5)
            assert one.decision > 0
            assert 0 < one.started_us <= one.moved_us <= time.monotonic() * 1e6
            assert one.tls_version == "TLSv1.3"
            assert one.cipher == "TLS_AES_128_GCM_SHA256"
            assert one.group == "X25519MLKEM768"
        assert out.source_port == source
        assert (out.upstream, out.upstream_port) == (packed(SERVER_V4), 15008)
        # The numbers that the rules answer the certificates' questions with.
        assert (out.identity, inside.identity) == (1, 7)
        sock.close()


def test_what_has_no_tunnel_has_no_tls() -> None:
    with pair(forward) as lab:
        ends = open_many(lab, lab.listen(), 1)
        (one,), _ = listed(lab.client)
        assert (one.tls_version, one.cipher, one.group, one.identity) == ("", "", "", 0)
        assert (one.upstream, one.upstream_port) == (packed(SERVER_V4), PORT)
        assert one.moved_us == 0
        close_all(ends)


def test_a_connection_without_a_decision_is_listed_too() -> None:
    asked = threading.Event()

    def silent(_judged: Judged, _upcall: _core.Upcall) -> None:
        asked.set()

    with pair(silent) as lab:
        sock = lab.connect()
        assert asked.wait(30)
        (one,), _ = listed(lab.client)
        assert (state(one), one.decision, one.upstream) == ("deciding", 0, b"")
        sock.close()


def test_nothing_is_listed_where_nothing_is() -> None:
    with pair() as lab:
        assert listed(lab.client) == ([], 0)


def test_many_are_listed_each_once_however_often() -> None:
    with pair(forward) as lab:
        listener = lab.listen()
        ends = open_many(lab, listener, MANY)
        first, missed = listed(lab.client)
        again, _ = listed(lab.client)
        assert (len(first), missed) == (MANY, 0)
        numbers = {one.number for one in first}
        assert len(numbers) == MANY
        assert {one.number for one in again} == numbers
        assert {one.source_port for one in first} == {sock.getsockname()[1] for sock, _ in ends}
        close_all(ends)
        lab.client.wait_ended(MANY)
        assert listed(lab.client) == ([], 0)
        # Numbers are not used again.
        ends = open_many(lab, listener, 10)
        assert numbers.isdisjoint(one.number for one in listed(lab.client)[0])
        close_all(ends)


def test_one_listing_at_a_time() -> None:
    with pair() as lab:
        lab.client.core.list_connections()
        with pytest.raises(BlockingIOError):
            lab.client.core.list_connections()
        take(lab.client)
        assert listed(lab.client) == ([], 0)


def test_before_the_start_nothing_can_be_listed() -> None:
    core = Judged(forward).core
    with pytest.raises(OSError, match="Invalid argument"):
        core.list_connections()


def test_those_that_stay_are_listed_while_others_come_go_and_are_killed() -> None:
    with pair(forward) as lab:
        listener = lab.listen()
        stay = open_many(lab, listener, 300)
        ports = {sock.getsockname()[1] for sock, _ in stay}
        stop = threading.Event()

        def churn() -> None:
            while not stop.is_set():
                close_all(open_many(lab, listener, 5))
                # Of nobody: every worker looks at all that it has.
                lab.client.core.kill_identity(99, _core.REASONS.index("trust_withdrawn"))

        thread = threading.Thread(target=churn)
        thread.start()
        try:
            for _ in range(20):
                found, missed = listed(lab.client)
                numbers = {one.number for one in found}
                assert (len(numbers), missed) == (len(found), 0)
                assert ports <= {one.source_port for one in found}
        finally:
            stop.set()
            thread.join()
        assert len(lab.client.upcalls) > 0
        for upcall in lab.client.upcalls:
            lab.client.core.kill_decision(
                DECISION + upcall.id, _core.REASONS.index("policy_changed")
            )
        wait_until(lambda: lab.client.core.stats().connections == 0, "all of them are cut")
        assert listed(lab.client) == ([], 0)
        close_all(stay)
