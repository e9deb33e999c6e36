"""A hostile peer on an HBONE connection, and what must be true of everybody else meanwhile.

Owns the two places of an attacker: a client of our server (`twin` calls `far`) and a server that
our client dials (`client` calls `twin`). Promises that an attack ends in bounded time, that what
the other side says is taken in while the attack goes on (so that no unread answer is what bounds
it), and that a connection of the same pod to somebody else carries bytes before and after.
"""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Iterator, Sequence
from typing import Final

from support.e2e import HBONE_PORT, Line, Mesh, authority
from support.hbone import Client, Gone, Server
from support.netns import DEADLINE, wait_until

__all__ = ["PLACES", "Attack", "attack", "broken", "dialled", "say"]

PLACES: Final = ("downstream", "upstream")
"""Where the attacker stands, seen from our tunnel: its client, or the server that it dials."""


TOGETHER: Final = 2000
"""Frames sent before the answers are read."""


class Attack:
    """One HBONE connection between the attacker and our tunnel, with one stream open on it."""

    def __init__(self, mesh: Mesh, side: Client | Server, stream: int, pod: str, to: str) -> None:
        self.mesh, self.side, self.stream = mesh, side, stream
        self.pod = pod
        """Whose tunnel is attacked."""
        self.to = to
        """What a CONNECT may ask for."""
        self._known = len(broken(mesh, pod))
        self._counted = self._counter()

    def _counter(self) -> dict[str, float]:
        name = "ztunnel_tls_handshake_failures_total"
        reasons = ("h2_limit", "h2_protocol", "tls_failed", "tls_alert", "keepalive_timeout")
        return {each: self.mesh.count(self.pod, name, reason=each) for each in reasons}

    def refused(self, *reasons: str, word: str = "") -> Line:
        """Assert that the end was logged once, for one of `reasons`, and counted by it."""
        lines = wait_until(lambda: broken(self.mesh, self.pod, self._known), "the end is logged")
        assert len(lines) == 1, lines
        (line,) = lines
        assert line["reason"] in reasons, (line["reason"], line["error"])
        assert word in line["error"], (line["reason"], line["error"])
        before = self._counted[line["reason"]]
        name = "ztunnel_tls_handshake_failures_total"
        self.mesh.counted(self.pod, name, before + 1, reason=line["reason"])
        return line


def broken(mesh: Mesh, pod: str, known: int = 0) -> list[Line]:
    """Return what has been said of the pod's HBONE connections that failed, after the `known`.

    Of this pod's only: what was left out of a storm on another one is said seconds later.
    """
    words = ("HBONE connection broken", "handshake failed")
    own = {"inbound": "dst.workload", "outbound": "src.workload"}
    return [
        line
        for line in mesh.lines(pod, "")
        if line["message"] in words and line.get(own[line["direction"]]) == pod
    ][known:]


def say(side: Client | Server, frames: Sequence[bytes]) -> str:
    """Say all this, and return how the other side ended the connection. Raises TimeoutError.

    What `step` answers goes between frames.
    """
    try:
        for at in range(0, len(frames), TOGETHER):
            side.tls.send(b"".join(frames[at : at + TOGETHER]))
            while side.has_come():
                side.step()
        while side.has_come(DEADLINE):
            side.step()
    except Gone as gone:
        return str(gone)
    raise TimeoutError(f"{len(frames)} frames of abuse, and the connection lives")


def dialled(mesh: Mesh, listener: socket.socket) -> socket.socket:
    """Return the connection for which our client has dialled the listener.

    After a dial that failed the next one waits a while, and callers meanwhile are sent away.
    """

    def called() -> socket.socket | None:
        try:
            sock = mesh.connect("client", mesh.address("twin"), 8080)
        except ConnectionResetError:
            return None
        return sock if select.select([listener], [], [], 0.2)[0] else None

    sock = wait_until(called, "our client dials")
    assert sock is not None
    return sock


@contextlib.contextmanager
def attack(mesh: Mesh, place: str, *, answer: bool = True) -> Iterator[Attack]:
    """Give an attacker its connection; assert at the end that nobody else was touched.

    Without `answer` an attacker upstream has not answered the CONNECT of its stream.
    """
    bystander, app, _ = mesh.call("client", "far")
    mesh.carries(bystander, app)
    if place == "downstream":
        listener = mesh.listen("far")
        to = authority(mesh.address("far"), listener.getsockname()[1])
        client = mesh.hbone("twin", "far")
        stream = client.connect(to)
        assert client.status(stream) == 200
        mesh.accept(listener)
        yield Attack(mesh, client, stream, "far", to)
        client.close()
    else:
        listener = mesh.listen("twin", HBONE_PORT)
        sock = dialled(mesh, listener)
        server = mesh.hbone_server(listener)
        stream, fields = server.request()
        if answer:
            server.answer(stream, 200)
            sock.sendall(b"x")
            assert server.receive(stream, 1) == b"x"
        yield Attack(mesh, server, stream, "client", fields[":authority"])
        server.close()
    mesh.carries(bystander, app)
    again, app, _ = mesh.call("client", "far")
    mesh.carries(again, app)
