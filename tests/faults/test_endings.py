"""How a connection ends: {FIN, RST, error} by {client, server} {before, during, after} its data.

Each over every way through the tunnel. What must come of it:

    FIN    The other application gets every byte and then the end, may still answer, and its answer
           and its end arrive, too. Every line says `closed`, with exactly the bytes of both.
    RST    The application closes with SO_LINGER 0. The other gets a part of what was sent (all of
           it after data) and then a reset, never a clean end. The tunnel at that side says who
           reset it, the other one `peer_reset`.
    error  The tunnel's own socket towards that application fails by itself, as it does when a
           peer is gone for good or a route is lost: here it is destroyed (SOCK_DESTROY), which
           leaves ECONNABORTED behind. Both applications get a reset; the tunnel says which side
           was lost.

    before Nobody has said anything.
    during Both have said more than all the buffers between them hold; nobody has read yet.
    after  Both have said something, and both have read all of it.

Two more ways to end are no choice of an application: it is killed or closes while it has not read
everything, which its kernel tells as a reset; and nothing listens, which is a reset at once.

TCP urgent data has no place in HTTP/2 and none in a relay (RFC 6093 advises against it): the urgent
byte is dropped, as by any reader that has not asked for it, and everything else is carried.

Nothing may be left of any of them: neither sockets, nor streams, nor bytes held, nor a connection
that was opened and never closed in the metrics.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, NamedTuple

import pytest

from nodeagent.lab import Lab
from support.e2e import Mesh, read_all, reset, running, spec, watched
from support.netns import wait_until

BULK: Final = 64 << 20
"""Bytes of each side `during` data: more than sockets (tcp_rmem, tcp_wmem), pipes and windows."""


class Way(NamedTuple):
    """From one pod to another: whose tunnels carry it, and what their lines are."""

    client: str
    server: str
    near: str
    """In whose namespace the tunnel has its socket towards the client."""
    far: str
    """The same towards the server."""
    lines: dict[str, str]
    """Direction of each line, and the pod on whose node it stands: client's tunnel first."""
    joined: bool = True
    """One relay joins both applications, and so every line says who has ended it."""


WAYS: Final = {
    "hbone": Way(
        "client", "far", "client", "far", {"outbound": "client", "inbound": "far"}, joined=False
    ),
    "plaintext": Way("outsider", "far", "far", "far", {"inbound": "far"}),
    "passthrough": Way("client", "outsider", "client", "client", {"outbound": "client"}),
    "same_node": Way(
        "client", "near", "client", "near", {"outbound": "client", "inbound": "near"}, joined=False
    ),
    "direct": Way("client", "near", "client", "near", {"outbound": "client", "inbound": "near"}),
}
REASONS: Final = {
    ("FIN", "client"): "closed",
    ("FIN", "server"): "closed",
    ("RST", "client"): "client_reset",
    ("RST", "server"): "server_reset",
    ("error", "client"): "client_lost",
    ("error", "server"): "server_lost",
}


@pytest.fixture(scope="module")
def direct_lab() -> Iterator[Lab]:
    """The same mesh, but for pods of one node."""
    with running(spec(apps=False, settings={"same_node": "direct"})) as made:
        yield made


@pytest.fixture
def mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    parameters = getattr(request.node, "callspec", None)
    direct = parameters is not None and parameters.params.get("way") == "direct"
    lab: Lab = request.getfixturevalue("direct_lab" if direct else "lab")
    with watched(lab, request) as made:
        yield made


