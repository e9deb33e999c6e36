"""Attacks on port 15008 by whoever can reach it: sessions, replays, floods and names in logs."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Final

import pytest
from cryptography.hazmat.bindings._rust import _openssl

from nodeagent.lab import Lab
from support.certificates import workload
from support.e2e import HBONE_PORT, Line, Mesh, authority, running, spec, spiffe
from support.hbone import Client, Gone, Shown, Tls
from support.netns import wait_until
from support.records import Secrets

MOST_POST_HANDSHAKE: Final = 1000
"""ZT_MAX_POST_HANDSHAKE."""
FLOOD: Final = 20 * MOST_POST_HANDSHAKE


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(spec(apps=False)) as made:
        yield made


@pytest.fixture
def mesh(lab: Lab) -> Iterator[Mesh]:
    with Mesh(lab) as made:
        yield made


def failures(mesh: Mesh, known: int = 0) -> list[Line]:
    found = [line for line in mesh.lines("far", "") if line["message"] == "handshake failed"]
    return found[known:]


def refused(mesh: Mesh, known: int) -> Line:
    """Return the one handshake failure after the first `known`."""
    (line,) = wait_until(lambda: failures(mesh, known), "the refusal is logged")
    return line


def nobody_came(listener: socket.socket) -> bool:
    listener.setblocking(False)
    try:
        listener.accept()[0].close()
    except BlockingIOError:
        return True
    return False


def serves(mesh: Mesh) -> None:
    """Assert that a correct peer is served."""
    listener = mesh.listen("far")
    client = mesh.hbone("twin", "far")
    stream = client.connect(authority(mesh.address("far"), listener.getsockname()[1]))
    assert client.status(stream) == 200


# --- sessions -------------------------------------------------------------------------------------


def test_a_ticket_does_not_stand_for_a_certificate(mesh: Mesh) -> None:
    """Offered by a client whose certificate has expired since; and no early data with it."""
    lib = _openssl.lib
    context = mesh.shown().context()

    def begin() -> Tls:
        return Tls(mesh.connect("twin", mesh.address("far"), HBONE_PORT), context)

    good = begin()
    good.handshake()
    # The tickets come before the first frame.
    good.receive()
    session = good._tls.get_session()
    assert session is not None
    assert lib.SSL_SESSION_get_max_early_data(session._session) == 0

    again = begin()
    again._tls.set_session(session)
    again.handshake()
    assert not lib.SSL_session_reused(again._tls._ssl)
    again.receive()

    now = time.time()
    expired = mesh.shown(not_before=now - 7200, not_after=now - 60).leaf
    assert expired is not None
    known = len(failures(mesh))
    late = begin()
    late._tls.use_certificate(expired.certificate)
    late._tls.use_privatekey(expired.key)
    late._tls.set_session(session)
    with pytest.raises(Gone):  # noqa: PT012 - TLS 1.3 tells a client late
        late.handshake()
        late.receive()
    assert refused(mesh, known)["reason"] == "certificate_expired"


class _Recorder:
    """A socket that keeps what is sent through it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.sent = b""

    def sendall(self, data: bytes) -> None:
        self.sent += data
        self._sock.sendall(data)

    def recv(self, size: int) -> bytes:
        return self._sock.recv(size)


def test_a_recorded_conversation_cannot_be_replayed(mesh: Mesh) -> None:
    listener = mesh.listen("far")
    recorder = _Recorder(mesh.connect("twin", mesh.address("far"), HBONE_PORT))
    client = Client(recorder, mesh.shown().context())  # type: ignore[arg-type]  # all of a socket that it uses
    stream = client.connect(authority(mesh.address("far"), listener.getsockname()[1]))
    assert client.status(stream) == 200
    mesh.accept(listener)

    before = mesh.count("far", "ztunnel_tls_handshake_failures_total")
    known = len(failures(mesh))
    replays = 20
    for _ in range(replays):
        sock = mesh.connect("twin", mesh.address("far"), HBONE_PORT)
        sock.sendall(recorder.sent)
        # What the server answers with is new: the recorded Finished does not fit.
        while True:
            try:
                if not sock.recv(65536):
                    break
            except ConnectionResetError:
                break
    mesh.counted("far", "ztunnel_tls_handshake_failures_total", before + replays)
    wait_until(lambda: len(failures(mesh, known)) >= replays, "each is logged")
    assert [line["reason"] for line in failures(mesh, known)] == ["tls_failed"] * replays
    assert nobody_came(listener)
    serves(mesh)


