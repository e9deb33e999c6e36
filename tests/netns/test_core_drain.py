"""A core hands over to another that has the same listening sockets: nothing is lost on the way."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import threading
from collections.abc import Iterator
from functools import partial

import pytest

from support.corelab import POD, PORT, SERVER_V4, Judged, Pair, outbound_rule, pair
from support.hbone import Client, Gone, Kind, StreamReset
from support.netns import DEADLINE, wait_until
from ztunnel import _core, tls

pytestmark = pytest.mark.netns

FIRST_GOAWAY = 2**31 - 1
"""RFC 9113, 6.8: nothing is refused yet, but nothing new should come."""

HANDOVERS = 20


@contextlib.contextmanager
def succeeded(judged: Judged) -> Iterator[Judged]:
    made = judged.successor()
    try:
        yield made
    finally:
        made.stop()


def drained(judged: Judged) -> None:
    wait_until(judged.core.drained, "nothing is left")
    stats = judged.core.stats()
    assert (stats.connections, stats.tls_connections) == (0, 0)


def whole(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(65536), b""))


def streaming(lab: Pair, listener: socket.socket) -> tuple[Client, int, socket.socket]:
    """Return a client by hand, a stream of it that stands, and its application's socket."""
    client = lab.hand_client()
    stream = client.connect(f"{SERVER_V4}:{PORT}")
    assert client.status(stream) == 200
    return client, stream, lab.accept(listener)[0]


def goaway(client: Client) -> int:
    """Read up to the next GOAWAY, and return its last stream."""
    seen = len(client.goaways)
    while len(client.goaways) == seen:
        with contextlib.suppress(Gone):
            client.step()
    return client.goaways[-1]


def to_the_end(client: Client) -> None:
    """Read until the connection has ended in good order."""
    said = ""
    while said != "close_notify":
        try:
            client.step()
        except Gone as error:
            said = str(error)
            assert said.startswith(("GOAWAY", "close_notify"))


def test_draining_is_only_for_a_core_that_runs() -> None:
    core = _core.Core(1, tls.function_table(_core.FUNCTIONS))
    assert not core.drained()
    with pytest.raises(OSError, match="Invalid"):
        core.drain()


def test_an_idle_core_is_drained_at_once() -> None:
    with pair() as lab:
        assert not lab.client.core.drained()
        lab.client.core.drain()
        lab.client.core.drain()
        drained(lab.client)


def test_goaway_comes_twice_and_streams_live_on() -> None:
    with pair() as lab:
        listener = lab.listen()
        client, first, app = streaming(lab, listener)

        lab.server.core.drain()
        assert goaway(client) == FIRST_GOAWAY
        # Who has not heard of it yet is served.
        second = client.connect(f"{SERVER_V4}:{PORT}")
        assert goaway(client) >= first
        for stream, served in ((first, app), (second, lab.accept(listener)[0])):
            if stream == second:
                assert client.status(second) == 200
            client.send(stream, b"ping", end=True)
            assert whole(served) == b"ping"
            served.sendall(b"pong")
            served.close()
            assert client.receive(stream, 4) == b"pong"
        # No stream is left, and so it ends.
        to_the_end(client)
        client.close()
        drained(lab.server)


def test_a_connection_counts_for_its_pod_until_its_socket_is_closed() -> None:
    with pair() as lab:
        client = lab.hand_client()
        lab.server.core.drain()
        to_the_end(client)
        wait_until(lambda: lab.server.core.stats().tls_connections == 0, "only its socket is left")
        assert lab.server.core.read_pod(POD).descriptors == 1
        client.close()
        drained(lab.server)
        assert lab.server.core.read_pod(POD).descriptors == 0


def test_a_stream_behind_the_last_goaway_is_not_begun() -> None:
    with pair() as lab:
        listener = lab.listen()
        client, first, app = streaming(lab, listener)
        lab.server.core.drain()
        assert goaway(client) == FIRST_GOAWAY
        assert goaway(client) == first
        client.connect(f"{SERVER_V4}:{PORT}")
        client.send(first, b"ping")
        assert app.recv(4) == b"ping"
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
        client.close()


def test_a_peer_that_answers_no_ping_is_parted_with_all_the_same() -> None:
    with pair() as lab:
        lab.server.core.set_deadline("ping_interval", 300_000)
        lab.listen()
        client = lab.hand_client()
        stream = client.connect(f"{SERVER_V4}:{PORT}")
        assert client.status(stream) == 200
        lab.server.core.drain()
        # Frames are read by hand: step() would answer the PING.
        last: list[int] = []
        while len(last) < 2:
            frame = client.frame_in()
            if frame.kind == Kind.GOAWAY:
                last.append(int.from_bytes(frame.payload[:4]))
        assert last == [FIRST_GOAWAY, stream]
        client.close()


def test_a_client_takes_new_streams_to_the_successor() -> None:
    with pair() as lab:
        listener = lab.listen()
        old = lab.connect()
        served, _ = lab.accept(listener)
        old.sendall(b"ping")
        assert served.recv(4) == b"ping"
        with succeeded(lab.server) as successor:
            lab.server.core.drain()

            def moved() -> bool:
                """New streams go elsewhere: soon, for the GOAWAY is on its way."""
                before = successor.core.stats().connections
                new = lab.connect()
                app, _ = lab.accept(listener)
                new.sendall(b"new")
                assert app.recv(3) == b"new"
                return successor.core.stats().connections > before

            wait_until(moved, "a stream on the successor")
            assert lab.server.core.stats().connections >= 1
            served.sendall(b"pong")
            assert old.recv(4) == b"pong"
            old.close()
            served.close()
            wait_until(lambda: not lab.client.core.drained(), "the client does not drain")


