"""Every wait of the C core ends: each deadline fires, says so, and leaves alone what is only slow.

A deadline is made short for the test that waits for it; all others keep their defaults, which no
test reaches. What is slow but alive moves at a fraction of the deadline, many times over.
"""

from __future__ import annotations

import contextlib
import fcntl
import select
import socket
import sys
import termios
import time
from collections.abc import Callable, Iterator
from typing import Final

import pytest

from support.corelab import (
    DECISION,
    HBONE_PORT,
    PORT,
    SERIES,
    SERVER_V4,
    Judged,
    Pair,
    hand_rule,
    outbound_rule,
    pair,
)
from support.hbone import ACK, END_HEADERS, Client, Gone, Kind, Server
from support.netns import PATIENCE, wait_until
from ztunnel import _core, tls

pytestmark = pytest.mark.netns

SHORT: Final = round(300_000 * PATIENCE)
"""Microseconds of the deadline under test. What comes before it must fit in."""

STEPS: Final = 18
"""Moves of what is slow but alive, a sixth of SHORT apart: three deadlines in all."""

REFUSED_STREAM: Final = 7
"""RFC 9113, 7."""

CONCURRENT_STREAMS: Final = 3
"""SETTINGS_MAX_CONCURRENT_STREAMS (RFC 9113, 6.5.2)."""


def paced() -> Iterator[int]:
    """Count STEPS, with a pause before each: the pause is what is tested."""
    for step in range(STEPS):
        time.sleep(SHORT / 6 / 1e6)
        yield step


def forever(receive: Callable[[], object]) -> None:
    """Receive until that raises what the test expects."""
    while receive():
        pass


def by_hand(lab: Pair) -> tuple[socket.socket, Server, int]:
    """Return an application's socket, the peer that it has come to, and its unanswered stream."""
    listener = lab.hand_listen()
    sock = lab.connect()
    server = lab.hand_server(listener)
    return sock, server, server.request()[0]


def told(judged: Judged, reason: str, deadline: str) -> None:
    """Wait for the end that a deadline made, in the report and in the counters."""

    def reasons() -> list[str]:
        numbers = [each.reason for each in judged.ended] + [each.reason for each in judged.failed]
        return [_core.REASONS[number] for number in numbers]

    wait_until(lambda: reason in reasons(), f"{reason} is reported")
    assert judged.expired() == {deadline: 1}


def test_the_deadlines_can_be_set_and_only_to_something_sensible() -> None:
    core = _core.Core(1, tls.function_table(_core.FUNCTIONS))
    core.set_deadline("idle", 1)
    with pytest.raises(KeyError, match="nonsense"):
        core.set_deadline("nonsense", 1)
    for wrong in (0, 7 * 24 * 3600 * 1_000_000 + 1):
        with pytest.raises(ValueError, match="idle"):
            core.set_deadline("idle", wrong)


# --- before a connection stands -------------------------------------------------------------------


def test_decision() -> None:
    with pair(outbound=lambda *_: None) as lab:
        lab.client.core.set_deadline("decision", SHORT)
        with pytest.raises(ConnectionResetError):
            lab.connect().recv(1)
        told(lab.client, "decision_timeout", "decision")


def test_a_certificate_that_nobody_judges() -> None:
    def silent(judged: Judged, upcall: _core.Upcall) -> None:
        if upcall.kind != _core.SERVER_CERTIFICATE:
            hand_rule(judged, upcall)

    with pair(outbound=silent) as lab:
        lab.client.core.set_deadline("decision", SHORT)
        listener = lab.hand_listen()
        sock = lab.connect()
        lab.hand_tls(listener)
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
        told(lab.client, "decision_timeout", "decision")


def test_credential() -> None:
    with pair(certified=False) as lab:
        lab.server.core.set_deadline("credential", SHORT)
        assert lab.raw().recv(1) == b""
        told(lab.server, "no_credential", "credential")


@pytest.mark.parametrize("what", ["application", "hbone"])
def test_connect(what: str) -> None:
    with pair() as lab:
        judged, port = (lab.server, PORT) if what == "application" else (lab.client, HBONE_PORT)
        judged.core.set_deadline("connect", SHORT)
        lab.drop(port)
        with pytest.raises(ConnectionResetError):
            lab.connect().recv(1)
        told(judged, "connect_timeout", "connect")


