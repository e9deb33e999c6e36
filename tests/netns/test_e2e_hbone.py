"""HBONE spoken by a peer that nobody here wrote, right and wrong, against both daemons."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from OpenSSL import SSL

from nodeagent.lab import Lab
from support.certificates import authority as certificate_authority
from support.certificates import workload
from support.e2e import Line, Mesh, authority, read_all, running, spec, spiffe, strict, watched
from support.hbone import Client, Gone, Shown, StreamReset
from support.netns import DEADLINE, wait_until

FAMILIES = pytest.mark.parametrize("family", [4, 6], ids=["v4", "v6"])
HOUR = 3600


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(spec(apps=False)) as made:
        yield made


@pytest.fixture
def mesh(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Mesh]:
    with watched(lab, request) as made:
        yield made


# --- as a client of ours --------------------------------------------------------------------------


@FAMILIES
def test_connect_is_answered_after_the_application_has_accepted(mesh: Mesh, family: int) -> None:
    mesh.policy("far", strict(), mode="STRICT")
    listener = mesh.listen("far")
    port = listener.getsockname()[1]
    client = mesh.hbone("twin", "far", family=family)
    stream = client.connect(authority(mesh.address("far", family), port))
    assert client.status(stream) == 200
    app, peer = mesh.accept(listener)
    assert peer == mesh.address("twin", family)
    client.send(stream, b"question", end=True)
    assert read_all(app) == b"question"
    app.sendall(b"answer")
    app.close()
    assert client.receive(stream, 6) == b"answer"
    line = mesh.line("far", "inbound", port)
    assert line["src.identity"] == spiffe("twin")
    assert line["reason"] == "closed"


def test_headers_of_a_peer_name_nobody(mesh: Mesh) -> None:
    listener = mesh.listen("far")
    port = listener.getsockname()[1]
    client = mesh.hbone("twin", "far")
    stream = client.connect(
        authority(mesh.address("far"), port),
        (b"forwarded", b'for="10.244.1.2:1";host=evil\t"x'),
        (b"baggage", b"k8s.namespace.name=istio-system,k8s.deployment.name=admin"),
        (b"x-forwarded-client-cert", b"By=spiffe://cluster.local/ns/a/sa/b"),
    )
    assert client.status(stream) == 200
    app, peer = mesh.accept(listener)
    assert peer == mesh.address("twin")
    app.close()
    client.send(stream, b"", end=True)
    line = mesh.line("far", "inbound", port)
    assert line["src.identity"] == spiffe("twin")
    assert (line["src.workload"], line["src.namespace"]) == ("twin", "shop")


def answer(client: Client, stream: int) -> int | str:
    """Return the status, or that HTTP/2 itself refused what is no request (RFC 9113, 8.1.1)."""
    try:
        return client.status(stream)
    except StreamReset as reset:
        protocol_error = 1
        return "malformed" if reset.args == (protocol_error,) else f"{reset!r}"


AUTHORITIES = {
    "another pod": "10.244.1.3:{port}",
    "loopback": "127.0.0.1:{port}",
    "unspecified": "0.0.0.0:{port}",
    "metadata": "169.254.169.254:80",
    "name": "far.shop:{port}",
    "userinfo": "user@{far}:{port}",
    "no port": "{far}",
    "empty port": "{far}:",
    "port 0": "{far}:0",
    "port with zeros": "{far}:0{port}",
    "port too large": "{far}:65536",
    "port with a sign": "{far}:+{port}",
    "octal": "010.244.2.2:{port}",
    "short IPv4": "127.1:{port}",
    "another pod, IPv4-mapped": "[::ffff:10.244.1.3]:{port}",
    "loopback, IPv4-mapped": "[::ffff:127.0.0.1]:{port}",
    "IPv4 in IPv6": "[::ffff:{far}]:{port}",
    "IPv4 in brackets": "[{far}]:{port}",
    "IPv6 without brackets": "{far6}:{port}",
    "scope": "[{far6}%eth0]:{port}",
    "the other family's": "[{far6}]:{port}",
    "path": "{far}:{port}/x",
    "space": "{far}:{port} ",
}


@pytest.mark.parametrize("why", AUTHORITIES)
def test_a_bad_authority_is_400(mesh: Mesh, why: str) -> None:
    listener = mesh.listen("far")
    fill = {
        "far": mesh.address("far"),
        "far6": mesh.address("far", 6),
        "port": listener.getsockname()[1],
    }
    client = mesh.hbone("twin", "far")
    stream = client.connect(AUTHORITIES[why].format(**fill))
    assert answer(client, stream) in (400, "malformed")
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.accept()
    # The connection lives: one bad request is no reason to cut the others.
    listener.settimeout(15)
    stream = client.connect(f"{fill['far']}:{fill['port']}")
    assert client.status(stream) == 200


@pytest.mark.parametrize("method", [b"GET", b"POST", b"OPTIONS", b"connect"])
def test_only_connect_is_served(mesh: Mesh, method: bytes) -> None:
    before = mesh.count("far", "istio_tcp_connections_failed_total", response_flags="CONNECT")
    client = mesh.hbone("twin", "far")
    fields = [(b":method", method), (b":scheme", b"http"), (b":path", b"/")]
    stream = client.ask([*fields, (b":authority", mesh.address("far").encode() + b":8080")])
    found = answer(client, stream)
    assert found in (400, "malformed")
    if found == 400:
        flags = {"response_flags": "CONNECT"}
        mesh.counted("far", "istio_tcp_connections_failed_total", before + 1, **flags)


def test_a_closed_port_is_503(mesh: Mesh) -> None:
    listener = mesh.listen("far")
    port = listener.getsockname()[1]
    listener.close()
    client = mesh.hbone("twin", "far")
    assert client.status(client.connect(authority(mesh.address("far"), port))) == 503
    assert mesh.line("far", "inbound", port)["reason"] == "connect_refused"


@pytest.mark.parametrize("port", [15001, 15006, 15008])
def test_the_tunnels_own_ports_are_503(mesh: Mesh, port: int) -> None:
    client = mesh.hbone("twin", "far")
    assert client.status(client.connect(authority(mesh.address("far"), port))) == 503


def test_a_reset_stream_is_a_reset_for_the_application(mesh: Mesh) -> None:
    listener = mesh.listen("far")
    client = mesh.hbone("twin", "far")
    stream = client.connect(authority(mesh.address("far"), listener.getsockname()[1]))
    assert client.status(stream) == 200
    app, _ = mesh.accept(listener)
    client.reset(stream)
    with pytest.raises(ConnectionResetError):
        app.recv(1)


# --- certificates that are refused ----------------------------------------------------------------


def _foreign(mesh: Mesh) -> Shown:
    """The right names, signed by somebody else's CA."""
    now = time.time()
    root = certificate_authority(not_before=now - HOUR, not_after=now + HOUR)
    leaf = workload(root, spiffe("twin"), not_before=now - 60, not_after=now + HOUR)
    return Shown(leaf=leaf, chain=[root.certificate])


