"""TLS abuse on port 15008: each ends that connection only, with a reason, and costs little.

Downstream, the attacker calls our server; upstream, our client calls it. What else of TLS is
attacked stands in tests/netns/test_threat_tls.py and test_e2e_garbage.py.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import pytest
from cryptography import x509
from OpenSSL import SSL

from nodeagent.lab import Lab
from support.abuse import PLACES, attack, broken, dialled
from support.certificates import authority as certificate_authority
from support.certificates import workload
from support.e2e import HBONE_PORT, Mesh, authority, running, spec, spiffe
from support.hbone import Client, Gone, Shown, Tls
from support.netns import wait_until
from support.records import ALERT, HANDSHAKE, Records, Secrets

DEADLINE: Final = 2
"""Seconds of a handshake in this lab."""
MOST_HANDSHAKES: Final = 64
"""Handshakes that a pod of this lab may have open; the default is 512."""
MOST_POST_HANDSHAKE: Final = 1000
"""ZT_MAX_POST_HANDSHAKE."""
FLOOD: Final = 20 * MOST_POST_HANDSHAKE
KEY_UPDATE: Final = 27
"""Bytes of a record with a KeyUpdate, and of its answer."""
AHEAD: Final = 20
"""KeyUpdates sent too early, when the first frames of HTTP/2 are taken for answers."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    settings = {
        "deadlines": {"tls_handshake": DEADLINE},
        "limits": {"handshakes": MOST_HANDSHAKES},
    }
    with running(spec(apps=False, settings=settings)) as made:
        yield made


def client_hello() -> bytes:
    tls = SSL.Connection(Shown(leaf=None).context(), None)
    tls.set_connect_state()
    with pytest.raises(SSL.WantReadError):
        tls.do_handshake()
    return tls.bio_read(65536)


def end_of(sock: socket.socket) -> None:
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while sock.recv(65536):
            pass


def serves(mesh: Mesh, pod: str = "far") -> None:
    """Assert that a correct peer, on a connection of its own, is served."""
    listener = mesh.listen(pod)
    client = mesh.hbone("twin", pod)
    stream = client.connect(authority(mesh.address(pod), listener.getsockname()[1]))
    assert client.status(stream) == 200
    app, _ = mesh.accept(listener)
    client.send(stream, b"ping")
    assert app.recv(4) == b"ping"
    app.sendall(b"pong")
    assert client.receive(stream, 4) == b"pong"


def reasons(mesh: Mesh, known: int, number: int = 1, pod: str = "far") -> set[str]:
    lines = wait_until(
        lambda: found if len(found := broken(mesh, pod, known)) >= number else [],
        "the end is logged",
    )
    assert len(lines) == number
    return {line["reason"] for line in lines}


# --- slow, fragmented, many -----------------------------------------------------------------------


def test_a_handshake_in_drops_ends_at_its_deadline(mesh: Mesh) -> None:
    """The deadline is the handshake's, not that of each byte."""
    bystander, app, _ = mesh.call("client", "far")
    known = len(broken(mesh, "far"))
    tls = Tls(mesh.connect("twin", mesh.address("far"), HBONE_PORT), mesh.shown().context())
    said = 0
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        for byte in client_hello():
            tls.sock.sendall(bytes([byte]))
            said += 1
            if tls.has_come(0.05):
                break
    end_of(tls.sock)
    assert 10 < said < len(client_hello())
    assert reasons(mesh, known) == {"tls_timeout"}
    mesh.carries(bystander, app)


class _Cut:
    """A socket that sends in pieces; the first record in records of its own, if told to."""

    def __init__(self, sock: socket.socket, piece: int, *, records: bool) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock, self._piece, self._records = sock, piece, records

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever a socket has
        return getattr(self._sock, name)

    def sendall(self, data: bytes) -> None:
        head, body = data[:3], data[5:]
        if self._records:
            assert len(body) == int.from_bytes(data[3:5])
            for at in range(0, len(body), self._piece):
                part = body[at : at + self._piece]
                self._sock.sendall(head + len(part).to_bytes(2) + part)
            self._records, self._piece = False, 1 << 20
            return
        for at in range(0, len(data), self._piece):
            self._sock.sendall(data[at : at + self._piece])