def test_first_byte() -> None:
    with pair() as lab:
        lab.server.core.set_deadline("first_byte", SHORT)
        assert lab.raw().recv(1) == b""
        told(lab.server, "first_byte_timeout", "first_byte")


@pytest.mark.parametrize("side", ["server", "client"])
def test_tls_handshake(side: str) -> None:
    with pair(outbound=hand_rule) as lab:
        judged = lab.server if side == "server" else lab.client
        judged.core.set_deadline("tls_handshake", SHORT)
        if side == "server":
            sock = lab.raw()
            sock.sendall(b"\x16\x03\x01\x02\x00")
        else:
            listener = lab.hand_listen()
            lab.connect()
            sock, _ = lab.right.accept(listener)
        while sock.recv(65536):
            pass
        told(judged, "tls_timeout", "tls_handshake")


@pytest.mark.parametrize("side", ["server", "client"])
def test_http2_settings(side: str) -> None:
    with pair(outbound=hand_rule) as lab:
        judged = lab.server if side == "server" else lab.client
        judged.core.set_deadline("http2_settings", SHORT)
        if side == "server":
            tunnel = lab.raw_tls()
            tunnel.handshake()
        else:
            listener = lab.hand_listen()
            lab.connect()
            tunnel = lab.hand_tls(listener)
        with pytest.raises(Gone):
            forever(tunnel.receive)
        told(judged, "h2_timeout", "http2_settings")


def in_step(lab: Pair) -> Client:
    """Return a client that has nothing more to acknowledge: nothing may split a header block."""
    client = lab.hand_client()
    while not client.step().flags & ACK:
        pass
    return client


def test_a_connect_request_that_never_becomes_whole() -> None:
    with pair() as lab:
        lab.server.core.set_deadline("connect_request", SHORT)
        client = in_step(lab)
        client.frame(Kind.HEADERS, 0, 1, b"\0\7:method\7CONNECT")
        with pytest.raises(Gone):
            forever(client.step)
        told(lab.server, "connect_request_timeout", "connect_request")


def test_a_connect_request_in_pieces_is_only_slow() -> None:
    """Eight pieces are as many as nghttp2 takes (CVE-2024-28182)."""
    with pair() as lab:
        listener = lab.listen()
        lab.server.core.set_deadline("connect_request", SHORT * STEPS)
        client = in_step(lab)
        target = f"{SERVER_V4}:{PORT}".encode()
        block = b"\0\7:method\7CONNECT\0\12:authority" + bytes([len(target)]) + target
        client.frame(Kind.HEADERS, 0, 1, block[:5])
        for step, _ in zip(range(5, 12), paced(), strict=False):
            client.frame(Kind.CONTINUATION, 0, 1, block[step : step + 1])
        client.frame(Kind.CONTINUATION, END_HEADERS, 1, block[12:])
        assert client.status(1) == 200
        lab.accept(listener)


def test_connect_answer() -> None:
    with pair(outbound=hand_rule) as lab:
        lab.client.core.set_deadline("connect_answer", SHORT)
        sock, server, stream = by_hand(lab)
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
        told(lab.client, "connect_answer_timeout", "connect_answer")
        while stream not in server.resets:
            server.step()


def test_stream_wait() -> None:
    with pair(outbound=hand_rule, workers=1) as lab:
        lab.client.core.set_deadline("stream_wait", SHORT)
        listener = lab.hand_listen()
        sock = lab.connect()
        server = lab.hand_server(listener, (CONCURRENT_STREAMS, 0))
        server.reset(server.request()[0], REFUSED_STREAM)
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
        told(lab.client, "stream_wait_timeout", "stream_wait")
        server.close()


# --- while it stands ------------------------------------------------------------------------------


def spliced(judged: Judged, upcall: _core.Upcall) -> None:
    """Send everything on as it is."""
    judged.core.decide_forward(DECISION + upcall.id, SERIES, b"", 0)
    judged.core.answer(upcall.id, upcall.epoch, DECISION + upcall.id)