def _self_signed(mesh: Mesh) -> Shown:
    now = time.time()
    return Shown(leaf=workload(None, spiffe("twin"), not_before=now - 60, not_after=now + HOUR))


def _issued(**changes: Any) -> Callable[[Mesh], Shown]:  # noqa: ANN401 - `workload`'s
    def make(mesh: Mesh) -> Shown:
        now = time.time()
        moved = {
            name: now + value if name.startswith("not_") else value
            for name, value in changes.items()
        }
        return mesh.shown(**moved)

    return make


def _alone(mesh: Mesh) -> Shown:
    """A good leaf without its intermediate."""
    return Shown(leaf=mesh.shown().leaf)


def _authority_as_leaf(mesh: Mesh) -> Shown:
    return _issued(is_ca=True)(mesh)


REFUSED: dict[str, tuple[Callable[[Mesh], Shown], set[str]]] = {
    "expired": (_issued(not_before=-HOUR, not_after=-60), {"certificate_expired"}),
    "not yet valid": (
        _issued(not_before=HOUR, not_after=2 * HOUR),
        {"certificate_not_yet_valid"},
    ),
    "another CA": (_foreign, {"certificate_untrusted"}),
    "self-signed": (_self_signed, {"certificate_untrusted"}),
    "no intermediate": (_alone, {"certificate_untrusted"}),
    "another trust domain": (
        _issued(uri="spiffe://elsewhere.test/ns/shop/sa/twin"),
        {"trust_domain_mismatch", "certificate_untrusted"},
    ),
    "trust domain with our name in front": (
        _issued(uri="spiffe://cluster.local.evil/ns/shop/sa/twin"),
        {"trust_domain_mismatch", "certificate_untrusted"},
    ),
    "two identities": (
        _issued(uris=(spiffe("twin"), spiffe("client"))),
        {"certificate_invalid"},
    ),
    "no identity": (_issued(uris=(), dns=("twin.shop",)), {"certificate_invalid"}),
    "a CA": (_authority_as_leaf, {"certificate_invalid", "certificate_untrusted"}),
    "no certificate": (lambda _: Shown(leaf=None), {"certificate_missing", "tls_failed"}),
}


