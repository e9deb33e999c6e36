"""What the guard at the pod's device stops, and what happens to connections of before."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator

import pytest

from nodeagent.capture import Enforcement
from nodeagent.capture.older import Cut
from support.captured import (
    FAMILIES,
    PERMISSIVE,
    STRICT,
    Captured,
    Family,
    captured,
    plain,
)
from support.netns import wait_until

IPV6_FREEBIND = 78

each_family = pytest.mark.parametrize("family", FAMILIES, ids=[f.name for f in FAMILIES])
each_mode = pytest.mark.parametrize("mode", [STRICT, PERMISSIVE], ids=["strict", "permissive"])


@pytest.fixture
def world() -> Iterator[Captured]:
    with captured() as made:
        yield made


def start_connecting(sock: socket.socket, address: tuple[object, ...]) -> None:
    """Send a SYN, and do not wait for what becomes of it."""
    sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        sock.connect(address)


def nobody_came(listener: socket.socket) -> bool:
    listener.setblocking(False)
    try:
        listener.accept()[0].close()
    except BlockingIOError:
        return True
    return False


# --- ways around the routing rules -------------------------------------------------------------


@each_family
@each_mode
def test_bound_to_the_device(world: Captured, family: Family, mode: Enforcement) -> None:
    world.enrol(mode)
    outside = world.peer.listen(family.peer)
    escape = world.pod.make_socket(family.family)
    escape.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0\0")

    start_connecting(escape, outside.getsockname()[:2])

    world.wait_count("egress_bypass")
    assert nobody_came(outside)


@each_mode
def test_link_local(world: Captured, mode: Enforcement) -> None:
    world.enrol(mode)
    shown = world.peer.check_output(
        "ip", "-o", "-6", "addr", "show", "dev", "eth0", "scope", "link"
    )
    address = shown.split()[3].split("/")[0]
    index = world.peer.run(socket.if_nametoindex, "eth0")
    outside = world.peer.make_socket(socket.AF_INET6)
    outside.bind((address, 0, 0, index))
    outside.listen()
    escape = world.pod.make_socket(socket.AF_INET6)

    here = world.pod.run(socket.if_nametoindex, "eth0")
    start_connecting(escape, (address, outside.getsockname()[1], 0, here))

    world.wait_count("egress_bypass")
    assert nobody_came(outside)


def test_a_foreign_source_address_without_privileges(world: Captured) -> None:
    """IPV6_FREEBIND: captured like any other, and bound to the device as well it is dropped."""
    world.enrol()
    family = FAMILIES[1]
    outside = world.peer.listen(family.peer)

    inside = world.pod.make_socket(socket.AF_INET6)
    inside.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
    inside.bind(("2001:db8::bad", 0))
    start_connecting(inside, outside.getsockname()[:2])
    world.wait_count("captured_outbound")

    escape = world.pod.make_socket(socket.AF_INET6)
    escape.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
    escape.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0\0")
    escape.bind(("2001:db8::bad", 0))
    start_connecting(escape, outside.getsockname()[:2])
    world.wait_count("egress_bypass")
    assert nobody_came(outside)


@each_family
def test_rules_deleted_by_the_pod(world: Captured, family: Family) -> None:
    tunnel = world.enrol(PERMISSIVE)
    outside = world.peer.listen(family.peer)
    flag = "-6 " if family.name == "v6" else ""
    world.pod.ip(*(f"{flag}rule del pref {preference}" for preference in range(98, 103)))

    client = world.pod.make_socket(family.family)
    start_connecting(client, outside.getsockname()[:2])
    world.wait_count("egress_bypass")
    assert nobody_came(outside)
    assert world.deviations() == {"rule_missing"}

    world.run(world.capture.repair(world.uid))
    assert world.deviations() == set()
    # The kernel repeats the SYN, and this time it is captured.
    assert plain(tunnel.accept("outbound").getsockname()) == outside.getsockname()[:2]


def test_a_device_that_came_later_is_guarded_by_repair(world: Captured) -> None:
    world.enrol()
    world.pod.ip("link add later type veth peer name other", "link set later up")

    assert world.deviations() >= {"guard_missing"}
    world.run(world.capture.repair(world.uid))
    assert world.deviations() == set()

    world.pod.ip("link del later")
    assert world.deviations() == set()


def test_a_guard_taken_away_or_exchanged_is_put_back(world: Captured) -> None:
    world.enrol()
    world.pod.check_output("tc", "filter", "del", "dev", "eth0", "egress")
    assert world.deviations() == {"guard_missing"}
    world.run(world.capture.repair(world.uid))

    world.pod.check_output("tc", "qdisc", "del", "dev", "eth0", "clsact")
    assert world.deviations() == {"guard_missing"}
    world.run(world.capture.repair(world.uid))
    assert world.deviations() == set()


# --- from outside ------------------------------------------------------------------------------


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def tcp_header(source: str, destination: str, port: int, flags: int) -> bytes:
    """Return a TCP header over IPv4 with its checksum (RFC 9293, 3.1)."""
    body = struct.pack("!HHIIBBHHH", 40000, port, 1, 0, 5 << 4, flags, 1024, 0, 0)
    pseudo = socket.inet_aton(source) + socket.inet_aton(destination)
    pseudo += struct.pack("!BBH", 0, socket.IPPROTO_TCP, len(body))
    return body[:16] + struct.pack("!H", checksum(pseudo + body)) + body[18:]


def send_raw(world: Captured, source: str, payload: bytes) -> None:
    """Send one IPv4 packet with TCP as its protocol from the peer."""
    destination = FAMILIES[0].pod
    header = struct.pack(
        "!BBHHHBBH4s4s",
        0x45,
        0,
        20 + len(payload),
        1,
        0,
        64,
        socket.IPPROTO_TCP,
        0,
        socket.inet_aton(source),
        socket.inet_aton(destination),
    )
    raw = world.peer.run(socket.socket, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    with raw:
        raw.sendto(header + payload, (destination, 0))


def test_a_packet_from_the_wire_with_the_pods_own_source(world: Captured) -> None:
    application = world.pod.listen(FAMILIES[0].pod)
    world.enrol(PERMISSIVE)
    port = application.getsockname()[1]

    own = FAMILIES[0].pod
    send_raw(world, own, tcp_header(own, own, port, flags=0x02))

    world.wait_count("ingress_spoofed")
    assert nobody_came(application)


def test_tcp_too_short_to_be_judged(world: Captured) -> None:
    world.enrol(PERMISSIVE)

    send_raw(world, FAMILIES[0].peer, b"\x00\x01\x00\x50\x00\x00\x00\x01")

    world.wait_count("ingress_unreadable")


@each_family
@each_mode
def test_packets_from_the_wire_do_not_reach_a_delivery(
    world: Captured, family: Family, mode: Enforcement
) -> None:
    """The client's own address and port, but from outside: only the tunnel may speak there."""
    application = world.pod.listen(family.pod)
    tunnel = world.enrol(mode)
    port = application.getsockname()[1]
    delivered = tunnel.deliver(family.peer, (family.pod, port))
    accepted, seen = world.pod.accept(application)

    same = world.peer.make_socket(family.family)
    same.bind((family.peer, seen[1]))
    start_connecting(same, (family.pod, port))

    world.wait_count("ingress_delivery")
    delivered.sendall(b"still here")
    assert accepted.recv(10) == b"still here"


