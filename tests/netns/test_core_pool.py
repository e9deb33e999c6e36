"""The pool of HBONE connections: used again, dialled with measure, and left in good order.

The peer is spoken by hand, so that it can allow few streams, go away and refuse. One worker, and
so one pool.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable, Iterator
from typing import Final

import pytest

from support.corelab import HAND_PORT, PORT, SERVER_V4, Pair, hand_rule, pair
from support.hbone import Gone, Kind, Server
from support.netns import DEADLINE, wait_until
from ztunnel import _core

pytestmark = pytest.mark.netns

CONCURRENT_STREAMS: Final = 3
"""SETTINGS_MAX_CONCURRENT_STREAMS (RFC 9113, 6.5.2)."""

REFUSED_STREAM: Final = 7
"""RFC 9113, 7."""

LAST: Final = 2**31 - 1
"""The last stream that a GOAWAY can name: "none yet" (RFC 9113, 6.8)."""

BACKOFF_FIRST: Final = 0.15
"""Seconds: the least wait after a failed dial, jitter included (ZT_BACKOFF_FIRST_US)."""


@pytest.fixture
def lab() -> Iterator[Pair]:
    with pair(outbound=hand_rule, workers=1) as made:
        yield made


@pytest.fixture
def listener(lab: Pair) -> socket.socket:
    return lab.hand_listen()


def waiting(listener: socket.socket, seconds: float = 0) -> bool:
    """Whether a connection waits to be accepted."""
    return bool(select.select([listener], [], [], seconds)[0])


def serve(server: Server) -> int:
    """Answer the next request and return its stream."""
    stream, _ = server.request()
    server.answer(stream, 200)
    return stream


def carries(sock: socket.socket, server: Server, stream: int) -> None:
    """Assert that bytes pass both ways."""
    sock.sendall(b"ping")
    assert server.receive(stream, 4) == b"ping"
    server.send(stream, b"pong")
    assert sock.recv(4) == b"pong"


def finish(sock: socket.socket, server: Server, stream: int) -> None:
    """End a connection in good order from both sides."""
    server.send(stream, b"", end=True)
    sock.close()
    while stream not in server.ended:
        server.step()


# --- room -----------------------------------------------------------------------------------------


def test_a_connection_at_its_limit_serves_again_once_a_stream_has_ended(
    lab: Pair, listener: socket.socket
) -> None:
    first = lab.connect()
    one = lab.hand_server(listener, (CONCURRENT_STREAMS, 1))
    stream = serve(one)
    carries(first, one, stream)
    second = lab.connect()
    two = lab.hand_server(listener, (CONCURRENT_STREAMS, 1))
    carries(second, two, serve(two))
    finish(first, one, stream)
    third = lab.connect()
    carries(third, one, serve(one))
    assert not waiting(listener)


def test_connections_are_dialled_by_the_limit_that_the_peer_has_shown(
    lab: Pair, listener: socket.socket
) -> None:
    """Six at once towards a peer that takes two on each connection: three connections."""
    socks = [lab.connect() for _ in range(6)]
    servers = [lab.hand_server(listener, (CONCURRENT_STREAMS, 2))]
    served = [serve(servers[0]), serve(servers[0])]
    while len(served) < len(socks):
        server = lab.hand_server(listener, (CONCURRENT_STREAMS, 2))
        servers.append(server)
        served += [serve(server), serve(server)]
    assert len(servers) == 3
    assert not waiting(listener)


def test_of_two_connections_without_streams_one_is_closed_soon(
    lab: Pair, listener: socket.socket
) -> None:
    lab.client.core.set_deadline("idle_surplus", 500_000)
    first, second = lab.connect(), lab.connect()
    one = lab.hand_server(listener, (CONCURRENT_STREAMS, 1))
    stream = serve(one)
    two = lab.hand_server(listener, (CONCURRENT_STREAMS, 1))
    finish(second, two, serve(two))
    assert lab.client.core.stats().tls_connections == 2
    finish(first, one, stream)
    with pytest.raises(Gone, match="GOAWAY 0"):
        forever(one.step)
    wait_until(lambda: lab.client.core.stats().tls_connections == 1, "one is left")
    third = lab.connect()
    carries(third, two, serve(two))
    assert lab.client.expired() == {"idle_surplus": 1}


def test_a_limit_raised_midway_lets_in_who_waits(lab: Pair, listener: socket.socket) -> None:
    sock = lab.connect()
    server = lab.hand_server(listener, (CONCURRENT_STREAMS, 0))
    stream, _ = server.request()
    server.reset(stream, REFUSED_STREAM)
    another = lab.connect()
    server.limits((CONCURRENT_STREAMS, 2))
    by_source = {}
    for _ in range(2):
        stream, fields = server.request()
        server.answer(stream, 200)
        by_source[int(fields["forwarded"].split(":")[1].rstrip('"'))] = stream
    for each in (sock, another):
        carries(each, server, by_source[each.getsockname()[1]])
    assert not waiting(listener)


def test_a_limit_lowered_midway_keeps_what_is_open(lab: Pair, listener: socket.socket) -> None:
    socks = [lab.connect() for _ in range(3)]
    one = lab.hand_server(listener)
    streams = [serve(one) for _ in socks]
    one.limits((CONCURRENT_STREAMS, 1))
    while not one.step().flags & 1:
        pass
    late = lab.connect()
    two = lab.hand_server(listener)
    carries(late, two, serve(two))
    by_stream = dict(zip(streams, socks, strict=True))
    for stream, sock in by_stream.items():
        carries(sock, one, stream)


def test_a_peer_that_refuses_every_stream_is_asked_a_few_times(
    lab: Pair, listener: socket.socket
) -> None:
    sock = lab.connect()
    server = lab.hand_server(listener)
    for _ in range(3):
        server.reset(server.request()[0], REFUSED_STREAM)
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    lab.client.wait_ended(1)
    assert lab.client.reasons() == ["peer_reset"]


# --- dials that fail ------------------------------------------------------------------------------


def refused(lab: Pair, count: int) -> list[float]:
    """Connect so many at once; return after how many seconds each was told."""
    start = time.monotonic()
    socks = []
    for _ in range(count):
        sock = lab.left.make_socket()
        with contextlib.suppress(ConnectionResetError):
            sock.connect((SERVER_V4, PORT))
        socks.append(sock)
    ended = []
    for sock in socks:
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
        ended.append(time.monotonic() - start)
    return ended


def test_a_peer_that_refuses_is_not_dialled_once_for_each_connection(lab: Pair) -> None:
    seen = lab.count_syns(HAND_PORT)
    start = time.monotonic()
    for _ in range(10):
        refused(lab, 20)
    elapsed = time.monotonic() - start
    lab.client.wait_ended(200)
    assert set(lab.client.reasons()) == {"connect_refused"}
    assert 1 <= seen() <= 1 + elapsed / BACKOFF_FIRST
    assert len(lab.client.failed) == seen()


def test_a_failed_dial_is_told_to_all_at_once(lab: Pair) -> None:
    """None of them waits for a deadline of its own."""
    lab.client.core.set_deadline("connect", 300_000)
    lab.drop(HAND_PORT)
    assert max(refused(lab, 50)) < DEADLINE / 2
    lab.client.wait_ended(50)
    assert set(lab.client.reasons()) == {"connect_timeout"}
    assert lab.client.expired() == {"connect": len(lab.client.failed)}


def test_a_peer_that_comes_back_is_found(lab: Pair) -> None:
    refused(lab, 5)
    listener = lab.hand_listen()

    def answered() -> socket.socket | None:
        sock = lab.left.make_socket()
        with contextlib.suppress(ConnectionResetError):
            sock.connect((SERVER_V4, PORT))
            if waiting(listener, 0.1):
                return sock
        return None

    sock = wait_until(answered, "the peer is dialled again")
    assert sock is not None
    server = lab.hand_server(listener)
    carries(sock, server, serve(server))


def test_a_peer_that_closes_before_its_settings_has_failed_like_one_that_refuses(
    lab: Pair, listener: socket.socket
) -> None:
    seen = lab.count_syns(HAND_PORT)
    start = time.monotonic()
    for _ in range(20):
        sock = lab.left.make_socket()
        with contextlib.suppress(ConnectionResetError):
            sock.connect((SERVER_V4, PORT))
            # Either it is dialled for, or told at once that this has failed.
            if listener in select.select([listener, sock], [], [], DEADLINE)[0]:
                lab.hand_tls(listener).close()
            assert sock.recv(1) == b""
    assert seen() <= 1 + (time.monotonic() - start) / BACKOFF_FIRST


@pytest.mark.parametrize("told", ["h2_goaway", "tls_truncated"])
def test_a_peer_that_allows_no_stream_and_leaves_has_failed_too(
    lab: Pair, listener: socket.socket, told: str
) -> None:
    seen = lab.count_syns(HAND_PORT)
    start = time.monotonic()
    for _ in range(20):
        sock = lab.left.make_socket()
        with contextlib.suppress(ConnectionResetError):
            sock.connect((SERVER_V4, PORT))
            while listener in select.select([listener, sock], [], [], DEADLINE)[0]:
                server = lab.hand_server(listener, (CONCURRENT_STREAMS, 0))
                if told == "h2_goaway":
                    server.goaway(0)
                    with contextlib.suppress(Gone):
                        while server.step():
                            pass
                server.close()
            assert sock.recv(1) == b""
    # Before it was known to allow none it was asked for a stream: what becomes of that one depends
    # on whether it was on its way when the SETTINGS came.
    assert seen() <= 2 + (time.monotonic() - start) / BACKOFF_FIRST
    lab.client.wait_ended(20)
    assert set(lab.client.reasons()[1:]) == {told}


# --- going away -----------------------------------------------------------------------------------


def test_streams_that_a_goaway_leaves_behind_are_sent_anew(
    lab: Pair, listener: socket.socket
) -> None:
    socks = [lab.connect() for _ in range(2)]
    one = lab.hand_server(listener)
    kept, fields = one.request()
    left, _ = one.request()
    one.answer(kept, 200)
    one.goaway(kept)
    two = lab.hand_server(listener)
    again = serve(two)
    port = int(fields["forwarded"].split(":")[1].rstrip('"'))
    first, second = socks if socks[0].getsockname()[1] == port else socks[::-1]
    carries(first, one, kept)
    carries(second, two, again)
    assert left not in one.resets
    finish(first, one, kept)
    with pytest.raises(Gone):
        forever(one.step)


def test_after_a_goaway_new_streams_go_elsewhere_and_old_ones_live(
    lab: Pair, listener: socket.socket
) -> None:
    """The polite form: no stream is refused, none is new (RFC 9113, 6.8)."""
    first = lab.connect()
    one = lab.hand_server(listener)
    stream = serve(one)
    one.goaway(LAST)
    carries(first, one, stream)
    second = lab.connect()
    two = lab.hand_server(listener)
    carries(second, two, serve(two))
    carries(first, one, stream)


def close_politely(server: Server) -> None:
    server.goaway(0)
    server.close()


def reset(server: Server) -> None:
    server.tls.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    server.close()


@pytest.mark.parametrize("end", [close_politely, Server.close, reset])
def test_a_pooled_connection_that_the_peer_has_closed_is_not_used(
    lab: Pair, listener: socket.socket, end: Callable[[Server], None]
) -> None:
    sock = lab.connect()
    one = lab.hand_server(listener)
    finish(sock, one, serve(one))
    end(one)
    wait_until(lambda: lab.client.core.stats().tls_connections == 0, "the end is noticed")
    sock = lab.connect()
    two = lab.hand_server(listener)
    carries(sock, two, serve(two))


@pytest.mark.parametrize("end", [close_politely, Server.close, reset])
def test_a_connect_that_meets_the_end_is_sent_anew(
    lab: Pair, listener: socket.socket, end: Callable[[Server], None]
) -> None:
    """The race between an idle connection's end and its next stream."""
    sock = lab.connect()
    one = lab.hand_server(listener)
    finish(sock, one, serve(one))
    sock = lab.connect()
    one.request()
    end(one)
    two = lab.hand_server(listener)
    carries(sock, two, serve(two))
    assert lab.client.failed == []


