"""Garbage on 15001, 15006 and 15008: an answer in bounded time, a reason, a counter, no harm.

Peers that fall silent cost the handshake's deadline (10 s), so all of them wait in one test.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from functools import partial

import pytest
from OpenSSL import SSL

from nodeagent.lab import Lab
from support.e2e import Line, Mesh, authority, reset, running, spec, strict, watched
from support.hbone import PREFACE, Gone, Kind, Shown, Tls
from support.netns import wait_until

PLACES = [("outsider", "far"), ("twin", "far"), ("outsider", "near")]
BOUND = 15.0
"""Seconds within which every peer that falls silent is told; the tunnel's deadline is ten."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(spec(apps=False)) as made:
        yield made


@pytest.fixture
def mesh(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Mesh]:
    with watched(lab, request) as made:
        yield made


def client_hello(version: int = SSL.TLS1_3_VERSION) -> bytes:
    tls = SSL.Connection(Shown(leaf=None, version=version).context(), None)
    tls.set_connect_state()
    with pytest.raises(SSL.WantReadError):
        tls.do_handshake()
    return tls.bio_read(65536)


GARBAGE: dict[str, bytes] = {
    "random bytes": bytes(range(1, 251)) * 40,
    "zeros": bytes(16384),
    "HTTP/1.1": b"GET / HTTP/1.1\r\nHost: far\r\n\r\n",
    "HTTP/2 without TLS": PREFACE,
    "TLS 1.2": client_hello(SSL.TLS1_2_VERSION),
    "record too long": b"\x16\x03\x01\xff\xff" + bytes(65535),
    "SSL 2": b"\x80\x2e\x01\x00\x02" + bytes(60),
}

SILENT: dict[str, bytes] = {
    "nothing": b"",
    "one byte": b"\x16",
    "half a ClientHello": client_hello()[:100],
    "a ClientHello": client_hello(),
}


def failures(mesh: Mesh, pod: str, source: str) -> list[Line]:
    """Return the lines of failed handshakes from this address and port."""
    return [line for line in mesh.lines(pod, "inbound", src_addr=source) if "duration" in line]


def end_of(sock: socket.socket) -> bool:
    """Whether the other end has ended the connection, after an alert at most."""
    try:
        while data := sock.recv(4096):
            # A TLS alert or, to a good ClientHello, the server's half of a handshake.
            assert data[0] in range(20, 24) or len(data) > 100
    except ConnectionResetError:
        pass
    return True


@pytest.mark.parametrize("why", GARBAGE)
@pytest.mark.parametrize("client,server", PLACES)
def test_garbage_on_the_hbone_port_is_refused(
    mesh: Mesh, client: str, server: str, why: str
) -> None:
    bystander, app, _ = mesh.call("client", server)
    before = mesh.count(server, "ztunnel_tls_handshake_failures_total")
    sock = mesh.connect(client, mesh.address(server), 15008)
    source = authority(*sock.getsockname()[:2])
    # It may be refused before it has said everything.
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        sock.sendall(GARBAGE[why])
    assert end_of(sock)
    (line,) = wait_until(lambda: failures(mesh, server, source), "the refusal is logged")
    assert line["reason"] in {"tls_failed", "tls_truncated"}
    assert line["error"]
    mesh.counted(server, "ztunnel_tls_handshake_failures_total", before + 1)
    mesh.carries(bystander, app)


@pytest.mark.parametrize("how", ["FIN", "RST"])
def test_a_connection_and_its_end_on_the_hbone_port(mesh: Mesh, how: str) -> None:
    sock = mesh.connect("twin", mesh.address("far"), 15008)
    source = authority(*sock.getsockname()[:2])
    sock.sendall(client_hello()[:50])
    if how == "FIN":
        sock.shutdown(socket.SHUT_WR)
        assert end_of(sock)
    else:
        reset(sock)
    (line,) = wait_until(lambda: failures(mesh, "far", source), "the end is logged")
    assert line["reason"] in {"tls_truncated", "tls_failed", "client_reset", "peer_connection_lost"}