# --- older connections -------------------------------------------------------------------------


class Older:
    """A connection made before the enrolment, `inside` in the pod, `outside` at the peer."""

    def __init__(self, world: Captured, family: Family, direction: str) -> None:
        if direction == "inbound":
            listener = world.pod.listen(family.pod)
            self.outside = world.peer.connect(listener.getsockname()[:2])
            self.inside, _ = world.pod.accept(listener)
        else:
            listener = world.peer.listen(family.peer)
            self.inside = world.pod.connect(listener.getsockname()[:2])
            self.outside, _ = world.peer.accept(listener)
        self.port: int = self.inside.getsockname()[1]

    def lives(self) -> bool:
        self.outside.sendall(b"in")
        self.inside.sendall(b"out")
        return self.inside.recv(2) == b"in" and self.outside.recv(3) == b"out"

    def is_reset(self) -> bool:
        """Whether both ends were told."""
        inside = (errno.ECONNABORTED, errno.ECONNRESET, errno.EPIPE)
        return _fails(self.inside, *inside) and _fails(self.outside, errno.ECONNRESET)


def _fails(sock: socket.socket, *codes: int) -> bool:
    try:
        sock.recv(1)
    except OSError as error:
        return error.errno in codes
    return False


each_direction = pytest.mark.parametrize("direction", ["inbound", "outbound"])


@each_family
@each_direction
def test_strict_cuts_older_connections(world: Captured, family: Family, direction: str) -> None:
    older = Older(world, family, direction)
    assert older.lives()

    world.enrol(STRICT)

    assert older.is_reset()