@pytest.mark.parametrize(
    "piece,records", [(1, False), (100, True)], ids=["a byte in each segment", "many records"]
)
def test_a_fragmented_client_hello_is_served(mesh: Mesh, piece: int, records: bool) -> None:
    listener = mesh.listen("far")
    sock = mesh.connect("twin", mesh.address("far"), HBONE_PORT)
    cut: Any = _Cut(sock, piece, records=records)
    client = Client(cut, mesh.shown().context())
    stream = client.connect(authority(mesh.address("far"), listener.getsockname()[1]))
    assert client.status(stream) == 200


def test_a_storm_of_client_hellos_is_bounded_and_honest_peers_are_served(mesh: Mesh) -> None:
    """Replayed, each of them to wait for its deadline: the oldest give way."""
    hello = client_hello()
    before = mesh.count("far", "ztunnel_hbone_connections")
    name = "ztunnel_tls_handshake_failures_total"
    storm = []
    for number in range(4 * MOST_HANDSHAKES):
        sock = mesh.connect("twin", mesh.address("far"), HBONE_PORT)
        sock.sendall(hello)
        storm.append(sock)
        if number % MOST_HANDSHAKES == 0:
            serves(mesh)
            open_now = mesh.count("far", "ztunnel_hbone_connections") - before
            assert open_now <= MOST_HANDSHAKES + 8
    mesh.counted("far", name, 2 * MOST_HANDSHAKES, reason="pod_handshake_limit")
    serves(mesh)


@contextlib.contextmanager
def neighbours(mesh: Mesh) -> Iterator[Callable[[], None]]:
    """Give what asserts that `client` is served while `near`, on its node, is under a storm.

    On connections of its own and on one that has been there all the time; and no part of the storm
    is laid to its account.
    """
    refusals = "ztunnel_pod_refusals_total"
    before = mesh.count("client", refusals, pod="shop/client")
    caller, app, _ = mesh.call("far", "client")

    def served() -> None:
        serves(mesh, "client")
        mesh.carries(caller, app)

    served()
    yield served
    served()
    assert mesh.count("client", refusals, pod="shop/client") == before
    wait_until(
        lambda: mesh.count("client", "ztunnel_pod_handshakes", pod="shop/near") == 0,
        "the storm has passed",
    )
    serves(mesh, "near")


@pytest.mark.parametrize(
    "said", [b"", client_hello()[:100], client_hello()], ids=["nothing", "part of a hello", "hello"]
)
def test_a_storm_of_handshakes_that_stop_leaves_a_neighbour_alone(mesh: Mesh, said: bytes) -> None:
    """On the same node, in the same process: each pod has its own limit."""
    refused = {"pod": "shop/near", "reason": "pod_handshake_limit"}
    before = mesh.count("near", "ztunnel_pod_refusals_total", **refused)
    with neighbours(mesh) as served:
        storm = []
        for number in range(4 * MOST_HANDSHAKES):
            sock = mesh.connect("twin", mesh.address("near"), HBONE_PORT)
            sock.sendall(said)
            storm.append(sock)
            if number % 16 == 0:
                served()
                under_way = mesh.count("near", "ztunnel_pod_handshakes", pod="shop/near")
                assert under_way <= MOST_HANDSHAKES
        # A quarter or more has given way; on a busy machine others have met their deadline first.
        mesh.counted("near", "ztunnel_pod_refusals_total", before + MOST_HANDSHAKES, **refused)
        for sock in storm:
            sock.close()


