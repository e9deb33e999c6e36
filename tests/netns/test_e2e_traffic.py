"""Applications that know nothing of the mesh, through both daemons: bytes, ends and names."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator

import pytest

from nodeagent.lab import Lab
from support.e2e import HTTP_PORT, Mesh, authority, read_all, reset, running, spec, spiffe, watched
from support.netns import DEADLINE, wait_until
from support.pump import exchange, turned

FAMILIES = pytest.mark.parametrize("family", [4, 6], ids=["v4", "v6"])
SERVERS = pytest.mark.parametrize("server", ["far", "near"])


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(spec()) as made:
        yield made


@pytest.fixture
def mesh(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Mesh]:
    with watched(lab, request) as made:
        yield made


@FAMILIES
@SERVERS
def test_a_call_is_carried_under_both_identities(mesh: Mesh, server: str, family: int) -> None:
    listener = mesh.listen(server)
    port = listener.getsockname()[1]
    address = mesh.address(server, family)
    sock = mesh.connect("client", address, port)
    app, peer = mesh.accept(listener)
    mesh.carries(sock, app)
    # Neither application can tell the tunnel from the network.
    assert peer == mesh.address("client", family)
    assert sock.getpeername()[:2] == (address, port)
    source = authority(*sock.getsockname()[:2])
    sock.close()
    assert app.recv(1) == b""
    app.close()
    for pod, direction in (("client", "outbound"), (server, "inbound")):
        line = mesh.line(pod, direction, port)
        assert line["reason"] == "closed"
        assert line["connection_security_policy"] == "mutual_tls"
        assert line["src.identity"] == spiffe("client")
        assert line["dst.identity"] == spiffe(server)
        assert line["dst.addr"] == authority(address, 15008)
        assert line["dst.hbone_addr"] == authority(address, port)
        assert (line["bytes_recv"], line["bytes_sent"]) == (4, 4)
    assert mesh.line("client", "outbound", port)["src.addr"] == source


@FAMILIES
@SERVERS
def test_curl_reaches_a_service_by_name(mesh: Mesh, server: str, family: int) -> None:
    for name in (server, f"{server}.shop.svc.cluster.local"):
        done = mesh.curl("client", f"http://{name}:{HTTP_PORT}/ip", f"-{family}")
        assert done.returncode == 0, done.stderr
        assert f'"{mesh.address("client", family)}"' in done.stdout


@FAMILIES
def test_a_service_port_leads_to_the_workloads_port(mesh: Mesh, family: int) -> None:
    listener = mesh.listen("far", 8080)
    sock = mesh.connect("client", mesh.vip("far", family), 80)
    mesh.carries(sock, mesh.accept(listener)[0])
    assert sock.getpeername()[:2] == (mesh.vip("far", family), 80)


def test_a_service_port_that_does_not_exist_is_refused(mesh: Mesh) -> None:
    mesh.refuses("client", mesh.vip("far"), 81)
    line = mesh.line("client", "outbound", 81)
    assert line["reason"] == "unknown_port"
    assert line["dst.service"] == "far.shop.svc.cluster.local"


@FAMILIES
def test_outside_the_mesh_is_passed_through(mesh: Mesh, family: int) -> None:
    listener = mesh.listen("outsider")
    port = listener.getsockname()[1]
    sock = mesh.connect("client", mesh.address("outsider", family), port)
    app, peer = mesh.accept(listener)
    assert peer == mesh.address("client", family)
    mesh.carries(sock, app)
    sock.close()
    app.close()
    line = mesh.line("client", "outbound", port)
    # Nobody knows what the bytes were: the application may speak TLS itself.
    assert line["connection_security_policy"] == "unknown"
    assert line["src.workload"] == "client"
    assert not {"src.identity", "dst.identity", "dst.workload"} & line.keys()


@FAMILIES
def test_plaintext_from_outside_is_let_in(mesh: Mesh, family: int) -> None:
    listener = mesh.listen("far")
    port = listener.getsockname()[1]
    sock = mesh.connect("outsider", mesh.address("far", family), port)
    app, peer = mesh.accept(listener)
    assert peer == mesh.address("outsider", family)
    mesh.carries(sock, app)
    sock.close()
    app.close()
    line = mesh.line("far", "inbound", port)
    assert line["connection_security_policy"] == "none"
    assert "src.identity" not in line


# --- protocols and ends ---------------------------------------------------------------------------


def test_a_server_may_speak_first(mesh: Mesh) -> None:
    program = (
        "import asyncio, sys\n"
        "from aiosmtpd.smtp import SMTP\n"
        "class Handler:\n"
        "    async def handle_DATA(self, server, session, envelope):\n"
        "        return '250 ' + session.peer[0]\n"
        "async def main():\n"
        "    loop = asyncio.get_running_loop()\n"
        "    make = lambda: SMTP(Handler(), hostname='mail.test')\n"
        "    server = await loop.create_server(make, '0.0.0.0', 0)\n"
        "    print(server.sockets[0].getsockname()[1], flush=True)\n"
        "    await server.serve_forever()\n"
        "asyncio.run(main())\n"
    )
    server = mesh.popen("far", sys.executable, "-c", program, stdout=-1, text=True)
    assert server.stdout is not None
    port = int(server.stdout.readline())
    sock = mesh.connect("client", mesh.address("far"), port)
    with sock.makefile("rwb") as stream:

        def say(words: bytes) -> bytes:
            stream.write(words + b"\r\n")
            stream.flush()
            return bytes(stream.readline())

        assert stream.readline().startswith(b"220 mail.test ")
        assert say(b"HELO client").startswith(b"250 ")
        assert say(b"MAIL FROM:<a@b.test>").startswith(b"250 ")
        assert say(b"RCPT TO:<c@d.test>").startswith(b"250 ")
        assert say(b"DATA").startswith(b"354 ")
        assert say(b"hello\r\n.") == f"250 {mesh.address('client')}\r\n".encode()
        assert say(b"QUIT").startswith(b"221 ")


@SERVERS
def test_a_request_ended_by_shutdown_is_answered(mesh: Mesh, server: str) -> None:
    listener = mesh.listen(server)
    program = mesh.popen(
        "client",
        *("nc", "-N", mesh.address(server), str(listener.getsockname()[1])),
        stdin=-1,
        stdout=-1,
    )
    assert program.stdin is not None
    assert program.stdout is not None
    program.stdin.write(b"question")
    program.stdin.close()
    app, _ = mesh.accept(listener)
    app.sendall(read_all(app)[::-1])
    app.close()
    assert program.stdout.read() == b"noitseuq"
    assert program.wait(DEADLINE) == 0


@pytest.mark.parametrize("who", ["client", "server"])
@pytest.mark.parametrize("path", ["hbone", "passthrough"])
def test_a_reset_arrives_as_a_reset(mesh: Mesh, who: str, path: str) -> None:
    sock, app, port = mesh.call("client", "far" if path == "hbone" else "outsider")
    mesh.carries(sock, app)
    near, far = (sock, app) if who == "client" else (app, sock)
    reset(near)
    with pytest.raises(ConnectionResetError):
        far.recv(1)
    expected = f"{who}_reset"
    if path == "hbone" and who == "server":
        expected = "peer_reset"
    assert mesh.line("client", "outbound", port)["reason"] == expected


def test_a_closed_port_is_a_reset(mesh: Mesh) -> None:
    listener = mesh.listen("far")
    port = listener.getsockname()[1]
    listener.close()
    mesh.refuses("client", mesh.address("far"), port)
    assert mesh.line("client", "outbound", port)["reason"] == "unavailable_by_peer"
    assert mesh.line("far", "inbound", port)["reason"] == "connect_refused"


@pytest.mark.parametrize(
    "server, family, blocks", [("far", 4, 1024), ("far", 6, 64), ("near", 6, 64)]
)
def test_up_to_a_gibibyte_both_ways_at_once_arrives_intact(
    mesh: Mesh, server: str, family: int, blocks: int
) -> None:
    sock, app, port = mesh.call("client", server, family)
    block = os.urandom(1 << 20)
    exchange(sock, app, turned(block, blocks), turned(block[::-1], blocks))
    sock.close()
    app.close()
    line = mesh.line(server, "inbound", port)
    assert (line["bytes_recv"], line["bytes_sent"]) == (blocks << 20, blocks << 20)


def test_200_connections_at_once(mesh: Mesh) -> None:
    listener = mesh.listen("far")
    port = listener.getsockname()[1]
    before = mesh.count("far", "ztunnel_tls_handshake_duration_seconds_count", side="server")
    socks = [mesh.connect("client", mesh.address("far"), port) for _ in range(200)]
    apps = [mesh.accept(listener)[0] for _ in socks]
    for number, sock in enumerate(socks):
        sock.sendall(b"%03d" % number)
    poll = select.poll()
    by_fd = {app.fileno(): app for app in apps}
    for app in apps:
        poll.register(app, select.POLLIN)
    waiting = set(by_fd)
    while waiting:
        ready = poll.poll(DEADLINE * 1000)
        assert ready, f"{len(waiting)} of 200 connections carry nothing"
        for fd, _ in ready:
            by_fd[fd].sendall(by_fd[fd].recv(3))
            poll.unregister(fd)
            waiting.discard(fd)
    assert [sock.recv(3) for sock in socks] == [b"%03d" % number for number in range(200)]
    # They share a few HBONE connections: at most 100 streams each.
    after = mesh.count("far", "ztunnel_tls_handshake_duration_seconds_count", side="server")
    assert after - before <= 20


def test_an_application_restarts_while_its_connections_are_open(mesh: Mesh) -> None:
    listener = mesh.listen("far")
    port = listener.getsockname()[1]
    opened = [mesh.call("client", "far", family, listener=listener)[:2] for family in (4, 6)]
    plaintext = mesh.connect("outsider", mesh.address("far"), port)
    opened.append((plaintext, mesh.accept(listener)[0]))
    for sock, app in opened:
        mesh.carries(sock, app)
    listener.close()
    again = mesh.listen("far", port)
    for sock, app in opened:
        mesh.carries(sock, app)
    sock, app, _ = mesh.call("client", "far", listener=again)
    mesh.carries(sock, app)


# --- a pod and itself -----------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize(
    "where,port",
    [(where, port) for where in ("loopback", "client") for port in (15001, 15006)]
    + [(where, port) for where in ("near", "far") for port in (15001, 15006, 15008)],
)
def test_the_tunnels_own_ports_are_refused(mesh: Mesh, where: str, port: int, family: int) -> None:
    loopback = "127.0.0.1" if family == 4 else "::1"
    address = loopback if where == "loopback" else mesh.address(where, family)
    known = len(mesh.lines("client", "", port))
    mesh.refuses("client", address, port)
    (line,) = wait_until(lambda: mesh.lines("client", "", port)[known:], "the refusal is logged")
    # On 15001 it matters first that loopback's address is no address of the pod's.
    foreign = (where, port) == ("loopback", 15001)
    assert line["reason"] == ("foreign_source_address" if foreign else "self_call")


@FAMILIES
def test_the_hbone_port_is_no_loopback_service(mesh: Mesh, family: int) -> None:
    sock = mesh.connect("client", "127.0.0.1" if family == 4 else "::1", 15008)
    assert sock.recv(1) == b""
    source = authority(*sock.getsockname()[:2])
    line = mesh.line("client", "inbound", 15008, src_addr=source)
    assert line["reason"] == "self_call"
    assert line["message"] == "handshake failed"


@FAMILIES
def test_a_pod_reaches_itself_through_its_service(mesh: Mesh, family: int) -> None:
    listener = mesh.listen("client", 8080)
    sock = mesh.connect("client", mesh.vip("client", family), 80)
    app, peer = mesh.accept(listener)
    assert peer == mesh.address("client", family)
    mesh.carries(sock, app)


@FAMILIES
def test_a_pods_calls_to_itself_stay_inside(mesh: Mesh, family: int) -> None:
    listener = mesh.listen("client")
    port = listener.getsockname()[1]
    loopback = "127.0.0.1" if family == 4 else "::1"
    for address in (loopback, mesh.address("client", family)):
        sock = mesh.connect("client", address, port)
        mesh.carries(sock, mesh.accept(listener)[0])
    assert mesh.lines("client", "outbound", port) == []