@each_family
@each_direction
def test_permissive_lets_them_live_until_strict_is_in_force(
    world: Captured, family: Family, direction: str
) -> None:
    older = Older(world, family, direction)
    world.enrol(PERMISSIVE)
    assert older.lives()
    assert older.lives()

    assert world.run(world.capture.set_enforcement(world.uid, STRICT)) == 1

    assert older.is_reset()


@each_family
def test_modes_of_ports_decide_each_for_itself(world: Captured, family: Family) -> None:
    kept, cut = Older(world, family, "inbound"), Older(world, family, "inbound")

    world.enrol(Enforcement(strict_default=True, permissive_ports=frozenset({kept.port})))

    assert cut.is_reset()
    assert kept.lives()

    only = Enforcement(strict_default=False, strict_ports=frozenset({kept.port}))
    assert world.run(world.capture.set_enforcement(world.uid, only)) == 1
    assert kept.is_reset()


@each_family
@each_direction
def test_the_guard_alone_keeps_plaintext_out(
    world: Captured, family: Family, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a kernel cannot end connections, their bytes still do not pass under STRICT."""
    monkeypatch.setattr("nodeagent.capture.older.cut", lambda _own, _is_strict: Cut(0, 1))
    older = Older(world, family, direction)
    world.enrol(STRICT)

    older.outside.sendall(b"plaintext in")
    world.wait_count("ingress_older")
    older.inside.sendall(b"plaintext out")
    world.wait_count("egress_older")

    for end in (older.inside, older.outside):
        end.setblocking(False)
        with pytest.raises(BlockingIOError):
            end.recv(1)


@each_family
def test_connections_inside_the_pod_survive_enrolment(world: Captured, family: Family) -> None:
    pairs = []
    for address in (family.pod, family.loopback):
        listener = world.pod.listen(address)
        client = world.pod.connect(listener.getsockname()[:2])
        pairs.append((client, world.pod.accept(listener)[0]))

    world.enrol(STRICT)

    for client, server in pairs:
        client.sendall(b"on")
        assert server.recv(2) == b"on"


@each_family
def test_captured_connections_survive_a_change_to_strict(world: Captured, family: Family) -> None:
    tunnel = world.enrol(PERMISSIVE)
    client = world.pod.connect((family.peer, 9))
    taken = tunnel.accept("outbound")

    assert world.run(world.capture.set_enforcement(world.uid, STRICT)) == 0
    world.run(world.capture.repair(world.uid))

    client.sendall(b"on")
    assert taken.recv(2) == b"on"


@each_family
def test_time_wait_of_the_tunnels_connections_is_answered(world: Captured, family: Family) -> None:
    """The last acknowledgement of a closed connection carries the mark: nothing is dropped."""
    tunnel = world.enrol(STRICT)
    server = world.peer.listen(family.peer)
    dialled = tunnel.dial(server.getsockname()[:2])
    accepted, _ = world.peer.accept(server)

    dialled.close()
    assert accepted.recv(1) == b""
    accepted.close()

    def remaining() -> str:
        port = str(server.getsockname()[1])
        shown = world.peer.check_output("ss", "-Htan", "sport", "=", f":{port}")
        return "".join(line for line in shown.splitlines() if "LISTEN" not in line)

    wait_until(lambda: not remaining(), "the peer's side to be closed")
    assert world.count("egress_older") == 0


# --- the tunnel is gone ------------------------------------------------------------------------


@each_family
def test_without_a_tunnel_nothing_passes(world: Captured, family: Family) -> None:
    application = world.pod.listen(family.pod)
    outside = world.peer.listen(family.peer)
    tunnel = world.enrol(STRICT)
    tunnel.close()
    world.restart()  # closes the capture's own sockets, as the end of both daemons would

    inbound = world.peer.make_socket(family.family)
    start_connecting(inbound, application.getsockname()[:2])
    outbound = world.pod.make_socket(family.family)
    start_connecting(outbound, outside.getsockname()[:2])

    assert world.run(world.capture.recover())
    world.wait_count("closed_inbound")
    world.wait_count("closed_outbound")
    assert nobody_came(application)
    assert nobody_came(outside)

    # Inbound, the caller's SYN is repeated and served once there is a tunnel again.
    again = world.enrol(STRICT)
    assert plain(again.accept("inbound").getsockname()) == application.getsockname()[:2]