def test_an_open_stream_is_not_sent_anew(lab: Pair, listener: socket.socket) -> None:
    sock = lab.connect()
    one = lab.hand_server(listener)
    carries(sock, one, serve(one))
    reset(one)
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    lab.client.wait_ended(1)
    assert lab.client.reasons() == ["peer_connection_lost"]
    assert not waiting(listener)


def test_a_connect_is_not_sent_anew_for_ever(lab: Pair, listener: socket.socket) -> None:
    sock = lab.connect()
    for _ in range(3):
        server = lab.hand_server(listener)
        server.request()
        # Let the SETTINGS be seen: what ends before them is a failed dial.
        while not server.step().flags & 1:
            pass
        reset(server)
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    assert not waiting(listener)


# --- what is trusted no more ----------------------------------------------------------------------


def test_a_rotated_certificate_moves_new_streams_to_a_new_connection(
    lab: Pair, listener: socket.socket
) -> None:
    first = lab.connect()
    one = lab.hand_server(listener)
    stream = serve(one)
    carries(first, one, stream)
    lab.rotate()
    second = lab.connect()
    two = lab.hand_server(listener)
    carries(second, two, serve(two))
    assert one.tls.peer().serial_number != two.tls.peer().serial_number
    carries(first, one, stream)
    finish(first, one, stream)
    with pytest.raises(Gone):
        forever(one.step)