def test_handshakes_in_a_row_leave_a_neighbour_alone(mesh: Mesh) -> None:
    """Whole ones, by four peers at once, each of which goes as soon as it is let in."""
    held = mesh.count("near", "ztunnel_pod_descriptors", pod="shop/near")
    context = mesh.shown().context()
    over = threading.Event()

    def storm() -> int:
        number = 0
        while not over.is_set():
            tls = Tls(mesh.connect("twin", mesh.address("near"), HBONE_PORT), context)
            tls.handshake()
            # Its first frame: it has been judged.
            tls.receive()
            tls.close()
            number += 1
        return number

    with neighbours(mesh) as served, ThreadPoolExecutor() as threads:
        storms = [threads.submit(storm) for _ in range(4)]
        try:
            for _ in range(50):
                served()
        finally:
            over.set()
        assert min(each.result() for each in storms) > 10
    wait_until(
        lambda: mesh.count("near", "ztunnel_pod_descriptors", pod="shop/near") <= held + 2,
        "what it cost is given back, but for the honest peer's that came last",
    )


# --- certificates ---------------------------------------------------------------------------------


def _chain(length: int) -> Shown:
    """A real chain of this many issuers, each signed by the one before."""
    first, last = 1_000_000_000, 4_000_000_000
    issuer = certificate_authority(not_before=first, not_after=last)
    chain = [issuer.certificate]
    for _ in range(length):
        issuer = certificate_authority(issuer=issuer, not_before=first, not_after=last)
        chain.append(issuer.certificate)
    leaf = workload(issuer, spiffe("twin"), not_before=first, not_after=last)
    return Shown(leaf=leaf, chain=chain[::-1])


def _large(mesh: Mesh, size: int) -> Shown:
    oid = x509.ObjectIdentifier("1.3.6.1.4.1.55555.1")
    return mesh.shown(extra=[(x509.UnrecognizedExtension(oid, bytes(size)), False)])


def _padded(mesh: Mesh, number: int) -> Shown:
    """A good chain, and behind it certificates that have nothing to do with it."""
    good = mesh.shown()
    return Shown(leaf=good.leaf, chain=[*good.chain, *[*_chain(1).chain] * number])


CERTIFICATES: Final[dict[str, Callable[[Mesh], Shown]]] = {
    "a chain of 1,000": lambda _: _chain(1000),
    "a chain of 40": lambda _: _chain(40),
    "a good chain and 40 more": lambda mesh: _padded(mesh, 20),
    "a good chain and 2,000 more": lambda mesh: _padded(mesh, 1000),
    "a certificate of 200 KB": lambda mesh: _large(mesh, 200_000),
}
REFUSED: Final = {"certificate_invalid", "certificate_untrusted", "tls_failed"}


@pytest.mark.parametrize("why", CERTIFICATES)
def test_an_oversized_client_certificate(mesh: Mesh, why: str) -> None:
    bystander, app, _ = mesh.call("client", "far")
    known = len(broken(mesh, "far"))
    shown = CERTIFICATES[why](mesh)
    with pytest.raises(Gone):  # noqa: PT012 - TLS 1.3 tells a client late
        client = mesh.hbone("twin", "far", shown)
        client.step()
        client.status(client.connect(authority(mesh.address("far"), 1)))
    assert reasons(mesh, known) <= REFUSED
    mesh.carries(bystander, app)


@pytest.mark.parametrize("why", CERTIFICATES)
def test_an_oversized_server_certificate(mesh: Mesh, why: str) -> None:
    bystander, app, _ = mesh.call("client", "far")
    known = len(broken(mesh, "client"))
    shown = CERTIFICATES[why](mesh)
    listener = mesh.listen("twin", HBONE_PORT)
    sock = dialled(mesh, listener)
    with pytest.raises(Gone):  # noqa: PT012 - at any of these
        mesh.hbone_server(listener, shown).request()
        raise AssertionError("the request reached a stranger")
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    assert reasons(mesh, known, pod="client") <= REFUSED
    mesh.carries(bystander, app)