def failures(mesh: Mesh, pod: str, known: int = 0) -> list[Line]:
    found = [line for line in mesh.lines(pod, "") if line["message"] == "handshake failed"]
    return found[known:]


@pytest.mark.parametrize("why", REFUSED)
def test_a_client_of_a_wrong_identity_is_refused(mesh: Mesh, why: str) -> None:
    make, reasons = REFUSED[why]
    known = len(failures(mesh, "far"))
    before = mesh.count("far", "ztunnel_tls_handshake_failures_total")
    name = "istio_tcp_connections_failed_total"
    edge = {"reporter": "destination", "source_workload": "twin", "destination_workload": "far"}
    failed = mesh.count("far", name, **edge)
    listener = mesh.listen("far")
    with pytest.raises(Gone):  # noqa: PT012 - TLS 1.3 tells a client late
        client = mesh.hbone("twin", "far", make(mesh))
        client.status(client.connect(authority(mesh.address("far"), listener.getsockname()[1])))
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.accept()
    (line,) = wait_until(lambda: failures(mesh, "far", known), "the refusal is logged")
    assert line["reason"] in reasons
    assert line["error"]
    assert "src.identity" not in line
    mesh.counted("far", "ztunnel_tls_handshake_failures_total", before + 1)
    assert mesh.count("far", name, **edge) == failed + 1


@pytest.mark.parametrize(
    "why,shown",
    [
        ("TLS 1.2", {"version": SSL.TLS1_2_VERSION}),
        ("HTTP/1.1", {"alpn": b"http/1.1"}),
        ("no ALPN", {"alpn": b""}),
    ],
)
def test_a_client_of_another_protocol_is_refused(
    mesh: Mesh, why: str, shown: dict[str, Any]
) -> None:
    known = len(failures(mesh, "far"))
    good = mesh.shown()
    with pytest.raises(Gone):  # noqa: PT012 - at any of these
        sock = mesh.connect("twin", mesh.address("far"), 15008)
        Client(sock, Shown(leaf=good.leaf, chain=good.chain, **shown).context()).step()
        raise AssertionError(f"served {why}")
    (line,) = wait_until(lambda: failures(mesh, "far", known), "the refusal is logged")
    assert line["reason"] in {"tls_failed", "tls_wrong_alpn", "tls_alert"}


# --- as a server that our client calls ------------------------------------------------------------


@pytest.fixture
def hbone_port(mesh: Mesh) -> socket.socket:
    return mesh.listen("twin", 15008)


