"""Where connections go: to which of the tunnel's sockets, under which addresses, or past it."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from nodeagent.capture.layout import HBONE_PORT, PORTS
from support.captured import FAMILIES, Captured, Family, captured, plain

each_family = pytest.mark.parametrize("family", FAMILIES, ids=[f.name for f in FAMILIES])


@pytest.fixture
def world() -> Iterator[Captured]:
    with captured() as made:
        yield made


@each_family
def test_outbound_reaches_the_tunnel_with_its_original_destination(
    world: Captured, family: Family
) -> None:
    tunnel = world.enrol()
    elsewhere = world.peer.listen(family.peer)
    destination = elsewhere.getsockname()[:2]

    application = world.pod.connect(destination)
    taken = tunnel.accept("outbound")

    assert plain(taken.getsockname()) == destination
    assert plain(taken.getpeername()) == application.getsockname()[:2]
    assert application.getsockname()[0] == family.pod
    application.sendall(b"ping")
    assert taken.recv(4) == b"ping"
    taken.sendall(b"pong")
    assert application.recv(4) == b"pong"
    elsewhere.setblocking(False)
    with pytest.raises(BlockingIOError):
        elsewhere.accept()


@each_family
def test_outbound_to_an_address_that_nobody_has_is_captured(
    world: Captured, family: Family
) -> None:
    tunnel = world.enrol()
    world.pod.ip("route add default via 10.9.0.2", "-6 route add default via fd09::2")
    destination = ("203.0.113.9" if family.name == "v4" else "2001:db8::9", 443)

    world.pod.connect(destination)

    assert plain(tunnel.accept("outbound").getsockname()) == destination


@each_family
def test_the_tunnels_own_connections_leave_the_pod(world: Captured, family: Family) -> None:
    tunnel = world.enrol()
    server = world.peer.listen(family.peer)

    dialled = tunnel.dial(server.getsockname()[:2])
    accepted, client = world.peer.accept(server)

    assert client[0] == family.pod
    dialled.sendall(b"x" * 100_000)
    dialled.shutdown(socket.SHUT_WR)
    received = b""
    while part := accepted.recv(65536):
        received += part
    assert len(received) == 100_000
    accepted.close()
    assert dialled.recv(1) == b""


@each_family
def test_inbound_reaches_the_tunnel_and_the_application_sees_the_client(
    world: Captured, family: Family
) -> None:
    application = world.pod.listen("0.0.0.0" if family.name == "v4" else "::")
    tunnel = world.enrol()
    port = application.getsockname()[1]

    client = world.peer.connect((family.pod, port))
    taken = tunnel.accept("inbound")
    assert plain(taken.getsockname()) == (family.pod, port)
    assert plain(taken.getpeername()) == client.getsockname()[:2]

    delivered = tunnel.deliver(family.peer, (family.pod, port))
    accepted, seen = world.pod.accept(application)
    assert plain(seen)[0] == family.peer
    assert plain(accepted.getsockname()) == (family.pod, port)
    delivered.sendall(b"request")
    assert accepted.recv(7) == b"request"
    accepted.sendall(b"answer")
    assert delivered.recv(6) == b"answer"
    taken.sendall(b"answer")
    assert client.recv(6) == b"answer"
    accepted.close()
    assert delivered.recv(1) == b""


@each_family
def test_a_port_without_an_application_reaches_the_tunnel(world: Captured, family: Family) -> None:
    tunnel = world.enrol()

    world.peer.connect((family.pod, 9))

    assert plain(tunnel.accept("inbound").getsockname()) == (family.pod, 9)


@each_family
def test_hbone_reaches_its_own_listener(world: Captured, family: Family) -> None:
    tunnel = world.enrol()

    client = world.peer.connect((family.pod, HBONE_PORT))

    assert plain(tunnel.accept("hbone").getpeername()) == client.getsockname()[:2]


@each_family
def test_a_process_of_the_pod_gets_no_share_of_the_tunnels_ports(
    world: Captured, family: Family
) -> None:
    tunnel = world.enrol()
    for port in PORTS:
        thief = world.pod.make_socket(family.family)
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        with pytest.raises(OSError, match="Address already in use"):
            thief.bind((family.pod, port))
    # Bound before enrolment it would be refused; a socket of another address cannot take part.
    for _ in range(8):
        world.peer.connect((family.pod, HBONE_PORT))
        tunnel.accept("hbone")


@each_family
@pytest.mark.parametrize("where", ["own", "loopback", "own_from_loopback"])
def test_the_pod_to_itself_is_not_captured(world: Captured, family: Family, where: str) -> None:
    world.enrol()
    address = family.loopback if where == "loopback" else family.pod
    application = world.pod.listen(address)

    client = world.pod.make_socket(family.family)
    if where == "own_from_loopback":
        client.bind((family.loopback, 0))
    client.connect(application.getsockname()[:2])
    accepted, _ = world.pod.accept(application)

    accepted.sendall(b"hello")
    assert client.recv(5) == b"hello"


def test_the_pod_to_its_own_link_local_address_is_not_captured(world: Captured) -> None:
    world.enrol()
    shown = world.pod.check_output("ip", "-o", "-6", "addr", "show", "dev", "eth0", "scope", "link")
    address = shown.split()[3].split("/")[0]
    index = world.pod.run(socket.if_nametoindex, "eth0")
    application = world.pod.make_socket(socket.AF_INET6)
    application.bind((address, 0, 0, index))
    application.listen()

    client = world.pod.make_socket(socket.AF_INET6)
    client.connect((address, application.getsockname()[1], 0, index))

    accepted, _ = world.pod.accept(application)
    accepted.sendall(b"hello")
    assert client.recv(5) == b"hello"


def test_udp_is_not_touched(world: Captured) -> None:
    world.enrol()
    for family in FAMILIES:
        server = world.peer.make_socket(family.family, socket.SOCK_DGRAM)
        server.bind((family.peer, 0))
        client = world.pod.make_socket(family.family, socket.SOCK_DGRAM)
        client.sendto(b"query", server.getsockname()[:2])
        data, source = server.recvfrom(16)
        assert (data, source[0]) == (b"query", family.pod)
        server.sendto(b"reply", source)
        assert client.recv(16) == b"reply"


@each_family
def test_an_application_restarts_while_the_tunnel_holds_its_connections(
    world: Captured, family: Family
) -> None:
    application = world.pod.listen(family.pod)
    port = application.getsockname()[1]
    tunnel = world.enrol()
    world.peer.connect((family.pod, port))
    taken = tunnel.accept("inbound")
    delivered = tunnel.deliver(family.peer, (family.pod, port))
    accepted, _ = world.pod.accept(application)

    accepted.close()
    application.close()
    again = world.pod.listen(family.pod, port)

    tunnel.deliver(family.peer, (family.pod, port))
    world.pod.accept(again)
    assert taken.fileno() >= 0
    assert delivered.fileno() >= 0


@each_family
def test_two_pods_of_a_node_reach_each_other_through_both_tunnels(
    world: Captured, family: Family
) -> None:
    """A delivery from another captured pod's address is not taken for an outbound connection."""
    application = world.pod.listen(family.pod)
    tunnel = world.enrol()
    # The peer's address is exactly what another pod of this node would have.
    delivered = tunnel.deliver(family.peer, application.getsockname()[:2])
    accepted, seen = world.pod.accept(application)
    assert seen[0] == family.peer
    assert delivered.getsockname()[:2] == plain(accepted.getpeername())
    assert world.count("captured_outbound") == 0