def test_what_was_accepted_and_not_judged_is_judged_and_served() -> None:
    held: list[_core.Upcall] = []
    may_answer = threading.Event()

    def slow(judged: Judged, upcall: _core.Upcall) -> None:
        if upcall.kind == _core.OUTBOUND and not may_answer.is_set():
            held.append(upcall)
        else:
            outbound_rule(judged, upcall)

    with pair(outbound=slow) as lab:
        listener = lab.listen()
        sock = lab.connect()
        sock.sendall(b"ping")
        wait_until(lambda: bool(held), "it is asked about")
        lab.client.core.drain()
        wait_until(lambda: not lab.client.core.drained(), "it is kept")
        may_answer.set()
        outbound_rule(lab.client, held[0])
        app, _ = lab.accept(listener)
        assert app.recv(4) == b"ping"
        app.sendall(b"pong")
        app.close()
        assert whole(sock) == b"pong"
        sock.close()
        drained(lab.client)


def test_the_deadline_cuts_and_counts() -> None:
    with pair() as lab:
        listener = lab.listen()
        socks = []
        for _ in range(3):
            sock = lab.connect()
            socks.append(sock)
            app, _ = lab.accept(listener)
            sock.sendall(b"ping")
            assert app.recv(4) == b"ping"
        lab.client.core.set_deadline("drain", 300_000)
        lab.client.core.drain()
        for sock in socks:
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
        drained(lab.client)
        lab.client.wait_ended(3)
        assert lab.client.reasons() == ["drain_timeout"] * 3
        assert lab.client.expired() == {"drain": 3}


def test_a_reader_who_is_slow_gets_the_last_byte() -> None:
    """The connection that is left ends behind the data, not instead of it."""
    size = 8 * 1024 * 1024
    blob = os.urandom(size)
    with pair() as lab:
        listener = lab.listen()
        down, up = lab.connect(), lab.connect()
        first, second = (lab.accept(listener)[0] for _ in range(2))
        names = {}
        for sock, name in ((down, b"d"), (up, b"u")):
            sock.sendall(name)
        for app in (first, second):
            names[app.recv(1)] = app

        def send(sock: socket.socket) -> None:
            sock.sendall(blob)
            sock.shutdown(socket.SHUT_WR)

        # As far as the buffers go, for nobody reads.
        writers = [threading.Thread(target=send, args=(each,)) for each in (names[b"d"], up)]
        for writer in writers:
            writer.start()
        down.shutdown(socket.SHUT_WR)
        names[b"u"].shutdown(socket.SHUT_WR)
        lab.server.core.drain()
        lab.client.core.drain()
        for sock in (down, names[b"u"]):
            digest = hashlib.sha256(whole(sock)).digest()
            assert digest == hashlib.sha256(blob).digest()
        for writer in writers:
            writer.join(DEADLINE)
        down.close()
        up.close()
        drained(lab.client)
        drained(lab.server)
        lab.client.wait_ended(2)
        lab.server.wait_ended(2)
        assert set(lab.client.reasons() + lab.server.reasons()) == {"closed"}


def test_twenty_handovers_lose_nobody_who_connects() -> None:
    """Outbound and HBONE listeners change hands while connections keep coming."""
    stop = threading.Event()
    wrong: list[str] = []
    count = [0, 0]

    def serve(listener: socket.socket) -> None:
        # The listener outlives the test's callers: closed, it ends this.
        with contextlib.suppress(OSError):
            while True:
                app, _ = listener.accept()
                app.settimeout(DEADLINE)
                threading.Thread(target=answer, args=(app,), daemon=True).start()

    def answer(app: socket.socket) -> None:
        with app:
            app.sendall(whole(app)[::-1])

    def call(lab: Pair, number: int) -> None:
        while not stop.is_set():
            said = os.urandom(64)
            try:
                sock = lab.connect()
                with sock:
                    sock.settimeout(DEADLINE)
                    sock.sendall(said)
                    sock.shutdown(socket.SHUT_WR)
                    heard = whole(sock)
                if heard != said[::-1]:
                    wrong.append(f"{len(heard)} bytes of {len(said)}")
            except OSError as error:
                wrong.append(repr(error))
            count[number] += 1

    def went_on(seen: int) -> bool:
        return sum(count) > seen + 4 or bool(wrong)

    with pair() as lab, contextlib.ExitStack() as cores:
        listener = lab.listen(backlog=1024)
        listener.settimeout(None)
        server = threading.Thread(target=serve, args=(listener,))
        threads = [threading.Thread(target=call, args=(lab, each)) for each in range(2)]
        for thread in (server, *threads):
            thread.start()
        try:
            serving = [lab.client, lab.server]
            for turn in range(HANDOVERS):
                seen = sum(count)
                old = serving[turn % 2]
                serving[turn % 2] = cores.enter_context(succeeded(old))
                old.core.drain()
                wait_until(partial(went_on, seen), "calls go on")
        finally:
            stop.set()
            for thread in threads:
                thread.join(2 * DEADLINE)
            listener.shutdown(socket.SHUT_RDWR)
            server.join(DEADLINE)
        assert not wrong


def test_a_pod_that_goes_while_it_is_drained_takes_all_with_it() -> None:
    with pair() as lab:
        listener = lab.listen()
        client = lab.hand_client()
        stream = client.connect(f"{SERVER_V4}:{PORT}")
        assert client.status(stream) == 200
        lab.accept(listener)
        lab.server.core.drain()
        lab.server.core.remove_pod(lab.server.pod[0])
        with pytest.raises((Gone, StreamReset)):
            client.receive(stream, 1)
        client.close()
        drained(lab.server)