@FAMILIES
def test_our_client_asks_as_the_protocol_says(
    mesh: Mesh, hbone_port: socket.socket, family: int
) -> None:
    sock = mesh.connect("client", mesh.address("twin", family), 8080)
    server = mesh.hbone_server(hbone_port)
    stream, fields = server.request()
    assert fields[":method"] == "CONNECT"
    assert fields[":authority"] == authority(mesh.address("twin", family), 8080)
    assert not {":scheme", ":path"} & fields.keys()
    assert fields["forwarded"] == f'for="{authority(*sock.getsockname()[:2])}"'
    baggage = dict(part.split("=") for part in fields["baggage"].split(","))
    assert baggage == {
        "k8s.cluster.name": "Kubernetes",
        "k8s.namespace.name": "shop",
        "k8s.deployment.name": "client",
        "service.name": "client",
        "service.version": "v1",
        "cloud.region": "lab",
    }
    assert server.tls.identity() == spiffe("client")
    server.answer(stream, 200)
    sock.sendall(b"ping")
    assert server.receive(stream, 4) == b"ping"
    server.send(stream, b"pong", end=True)
    assert sock.recv(5) == b"pong"
    assert sock.recv(1) == b""
    sock.close()


@pytest.mark.parametrize(
    "status,reason",
    [
        (400, "bad_request_by_peer"),
        (401, "denied_by_peer"),
        (503, "unavailable_by_peer"),
        (418, "unexpected_status_by_peer"),
    ],
)
def test_any_other_answer_is_a_reset(
    mesh: Mesh, hbone_port: socket.socket, status: int, reason: str
) -> None:
    # Ports of its own, by which its line is found.
    port = 30000 + status
    sock = mesh.connect("client", mesh.address("twin"), port)
    sock.sendall(b"secret")
    server = mesh.hbone_server(hbone_port)
    stream, _ = server.request()
    server.answer(stream, status, end=True)
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    assert stream not in server.data
    assert mesh.line("client", "outbound", port)["reason"] == reason


def test_a_peer_that_goes_away_is_a_reset(mesh: Mesh, hbone_port: socket.socket) -> None:
    sock = mesh.connect("client", mesh.address("twin"), 30001)
    server = mesh.hbone_server(hbone_port)
    stream, _ = server.request()
    server.answer(stream, 200)
    sock.sendall(b"ping")
    assert server.receive(stream, 4) == b"ping"
    server.close()
    with pytest.raises(ConnectionResetError):
        sock.recv(1)


WRONG_SERVERS: dict[str, tuple[Callable[[Mesh], Shown], set[str]]] = {
    name: case for name, case in REFUSED.items() if name != "no certificate"
} | {"another workload's": (_issued(uri=spiffe("legacy")), {"identity_mismatch"})}


def _called(mesh: Mesh, listener: socket.socket) -> socket.socket:
    """Return a connection of `client` whose tunnel has dialled `listener`.

    After a dial that failed, as in the case before, there is none for a moment: who calls meanwhile
    is reset at once (docs/architecture.md, the pool).
    """

    def call() -> socket.socket | None:
        try:
            sock = mesh.connect("client", mesh.address("twin"), 30002)
            sock.sendall(b"secret")
        except ConnectionError:
            return None
        for_whom = select.select([listener, sock], [], [], DEADLINE)[0]
        return sock if listener in for_whom else None

    sock = wait_until(call, "the tunnel dials")
    assert sock is not None
    return sock


@pytest.mark.parametrize("why", WRONG_SERVERS)
def test_a_server_of_a_wrong_identity_is_refused(
    mesh: Mesh, hbone_port: socket.socket, why: str
) -> None:
    make, reasons = WRONG_SERVERS[why]
    sock = _called(mesh, hbone_port)
    known = len(failures(mesh, "client"))
    with pytest.raises(Gone):  # noqa: PT012 - at any of these
        server = mesh.hbone_server(hbone_port, make(mesh))
        server.request()
        raise AssertionError("the request reached a stranger")
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    (line,) = wait_until(lambda: failures(mesh, "client", known), "the refusal is logged")
    assert line["reason"] in reasons