@pytest.mark.parametrize(
    "why,shown",
    [
        ("TLS 1.2 only", {"version": SSL.TLS1_2_VERSION}),
        ("HTTP/1.1", {"alpn": b"http/1.1"}),
        ("no ALPN", {"alpn": b""}),
    ],
)
def test_a_server_of_another_protocol(mesh: Mesh, why: str, shown: dict[str, Any]) -> None:
    known = len(broken(mesh, "client"))
    good = mesh.shown()
    listener = mesh.listen("twin", HBONE_PORT)
    sock = dialled(mesh, listener)
    with pytest.raises(Gone):  # noqa: PT012 - at any of these
        mesh.hbone_server(listener, Shown(leaf=good.leaf, chain=good.chain, **shown)).request()
        raise AssertionError(f"spoken to over {why}")
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    assert reasons(mesh, known, pod="client") <= {"tls_failed", "tls_wrong_alpn", "tls_alert"}


# --- in the middle --------------------------------------------------------------------------------

UNEXPECTED: Final = b"\x15\x03\x03\x00\x02\x02\x0a"
"""A fatal alert in the clear: unexpected_message."""


@pytest.mark.parametrize("before", [b"", client_hello()], ids=["first", "after the ClientHello"])
def test_an_alert_in_the_handshake(mesh: Mesh, before: bytes) -> None:
    known = len(broken(mesh, "far"))
    sock = mesh.connect("twin", mesh.address("far"), HBONE_PORT)
    sock.sendall(before)
    if before:
        assert sock.recv(1)
    sock.sendall(UNEXPECTED)
    end_of(sock)
    assert reasons(mesh, known) <= {"tls_alert", "tls_failed"}
    serves(mesh)


SEALED: Final[dict[str, tuple[Callable[[Records], bytes], set[str]]]] = {
    "a fatal alert": (lambda to: to.seal(ALERT, b"\2\x50"), {"tls_alert"}),
    "user_canceled without end": (
        lambda to: b"".join(to.seal(ALERT, b"\1\x5a") for _ in range(2000)),
        {"tls_failed", "tls_alert"},
    ),
    "an alert of one byte": (lambda to: to.seal(ALERT, b"\2"), {"tls_failed", "tls_alert"}),
    # Renegotiation, as TLS 1.2 had it and as TLS 1.3 forbids it (RFC 8446, 4.1.2).
    "a ClientHello again": (lambda to: to.seal(HANDSHAKE, client_hello()[5:]), {"tls_failed"}),
    "a HelloRequest": (lambda to: to.seal(HANDSHAKE, bytes(4)), {"tls_failed"}),
    "a Finished again": (
        lambda to: to.seal(HANDSHAKE, b"\x14\0\0\x20" + bytes(32)),
        {"tls_failed"},
    ),
    "empty records without end": (
        lambda to: b"".join(to.seal(23, b"") for _ in range(2000)),
        {"tls_failed"},
    ),
    "a record of an unknown type": (lambda to: to.seal(99, b"what"), {"tls_failed"}),
    "a record of no type": (lambda to: to.seal(0, bytes(100)), {"tls_failed"}),
    "garbage": (lambda _: bytes(range(256)), {"tls_failed"}),
    "a record that does not open": (
        lambda to: bytes(a ^ (at == 30) for at, a in enumerate(to.seal(23, bytes(50)))),
        {"tls_failed"},
    ),
}


@pytest.mark.parametrize("why", SEALED)
def test_records_after_the_handshake(mesh: Mesh, why: str) -> None:
    make, expected = SEALED[why]
    bystander, app, _ = mesh.call("client", "far")
    known = len(broken(mesh, "far"))
    context = mesh.shown().context()
    secrets = Secrets(context)
    tls = Tls(mesh.connect("twin", mesh.address("far"), HBONE_PORT), context)
    tls.handshake()
    # Once its first frame is here, the certificate has been judged and HTTP/2 has begun.
    tls.receive()
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        tls.sock.sendall(make(secrets.client(tls)))
    end_of(tls.sock)
    assert reasons(mesh, known) <= expected
    mesh.carries(bystander, app)