def test_silence_on_the_hbone_port_is_bounded(mesh: Mesh) -> None:
    bystander, app, _ = mesh.call("client", "far")
    waiting: list[tuple[str, socket.socket, str]] = []
    for client in ("outsider", "twin", "far"):
        for why, said in SILENT.items():
            sock = mesh.connect(client, mesh.address("far"), 15008)
            sock.sendall(said)
            waiting.append((why, sock, authority(*sock.getsockname()[:2])))
    mesh.carries(bystander, app)
    for why, sock, source in waiting:
        sock.settimeout(BOUND)
        assert end_of(sock)
        (line,) = wait_until(partial(failures, mesh, "far", source), "it is logged")
        assert line["reason"] == ("tls_timeout" if SILENT[why] else "first_byte_timeout")
    begun = sum(bool(SILENT[why]) for why, *_ in waiting)
    mesh.counted("far", "ztunnel_tls_handshake_failures_total", begun, reason="tls_timeout")
    mesh.carries(bystander, app)


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack("!I", len(payload))[1:] + struct.pack("!BBI", kind, flags, stream) + payload


BAD_HTTP2: dict[str, bytes] = {
    "HTTP/1.1 in TLS": b"CONNECT 10.244.2.2:80 HTTP/1.1\r\n\r\n",
    "random bytes": os.urandom(4096),
    "a frame too large": PREFACE + _frame(Kind.SETTINGS, 0, 0, b"") + b"\xff\xff\xff\0\0\0\0\0\1",
    "DATA of no stream": PREFACE + _frame(Kind.SETTINGS, 0, 0, b"") + _frame(0, 0, 0, b"x"),
    "a push": PREFACE + _frame(Kind.SETTINGS, 0, 0, b"") + _frame(5, 4, 1, b"\0\0\0\2\x82"),
    "a bad header block": PREFACE
    + _frame(Kind.SETTINGS, 0, 0, b"")
    + _frame(Kind.HEADERS, 4, 1, b"\xff\xff\xff\xff\xff\xff\xff"),
    "an even stream": PREFACE
    + _frame(Kind.SETTINGS, 0, 0, b"")
    + _frame(Kind.HEADERS, 4, 2, b"\x82"),
}


@pytest.mark.parametrize("why", BAD_HTTP2)
def test_bad_http2_ends_that_connection_only(mesh: Mesh, why: str) -> None:
    good = mesh.hbone("twin", "far")
    listener = mesh.listen("far")
    tls = Tls(mesh.connect("twin", mesh.address("far"), 15008), mesh.shown().context())
    tls.handshake()
    tls.send(BAD_HTTP2[why])
    with pytest.raises(Gone):  # noqa: PT012 - after whatever it says before
        while True:
            tls.receive()
    stream = good.connect(authority(mesh.address("far"), listener.getsockname()[1]))
    assert good.status(stream) == 200


# --- the plaintext ports --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said", [b"", *list(GARBAGE.values())[:3]], ids=["nothing", "random", "0", "HTTP"]
)
@pytest.mark.parametrize("port", [15001, 15006])
@pytest.mark.parametrize("client,server", [*PLACES, ("far", "far"), ("client", "client")])
def test_the_plaintext_ports_are_closed(
    mesh: Mesh, client: str, server: str, port: int, said: bytes
) -> None:
    bystander, app, _ = mesh.call("client", "far")
    known = len(mesh.lines(server, "", port))
    failed = mesh.count(server, "istio_tcp_connections_failed_total", response_flags="DENY")
    mesh.refuses(client, mesh.address(server), port, said)
    (line,) = wait_until(lambda: mesh.lines(server, "", port)[known:], "the refusal is logged")
    assert line["reason"] == "self_call"
    mesh.counted(server, "istio_tcp_connections_failed_total", failed + 1, response_flags="DENY")
    mesh.carries(bystander, app)


def test_a_flood_of_ends_disturbs_nobody(mesh: Mesh) -> None:
    """Connections that end at once, by FIN and RST, on every port and under STRICT."""
    mesh.policy("far", strict(), mode="STRICT")
    listener = mesh.listen("far")
    bystander, app, _ = mesh.call("client", "far", listener=listener)
    ports = (15001, 15006, 15008, listener.getsockname()[1])
    for number in range(200):
        sock = mesh.open("outsider")
        try:
            sock.connect((mesh.address("far"), ports[number % 4]))
        except ConnectionResetError:
            continue
        if number % 8 < 4:
            sock.close()
        else:
            reset(sock)
    mesh.carries(bystander, app)
    sock, app, _ = mesh.call("client", "far", listener=listener)
    mesh.carries(sock, app)

    def given_back() -> bool:
        return mesh.count("far", "ztunnel_connections") == 2

    wait_until(given_back, "only the two connections are left")