def relayed(lab: Pair) -> tuple[socket.socket, socket.socket]:
    """Return both applications' sockets of a connection that stands."""
    listener = lab.listen()
    near = lab.connect()
    near.sendall(b"x")
    far, _ = lab.accept(listener)
    assert far.recv(1) == b"x"
    return near, far


@pytest.mark.parametrize("ends", ["client", "server"])
@pytest.mark.parametrize("rule", [outbound_rule, spliced], ids=["hbone", "plaintext"])
def test_half_closed(rule: Callable[[Judged, _core.Upcall], None], ends: str) -> None:
    """The other half works for three deadlines; once it falls silent, it is cut."""
    with pair(outbound=rule) as lab:
        near, far = relayed(lab)
        if ends == "server":
            near, far = far, near
        near.shutdown(socket.SHUT_WR)
        assert far.recv(1) == b""
        lab.client.core.set_deadline("half_closed", SHORT)
        for step in paced():
            far.sendall(b"%c" % step)
            assert near.recv(1) == b"%c" % step
        assert not lab.client.expired()
        with pytest.raises(ConnectionResetError):
            near.recv(1)
        told(lab.client, "half_closed_timeout", "half_closed")


def test_both_ends_silent_is_no_half_close() -> None:
    with pair() as lab:
        for judged in (lab.client, lab.server):
            judged.core.set_deadline("half_closed", SHORT)
        near, far = relayed(lab)
        assert not select.select([near, far], [], [], 4 * SHORT / 1e6)[0]
        near.sendall(b"y")
        assert far.recv(1) == b"y"


def unsent(sock: socket.socket) -> int:
    """Return the bytes that the other side's kernel has not acknowledged (tcp(7), SIOCOUTQ)."""
    return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def test_a_reader_that_stopped_after_the_end_is_cut() -> None:
    """Everything was sent and ended; what one reader leaves in the tunnel is not kept for ever.

    The end may be with either tunnel: behind what the other side's window holds back, or delivered.
    """
    with pair() as lab:
        near, far = relayed(lab)
        sent = received = 0
        far.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                sent += far.send(b"x" * 65536)
        while unsent(far):
            received += len(near.recv(65536))
        for judged in (lab.client, lab.server):
            judged.core.set_deadline("half_closed", SHORT)
        far.close()
        wait_until(
            lambda: {**lab.client.expired(), **lab.server.expired()} == {"half_closed": 1},
            "the deadline",
        )
        # What looks complete is complete: the reader's kernel may have had all of it.
        with contextlib.suppress(ConnectionResetError):
            while data := near.recv(1 << 20):
                received += len(data)
            assert received == sent


def test_keepalive() -> None:
    with pair(outbound=hand_rule) as lab:
        lab.client.core.set_deadline("ping_interval", SHORT)
        sock, server, stream = by_hand(lab)
        server.answer(stream, 200)
        pings = 0
        while pings < 3:
            pings += server.step().kind == Kind.PING
        lab.client.core.set_deadline("ping_answer", SHORT)
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
        told(lab.client, "keepalive_timeout", "ping_answer")


def test_a_peer_that_answers_pings_late_lives() -> None:
    with pair(outbound=hand_rule) as lab:
        lab.client.core.set_deadline("ping_interval", SHORT)
        lab.client.core.set_deadline("ping_answer", SHORT)
        sock, server, stream = by_hand(lab)
        server.answer(stream, 200)
        for _ in paced():
            server.frame(Kind.PING, 1, 0, b"12345678")
        server.send(stream, b"x")
        assert sock.recv(1) == b"x"
        assert not lab.client.expired()


def test_idle() -> None:
    with pair(outbound=hand_rule, workers=1) as lab:
        lab.client.core.set_deadline("ping_interval", SHORT)
        lab.client.core.set_deadline("idle", SHORT * 2)
        sock, server, stream = by_hand(lab)
        server.answer(stream, 200, end=True)
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""
        with pytest.raises(Gone, match="GOAWAY 0"):
            forever(server.step)
        wait_until(lambda: lab.client.expired() == {"idle": 1}, "the deadline is counted")