# --- floods ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def flooded(mesh: Mesh, place: str) -> Iterator[tuple[socket.socket, Records]]:
    """Give what an attacker needs to send records of its own; assert that they were counted."""
    bystander, app, _ = mesh.call("client", "far")
    pod = "far" if place == "downstream" else "client"
    context = mesh.shown().context(server=place == "upstream")
    secrets = Secrets(context)
    if place == "downstream":
        tls = Tls(mesh.connect("twin", mesh.address("far"), HBONE_PORT), context)
    else:
        listener = mesh.listen("twin", HBONE_PORT)
        dialled(mesh, listener)
        tls = Tls(mesh.accept(listener)[0], context, server=True)
    known = len(broken(mesh, pod))
    tls.handshake()
    # Once its first frame is here, the certificate has been judged and HTTP/2 has begun.
    tls.receive()
    yield tls.sock, secrets.client(tls) if place == "downstream" else secrets.server(tls)
    end_of(tls.sock)
    # A connection of the test before may be lost only now, and says so in a line of its own.
    (line,) = wait_until(
        lambda: [each for each in broken(mesh, pod, known) if each["reason"] == "tls_failed"],
        "the end is logged",
    )
    assert f"more than {MOST_POST_HANDSHAKE} post-handshake messages" in line["error"]
    mesh.carries(bystander, app)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("together", [1, 2, 100, FLOOD])
def test_key_updates_are_counted_however_they_come(mesh: Mesh, place: str, together: int) -> None:
    """Each batch is sent when the one before has been answered: they are read one by one."""
    sent = 0
    with flooded(mesh, place) as (sock, records):
        # The last answer comes with the next thing that is sent (RFC 8446, 4.6.3).
        missing = -KEY_UPDATE
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while sent < FLOOD:
                sent += together
                missing += KEY_UPDATE * together
                sock.sendall(b"".join(records.key_update() for _ in range(together)))
                while missing > 0 and (data := sock.recv(missing)):
                    missing -= len(data)
                if missing > 0:
                    break
    # The message and its answer count one each; of each batch the last message is not counted, for
    # nothing follows it.
    counted = together * (MOST_POST_HANDSHAKE // (2 * together - 1))
    assert MOST_POST_HANDSHAKE / 2 < sent <= counted + 2 * together + AHEAD


def test_tickets_are_counted_also_when_many_are_in_one_record(mesh: Mesh) -> None:
    """RFC 8446, 4.6.1 and 5.1: what a server may send at any time, without having been asked."""
    body = (7200).to_bytes(4) + bytes(4) + b"\1n" + b"\0\1t" + b"\0\0"
    ticket = b"\4" + len(body).to_bytes(3) + body
    with flooded(mesh, "upstream") as (sock, records):
        many = ticket * (MOST_POST_HANDSHAKE // 2)
        sock.sendall(b"".join(records.seal(HANDSHAKE, many) for _ in range(4)))


# --- ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("how", ["without close_notify", "in a record", "with close_notify"])
def test_truncation_is_told_from_an_end(mesh: Mesh, place: str, how: str) -> None:
    """RFC 8446, 6.1: only close_notify says that everything has come."""
    with attack(mesh, place) as at:
        tls = at.side.tls
        port = int(at.to.rpartition(":")[2])
        direction = "inbound" if place == "downstream" else "outbound"
        before = len(mesh.lines(at.pod, direction, port))
        if how == "with close_notify":
            tls._tls.shutdown()
            tls._flush()
        elif how == "in a record":
            tls.sock.sendall(b"\x17\x03\x03\x10\x00 half of it")
        tls.sock.shutdown(socket.SHUT_WR)
        (line,) = wait_until(lambda: mesh.lines(at.pod, direction, port)[before:], "its line")
        truncated = how != "with close_notify"
        assert line["reason"] == ("tls_truncated" if truncated else "peer_connection_lost")
