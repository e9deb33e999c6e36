"""The C core on real sockets: bytes, ends and resets through a pair of tunnels."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
import struct
import threading
from pathlib import Path

import pytest

from support.corelab import CLIENT_V4, CLIENT_V6, PORT, SERVER_V4, SERVER_V6, Pair, pair
from support.e2e import reset
from support.netns import wait_until
from support.pump import exchange, turned
from ztunnel import _core

pytestmark = pytest.mark.netns

FAMILIES = pytest.mark.parametrize(
    "server, client", [(SERVER_V4, CLIENT_V4), (SERVER_V6, CLIENT_V6)], ids=["v4", "v6"]
)


@FAMILIES
def test_carries_both_ways_and_keeps_the_source_address(server: str, client: str) -> None:
    with pair() as lab:
        listener = lab.listen(server)
        sock = lab.connect(server)
        sock.sendall(b"ping")
        accepted, peer = lab.accept(listener)
        assert peer[0] == client
        assert accepted.recv(10) == b"ping"
        accepted.sendall(b"pong")
        assert sock.recv(10) == b"pong"
        accepted.close()
        assert sock.recv(10) == b""
        sock.close()
        assert [lab.client.wait_ended(1)[0].sent, lab.server.wait_ended(1)[0].received] == [4, 4]
        assert lab.client.reasons() == lab.server.reasons() == ["closed"]


def test_server_speaks_first() -> None:
    with pair() as lab:
        listener = lab.listen()
        sock = lab.connect()
        accepted, _ = lab.accept(listener)
        accepted.sendall(b"220 ready\r\n")
        assert sock.recv(100) == b"220 ready\r\n"


def test_half_close_carries_the_answer_after_the_question_has_ended() -> None:
    with pair() as lab:
        listener = lab.listen()
        sock = lab.connect()
        sock.sendall(b"question")
        sock.shutdown(socket.SHUT_WR)
        accepted, _ = lab.accept(listener)
        question = b"".join(iter(lambda: accepted.recv(100), b""))
        accepted.sendall(question[::-1])
        accepted.close()
        assert b"".join(iter(lambda: sock.recv(100), b"")) == b"noitseuq"
        lab.client.wait_ended(1)
        assert lab.client.reasons() == ["closed"]


@pytest.mark.parametrize("who", ["client", "server"])
def test_reset_arrives_as_a_reset(who: str) -> None:
    with pair() as lab:
        listener = lab.listen()
        sock = lab.connect()
        sock.sendall(b"x")
        accepted, _ = lab.accept(listener)
        assert accepted.recv(1) == b"x"
        near, far = (sock, accepted) if who == "client" else (accepted, sock)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        near.close()
        with pytest.raises(ConnectionResetError):
            far.recv(1)
        lab.client.wait_ended(1)
        lab.server.wait_ended(1)


def test_refused_application_is_a_reset_for_the_client() -> None:
    with pair() as lab:
        sock = lab.connect()
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
        lab.client.wait_ended(1)
        lab.server.wait_ended(1)
        assert lab.client.reasons() == ["unavailable_by_peer"]
        assert lab.server.reasons() == ["connect_refused"]


def test_a_gibibyte_both_ways_at_once_arrives_intact() -> None:
    with pair() as lab:
        listener = lab.listen()
        sock = lab.connect()
        app, _ = lab.accept(listener)
        for each in (sock, app):
            each.settimeout(120)
        block = os.urandom(1 << 20)
        exchange(sock, app, turned(block, 1024), turned(block[::-1], 1024))
        assert lab.client.wait_ended(1)[0].received == 1 << 30


def test_200_concurrent_streams() -> None:
    with pair() as lab:
        listener = lab.listen(backlog=512)
        stop = threading.Event()

        def echo() -> None:
            poll = select.poll()
            poll.register(listener, select.POLLIN)
            socks: dict[int, socket.socket] = {}
            while not stop.is_set():
                for fd, _ in poll.poll(100):
                    if fd == listener.fileno():
                        accepted, _ = lab.accept(listener)
                        socks[accepted.fileno()] = accepted
                        poll.register(accepted, select.POLLIN)
                    elif data := socks[fd].recv(65536):
                        socks[fd].sendall(data)
                    else:
                        poll.unregister(fd)
                        socks.pop(fd).close()

        thread = threading.Thread(target=echo)
        thread.start()
        try:
            socks = [lab.connect() for _ in range(200)]
            for round_ in range(5):
                for index, sock in enumerate(socks):
                    sock.sendall(b"%d-%d" % (index, round_))
                for index, sock in enumerate(socks):
                    assert sock.recv(100) == b"%d-%d" % (index, round_)
            for sock in socks:
                sock.close()
            assert len(lab.client.wait_ended(200)) == 200
            assert set(lab.client.reasons()) == {"closed"}
        finally:
            stop.set()
            thread.join()


def test_a_stalled_stream_does_not_stall_its_neighbour() -> None:
    with pair(workers=1) as lab:
        listener = lab.listen()
        stalled = lab.connect()
        accepted, _ = lab.accept(listener)
        stalled.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                stalled.send(b"x" * 65536)
        busy = lab.connect()
        other, _ = lab.accept(listener)
        for _ in range(100):
            busy.sendall(b"ping")
            assert other.recv(100) == b"ping"
        del accepted


def test_a_hit_asks_nobody() -> None:
    with pair(workers=1) as lab:
        listener = lab.listen()
        for _ in range(20):
            sock = lab.connect()
            accepted, _ = lab.accept(listener)
            sock.close()
            accepted.close()
        lab.client.wait_ended(20)
        kinds = [upcall.kind for upcall in lab.client.upcalls]
        assert sorted(kinds) == [_core.OUTBOUND, _core.SERVER_CERTIFICATE]


def test_killing_a_decision_cuts_what_it_let_in_and_nothing_else() -> None:
    with pair() as lab:
        listener = lab.listen()
        sock = lab.connect()
        sock.sendall(b"x")
        accepted, _ = lab.accept(listener)
        assert accepted.recv(1) == b"x"
        inbound = [u for u in lab.server.upcalls if u.kind == _core.INBOUND_HBONE]
        lab.server.core.kill_decision(1 + inbound[0].id, _core.REASONS.index("policy_changed"))
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
        lab.server.wait_ended(1)
        assert lab.server.reasons() == ["policy_changed"]


def test_everything_is_given_back_at_the_end() -> None:
    def numbers(lab: Pair) -> tuple[int, int]:
        return lab.client.core.stats().connections, lab.server.core.stats().connections

    with pair() as lab:
        listener = lab.listen()
        socks = [lab.connect() for _ in range(20)]
        for sock in socks:
            sock.sendall(b"x")
        accepted = [lab.accept(listener)[0] for _ in socks]
        assert [each.recv(1) for each in accepted] == [b"x"] * 20
        assert numbers(lab) == (20, 20)
        for each in [*socks, *accepted]:
            each.close()
        lab.client.wait_ended(20)
        lab.server.wait_ended(20)
        assert numbers(lab) == (0, 0)
        counters = lab.client.core.read_series(1)
        assert (counters.opened, counters.closed, counters.received) == (20, 20, 20)


def test_a_released_decision_can_still_be_cut_and_is_reported_when_it_has_gone() -> None:
    with pair() as lab:
        listener = lab.listen()
        sock = lab.connect()
        sock.sendall(b"x")
        accepted, _ = lab.accept(listener)
        assert accepted.recv(1) == b"x"
        number = 1 + next(u.id for u in lab.server.upcalls if u.kind == _core.INBOUND_HBONE)
        core = lab.server.core
        core.release_decision(number)
        core.advance_epoch()
        with pytest.raises(KeyError):
            core.release_decision(number)
        core.kill_decision(number, _core.REASONS.index("policy_changed"))
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
        wait_until(lambda: number in lab.server.freed, "the decision's end")
        core.kill_decision(number, _core.REASONS.index("policy_changed"))


def test_without_descriptors_callers_are_sent_away_and_later_ones_are_served() -> None:
    with pair(workers=1) as lab:
        listener = lab.listen()
        first = lab.connect()
        first.sendall(b"x")
        accepted, _ = lab.accept(listener)
        assert accepted.recv(1) == b"x"
        refused = lab.left.make_socket()
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        highest = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
        fillers: list[int] = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, before[1]))
        try:
            with contextlib.suppress(OSError):
                while True:
                    fillers.append(os.dup(0))
            with pytest.raises(ConnectionResetError):  # noqa: PT012 - connect may see it already
                refused.connect((SERVER_V4, PORT))
                refused.recv(1)
        finally:
            for filler in fillers:
                os.close(filler)
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        lab.client.wait_ended(1)
        assert lab.client.reasons() == ["no_descriptors"]
        first.sendall(b"y")
        assert accepted.recv(1) == b"y"
        served = lab.connect()
        served.sendall(b"z")
        assert lab.accept(listener)[0].recv(1) == b"z"


def test_both_directions_full_at_once_move_again_when_read() -> None:
    with pair(workers=1) as lab:
        listener = lab.listen()
        left = lab.connect()
        right, _ = lab.accept(listener)
        ends = {left: 0, right: 0}
        block = b"x" * (1 << 20)
        for sock in ends:
            sock.setblocking(False)
        while select.select([], list(ends), [], 0.5)[1]:
            for sock in ends:
                with contextlib.suppress(BlockingIOError):
                    ends[sock] += sock.send(block)
        for sock, other in ((left, right), (right, left)):
            sock.setblocking(True)
            while ends[other]:
                ends[other] -= len(sock.recv(1 << 20))


def test_a_child_that_still_holds_closed_descriptors_is_not_heard_of() -> None:
    """Between fork(2) and exec(2) a successor has copies of all, which epoll goes on to watch."""
    with pair() as lab:
        listener = lab.listen()
        sock = lab.connect()
        app, _ = lab.accept(listener)
        sock.sendall(b"ask")
        assert app.recv(3) == b"ask"
        held, release = os.pipe()
        child = os.fork()
        if not child:
            # It keeps what is the tunnels' alone.
            for descriptor in (sock.fileno(), app.fileno(), release):
                os.close(descriptor)
            os.read(held, 1)
            os._exit(0)
        try:
            sock.shutdown(socket.SHUT_WR)
            assert app.recv(1) == b""
            app.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b""
            lab.client.wait_ended(1)
            lab.server.wait_ended(1)
            # What the tunnels have closed and freed hears of this, through the child's copies.
            reset(sock)
            reset(app)
            for _ in range(20):
                with lab.connect() as again:
                    other, _ = lab.accept(listener)
                    again.sendall(b"x")
                    assert other.recv(1) == b"x"
                    other.close()
        finally:
            os.close(release)
            os.close(held)
            os.waitpid(child, 0)