def test_a_certificate_rotated_while_dialling_is_the_one_that_is_used(
    lab: Pair, listener: socket.socket
) -> None:
    sock = lab.connect()
    accepted, _ = lab.right.accept(listener)
    # Its handshake has begun with the certificate from before.
    assert select.select([accepted], [], [], DEADLINE)[0]
    lab.rotate()
    one = Server(accepted, lab.server_context())
    with pytest.raises(Gone):
        forever(one.step)
    two = lab.hand_server(listener)
    carries(sock, two, serve(two))
    assert two.tls.peer().serial_number == lab.serial


def test_a_suspected_peer_that_answers_lives(lab: Pair, listener: socket.socket) -> None:
    lab.client.core.set_deadline("ping_suspect", 300_000)
    sock = lab.connect()
    server = lab.hand_server(listener)
    stream = serve(server)
    peer = 1 + next(u.id for u in lab.client.upcalls if u.kind == _core.OUTBOUND)
    lab.client.core.suspect_peer(peer)
    while server.step().kind != Kind.PING:
        pass
    for _ in range(4):
        time.sleep(0.1)
        carries(sock, server, stream)
    assert not lab.client.expired()


def test_a_suspected_peer_that_is_silent_is_cut(lab: Pair, listener: socket.socket) -> None:
    lab.client.core.set_deadline("ping_suspect", 300_000)
    sock = lab.connect()
    server = lab.hand_server(listener)
    carries(sock, server, serve(server))
    peer = 1 + next(u.id for u in lab.client.upcalls if u.kind == _core.OUTBOUND)
    lab.client.core.suspect_peer(peer)
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    lab.client.wait_ended(1)
    assert lab.client.reasons() == ["keepalive_timeout"]
    assert lab.client.expired() == {"ping_suspect": 1}


def forever(receive: Callable[[], object]) -> None:
    """Receive until that raises what the test expects."""
    while receive():
        pass