# --- floods ---------------------------------------------------------------------------------------


def test_a_flood_of_key_updates_is_ended(mesh: Mesh) -> None:
    context = mesh.shown().context()
    secrets = Secrets(context)
    sock = mesh.connect("twin", mesh.address("far"), HBONE_PORT)
    tls = Tls(sock, context)
    tls.handshake()
    # Once its first frame is here, the certificate has been judged and HTTP/2 has begun.
    tls.receive()

    flood = secrets.client(tls)
    records = b"".join(flood.key_update() for _ in range(FLOOD))
    answered = 0
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        sock.sendall(records)
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(65536):
            answered += len(data)
    # It has ended, after no more answers (records of the same size, and an alert) than are counted.
    assert answered <= (MOST_POST_HANDSHAKE + 1) * len(records) // FLOOD
    serves(mesh)


# --- names in certificates ------------------------------------------------------------------------

HOSTILE: Final = {
    "newline": "spiffe://cluster.local/ns/shop/sa/twin\n",
    "nul": "spiffe://cluster.local/ns/shop/sa/twin\0.evil",
    "quote": 'spiffe://cluster.local/ns/shop/sa/twin","reason":"closed',
    "escape": "spiffe://cluster.local/ns/shop/sa/\x1b[2Jtwin",
    "userinfo": "spiffe://cluster.local@evil/ns/shop/sa/twin",
    "upper case": "SPIFFE://CLUSTER.LOCAL/ns/shop/sa/twin",
    "dots": "spiffe://cluster.local/ns/shop/../kube-system/sa/twin",
    "suffix": "spiffe://cluster.local.evil/ns/shop/sa/twin",
}
FORGED: Final = '\n{"time":"1970-01-01T00:00:00.000Z","forged":true}\n'


@pytest.mark.parametrize("why", HOSTILE)
def test_a_hostile_name_is_neither_an_identity_nor_a_log_line(mesh: Mesh, why: str) -> None:
    issuer, _ = mesh.authority()
    now = time.time()
    leaf = workload(issuer, HOSTILE[why], subject=FORGED, not_before=now - 60, not_after=now + 3600)
    known = len(failures(mesh))
    listener = mesh.listen("far")
    with pytest.raises(Gone):  # noqa: PT012 - TLS 1.3 tells a client late
        client = mesh.hbone("twin", "far", Shown(leaf=leaf, chain=[issuer.certificate]))
        client.status(client.connect(authority(mesh.address("far"), listener.getsockname()[1])))
    line = refused(mesh, known)
    assert line["reason"] in {"certificate_invalid", "trust_domain_mismatch"}
    assert "src.identity" not in line
    assert nobody_came(listener)
    node = mesh.lab.node("node-2")
    text = mesh.lab.layout.access_log("node-2").read_text()
    said = [json.loads(each) for each in text.splitlines()]
    assert not any("forged" in each for each in said)
    for output in (text, node.logs("ztunnel")):
        assert "\x1b" not in output
        assert "\0" not in output
        assert not any(each.startswith('{"time":"1970') for each in output.splitlines())


def test_names_that_only_resemble_the_callers_are_other_names(mesh: Mesh) -> None:
    """An identity is compared whole: what policy and logs see is exactly what was proved."""
    for uri in (spiffe("twin-evil"), spiffe("twi"), spiffe("Twin"), spiffe("twin.")):
        listener = mesh.listen("far")
        port = listener.getsockname()[1]
        client = mesh.hbone("twin", "far", mesh.shown(uri))
        assert client.status(client.connect(authority(mesh.address("far"), port))) == 200
        app, _ = mesh.accept(listener)
        app.close()
        client.close()
        assert mesh.line("far", "inbound", port)["src.identity"] == uri