class Call:
    """One connection, and what was there before it."""

    def __init__(self, mesh: Mesh, way: Way) -> None:
        self.mesh, self.way = mesh, way
        self._before = self._left()
        opened = {direction: self._opened(direction) for direction in way.lines}
        self.client, self.server, self.port = mesh.call(way.client, way.server)
        self._client_port = self.client.getsockname()[1]
        self._server_port = self.server.getpeername()[1]
        # An application may end before its tunnel knows that it has accepted: that is a refusal.
        for direction, before in opened.items():
            wait_until(partial(self._has_opened, direction, before), f"{direction} is open")

    def _left(self) -> dict[str, float]:
        names = ("ztunnel_connections", "ztunnel_held_bytes")
        return {f"{pod} {name}": self.mesh.count(pod, name) for name in names for pod in self._pods}

    @property
    def _pods(self) -> set[str]:
        return set(self.way.lines.values())

    def _opened(self, direction: str, what: str = "opened") -> float:
        reporter = "source" if direction == "outbound" else "destination"
        name = f"istio_tcp_connections_{what}_total"
        return self.mesh.count(self.way.lines[direction], name, reporter=reporter)

    def _has_opened(self, direction: str, before: float) -> bool:
        return self._opened(direction) > before

    def destroy(self, side: str) -> None:
        """Let the tunnel's socket towards the application of this side fail."""
        pod = self.way.near if side == "client" else self.way.far
        own, other = (
            (self.port, self._client_port) if side == "client" else (self._server_port, self.port)
        )
        which = ["sport", "=", f":{own}", "and", "dport", "=", f":{other}"]
        done = self.mesh.lab.run(self.mesh.uid(pod), ["ss", "-KHtn", *which])
        assert len(done.stdout.splitlines()) == 1, done

    def _sockets(self) -> str:
        """The connection's sockets in both pods, but those that are only remembered."""
        which = ["state", "connected", "exclude", "time-wait"]
        ports = f"( sport = :{self.port} or dport = :{self.port} )"
        return "".join(
            self.mesh.lab.run(self.mesh.uid(pod), ["ss", "-tnH", *which, ports]).stdout
            for pod in {self.way.client, self.way.server}
        )

    def ended(self, how: str, side: str, sent: int, received: int | None) -> None:
        """Assert what log and metrics say, and that nothing is left.

        `sent` and `received` are what the client has; None: a part that nobody knows.
        """
        for direction, pod in self.way.lines.items():
            line = self.mesh.line(pod, direction, self.port)
            here = self.way.joined or (direction == "outbound") == (side == "client")
            expected = REASONS[how, side] if here or how == "FIN" else "peer_reset"
            assert line["reason"] == expected, line
            if received is not None:
                # As this end of the connection has seen it: the client's bytes are received.
                assert (line["bytes_recv"], line["bytes_sent"]) == (sent, received), line
            assert self._opened(direction) == self._opened(direction, "closed")
        wait_until(lambda: self._left() == self._before, f"nothing is left of {self._before}")
        self.client.close()
        self.server.close()
        wait_until(lambda: not self._sockets(), "no socket is left")


def send_all(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def fill(sock: socket.socket, data: bytes) -> int:
    """Send until nothing more is taken for a while; how much it was."""
    sock.settimeout(0.2)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < len(data):
            sent += sock.send(data[sent : sent + (1 << 20)])
    sock.settimeout(15)
    return sent


def read_to_reset(sock: socket.socket) -> bytes:
    """Return what comes before a reset; a clean end is a failure."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(1 << 20):
            found += data
        raise AssertionError(f"a clean end after {len(found)} bytes")
    return found


def pattern(seed: int, size: int) -> bytes:
    """Bytes in which every place looks different from its neighbourhood."""
    block = bytes((seed + at * at * 7 + at // 251) % 256 for at in range(65521))
    return (block * (size // len(block) + 1))[:size]


CLIENTS_BULK, SERVERS_BULK = pattern(1, BULK), pattern(2, BULK)


@pytest.mark.parametrize("side", ["client", "server"])
@pytest.mark.parametrize("when", ["before", "during", "after"])
@pytest.mark.parametrize("way", WAYS)
def test_fin(mesh: Mesh, way: str, when: str, side: str) -> None:
    call = Call(mesh, WAYS[way])
    ends, other = (call.client, call.server) if side == "client" else (call.server, call.client)
    said = {"before": b"", "during": CLIENTS_BULK, "after": b"last words"}[when]
    answer = {"before": b"", "during": SERVERS_BULK, "after": b"last answer"}[when]
    if when == "after":
        mesh.carries(call.client, call.server)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(send_all, ends, said)
        # Its answer is on the way before it has read a byte.
        second = pool.submit(other.sendall, answer)
        reading = pool.submit(read_all, ends)
        assert read_all(other) == said
        second.result()
        # The end has come, and the other direction lives.
        other.sendall(b"!")
        other.shutdown(socket.SHUT_WR)
        first.result()
        assert reading.result() == answer + b"!"
    talk = 4 if when == "after" else 0
    counts = (len(said) + talk, len(answer) + 1 + talk)
    call.ended("FIN", side, *(counts if side == "client" else counts[::-1]))


@pytest.mark.parametrize("side", ["client", "server"])
@pytest.mark.parametrize("when", ["before", "during", "after"])
@pytest.mark.parametrize("how", ["RST", "error"])
@pytest.mark.parametrize("way", WAYS)
def test_reset(mesh: Mesh, way: str, how: str, when: str, side: str) -> None:
    call = Call(mesh, WAYS[way])
    ends, other = (call.client, call.server) if side == "client" else (call.server, call.client)
    sent = b""
    if when == "during":
        sent = CLIENTS_BULK[: fill(ends, CLIENTS_BULK)]
        fill(other, SERVERS_BULK)
        assert len(sent) < BULK
    elif when == "after":
        mesh.carries(call.client, call.server)
    if how == "RST":
        reset(ends)
    else:
        call.destroy(side)
        read_to_reset(ends)
    found = read_to_reset(other)
    assert sent.startswith(found)
    exact = None if when == "during" else 4 * (when == "after")
    call.ended(how, side, exact or 0, exact)


@pytest.mark.parametrize("side", ["client", "server"])
@pytest.mark.parametrize("way", WAYS)
def test_an_end_with_unread_data_is_a_reset(mesh: Mesh, way: str, side: str) -> None:
    """What a killed process leaves to its kernel (RFC 1122, 4.2.2.13)."""
    call = Call(mesh, WAYS[way])
    ends, other = (call.client, call.server) if side == "client" else (call.server, call.client)
    other.sendall(b"unread")
    assert ends.recv(6, socket.MSG_PEEK | socket.MSG_WAITALL) == b"unread"
    ends.close()
    assert read_to_reset(other) == b""
    call.ended("RST", side, *((0, 6) if side == "client" else (6, 0)))


REFUSALS: Final = {
    "hbone": {"outbound": "unavailable_by_peer", "inbound": "connect_refused"},
    "plaintext": {"inbound": "connect_refused"},
    "passthrough": {"outbound": "connect_refused"},
    "same_node": {"outbound": "unavailable_by_peer", "inbound": "connect_refused"},
    "direct": {"outbound": "connect_refused", "inbound": "connect_refused"},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_refused_connection_is_a_reset(mesh: Mesh, way: str) -> None:
    listener = mesh.listen(WAYS[way].server)
    port = listener.getsockname()[1]
    listener.close()
    mesh.refuses(WAYS[way].client, mesh.address(WAYS[way].server), port, b"hello?")
    for direction, pod in WAYS[way].lines.items():
        line = mesh.line(pod, direction, port)
        assert line["reason"] == REFUSALS[way][direction]
        assert (line["bytes_recv"], line["bytes_sent"]) == (0, 0)


@pytest.mark.parametrize("side", ["client", "server"])
@pytest.mark.parametrize("last", [b"more", b""], ids=["in the middle", "at the end"])
@pytest.mark.parametrize("way", WAYS)
def test_the_urgent_byte_is_dropped_and_nothing_else(
    mesh: Mesh, way: str, last: bytes, side: str
) -> None:
    call = Call(mesh, WAYS[way])
    ends, other = (call.client, call.server) if side == "client" else (call.server, call.client)
    ends.sendall(b"some")
    ends.send(b"!", socket.MSG_OOB)
    ends.sendall(last)
    ends.shutdown(socket.SHUT_WR)
    assert read_all(other) == b"some" + last
    other.sendall(b"answer")
    other.close()
    assert read_all(ends) == b"answer"
    counts = (4 + len(last), 6)
    call.ended("FIN", side, *(counts if side == "client" else counts[::-1]))


@pytest.mark.parametrize("family", [4, 6], ids=["v4", "v6"])
def test_the_tunnel_learns_of_the_end_after_the_client_has_gone(mesh: Mesh, family: int) -> None:
    """The client's kernel answers for the closed socket: over lo, and so the tunnel hears it."""
    listener = mesh.listen("far")
    port = listener.getsockname()[1]

    def sockets(state: str, side: str) -> str:
        shown = mesh.run("client", "ss", "-taHn", "state", state, f"( {side} = :{port} )")
        return str(shown.stdout).strip()

    sock = mesh.connect("client", mesh.address("far", family), port)
    app, _ = mesh.accept(listener)
    mesh.carries(sock, app)
    sock.close()
    assert app.recv(1) == b""
    wait_until(lambda: sockets("fin-wait-2", "dport"), "the client's end is acknowledged")
    app.close()
    mesh.line("client", "outbound", port)
    wait_until(lambda: not sockets("last-ack", "sport"), "the tunnel's socket is closed")
