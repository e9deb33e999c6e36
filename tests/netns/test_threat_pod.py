"""Attacks from inside a pod, with and without capabilities, against both daemons on two nodes."""

from __future__ import annotations

import errno
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from nodeagent.lab import Lab, namespaces
from support.e2e import PODS, Mesh, peer_authentication, running, spec, spiffe
from support.netns import wait_until
from ztunnel.protocol import Mode

FAMILIES = pytest.mark.parametrize("family", [4, 6], ids=["v4", "v6"])
MARKS = pytest.mark.parametrize("mark", [0x539, 0x111, 0x53A], ids=hex)

MARK_TUNNEL: Final = 0x539
SO_MARK: Final = 36
IPPROTO_MPTCP: Final = 262
NOBODY: Final = 65534

# socket(7), ip(7), ipv6(7): what would take a socket past the capture, by option.
CLAIMS: Final = """
import socket
for name, level, option, value in (
    ("mark", socket.SOL_SOCKET, 36, 0x539),
    ("transparent", socket.IPPROTO_IP, 19, 1),
    ("transparent6", socket.IPPROTO_IPV6, 75, 1),
    ("raw", 0, 0, 0),
    ("packet", 0, 0, 0),
):
    try:
        if name == "raw":
            socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
        elif name == "packet":
            socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3)
        else:
            socket.socket(socket.AF_INET6).setsockopt(level, option, value)
    except PermissionError:
        print(name, "refused")
    else:
        print(name, "TAKEN")
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(spec(apps=False)) as made:
        yield made


@pytest.fixture
def mesh(lab: Lab) -> Iterator[Mesh]:
    with Mesh(lab) as made:
        yield made


def strict(mesh: Mesh, *pods: str) -> None:
    """Put STRICT in force for the namespace of the captured pods."""
    for pod in pods:
        mesh.policy(pod, peer_authentication("STRICT"), mode=Mode.STRICT)


def row(mesh: Mesh, pod: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = mesh.status(mesh.node_of(pod))["pods"]
    return next(each for each in found if each["workload"] == PODS[pod])


def starts_connecting(sock: socket.socket, address: tuple[object, ...]) -> None:
    """Send a SYN, and do not wait for what becomes of it."""
    sock.setblocking(False)
    assert sock.connect_ex(address) == errno.EINPROGRESS


def nobody_came(listener: socket.socket) -> bool:
    listener.setblocking(False)
    try:
        listener.accept()[0].close()
    except BlockingIOError:
        return True
    return False


# --- marks and transparent sockets ----------------------------------------------------------------


@pytest.mark.parametrize("inside", [(), ("unshare", "--user", "--keep-caps")], ids=["pod", "user"])
def test_marks_and_foreign_addresses_take_a_capability(mesh: Mesh, inside: tuple[str, ...]) -> None:
    """Uid 0 is not enough, and neither is being root of a user namespace of one's own."""
    done = mesh.run("client", *inside, sys.executable, "-c", CLAIMS)
    assert done.returncode == 0, done.stderr
    names = ("mark", "transparent", "transparent6", "raw", "packet")
    assert done.stdout.split("\n")[:-1] == [f"{name} refused" for name in names]


@FAMILIES
@MARKS
def test_a_mark_does_not_cross_the_wire(mesh: Mesh, family: int, mark: int) -> None:
    """Whoever may set marks outside the pod is still a plaintext client of it."""
    strict(mesh, "far")
    listener = mesh.listen("far")
    port = listener.getsockname()[1]
    sock = mesh.open("outsider", family)
    sock.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
    with pytest.raises(ConnectionResetError):  # noqa: PT012 - at any of these
        sock.connect((mesh.address("far", family), port))
        sock.recv(1)
    assert mesh.line("far", "inbound", port)["reason"] == "strict_requires_mtls"
    assert nobody_came(listener)


@FAMILIES
def test_a_pod_that_may_set_marks_passes_its_own_capture_only(mesh: Mesh, family: int) -> None:
    """CAP_NET_RAW: it leaves in plaintext, and the other pod's own tunnel refuses that."""
    strict(mesh, "far")
    listener = mesh.listen("far")
    port = listener.getsockname()[1]
    sock = mesh.open("client", family)
    sock.setsockopt(socket.SOL_SOCKET, SO_MARK, MARK_TUNNEL)
    with pytest.raises(ConnectionResetError):  # noqa: PT012 - at any of these
        sock.connect((mesh.address("far", family), port))
        sock.recv(1)
    line = mesh.line("far", "inbound", port)
    assert line["reason"] == "strict_requires_mtls"
    assert "src.identity" not in line
    assert not mesh.lines("client", "outbound", port)
    assert nobody_came(listener)


def test_the_mark_of_deliveries_never_leaves_a_pod(mesh: Mesh) -> None:
    def dropped() -> int:
        drops: dict[str, int] = row(mesh, "client")["drops"]
        return sum(drops.get(name, 0) for name in ("egress_bypass", "egress_delivery"))

    before = dropped()
    listener = mesh.listen("outsider")
    for family in (4, 6):
        sock = mesh.open("client", family)
        # Without the capture's routes, which would turn it back to lo.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0\0")
        sock.setsockopt(socket.SOL_SOCKET, SO_MARK, 0x111)
        address = (mesh.address("outsider", family), listener.getsockname()[1])
        starts_connecting(sock, address)
    wait_until(lambda: dropped() >= before + 2, "the guard counts both dropped SYNs")
    assert nobody_came(listener)


def test_multipath_tcp_is_captured_like_any_tcp(mesh: Mesh) -> None:
    """A socket that may open further paths of its own; without privileges (mptcp.org, RFC 8684)."""
    listener = mesh.listen("far")
    port = listener.getsockname()[1]
    sock = mesh.keep(
        namespaces.run_in(
            mesh.space("client"),
            lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP),
        )
    )
    sock.connect((mesh.address("far"), port))
    app, _ = mesh.accept(listener)
    mesh.carries(sock, app)
    sock.close()
    app.close()
    assert mesh.line("far", "inbound", port)["src.identity"] == spiffe("client")


# --- who is calling -------------------------------------------------------------------------------


@FAMILIES
def test_a_pod_is_known_by_its_listener_and_not_by_its_address(mesh: Mesh, family: int) -> None:
    """A pod with CAP_NET_ADMIN takes another's address; its identity does not come with it."""
    stolen = mesh.address("near", family)
    length = 128 if family == 6 else 32
    listener = mesh.listen("far")
    port = listener.getsockname()[1]

    def address(verb: str, *flags: str) -> None:
        argv = ["ip", f"-{family}", "address", verb, f"{stolen}/{length}", "dev", "lo", *flags]
        done = mesh.lab.run(PODS["client"], argv)
        assert done.returncode == 0, done.stderr

    # Even on lo an IPv6 address is tentative, and cannot be bound, until a work queue has run.
    address("add", *(["nodad"] if family == 6 else []))
    try:
        sock = mesh.open("client", family)
        sock.bind((stolen, 0))
        with pytest.raises(ConnectionResetError):  # noqa: PT012 - at any of these
            sock.connect((mesh.address("far", family), port))
            sock.recv(1)
        sock.close()
    finally:
        address("del")
    line = mesh.line("client", "outbound", port)
    assert line["reason"] == "foreign_source_address"
    assert line["src.workload"] == "client"
    assert nobody_came(listener)


# --- from outside ---------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("port", [15001, 15006])
def test_the_tunnels_ports_are_no_service_to_the_outside(
    mesh: Mesh, port: int, family: int
) -> None:
    """From outside they reach the plaintext listener, like any port: refused under PERMISSIVE."""
    known = len(mesh.lines("far", "inbound", port))
    mesh.refuses("outsider", mesh.address("far", family), port, b"hello")
    (line,) = wait_until(lambda: mesh.lines("far", "inbound", port)[known:], "it is logged")
    assert line["reason"] == "self_call"


@FAMILIES
def test_the_nodes_own_calls_are_plaintext_like_any_other(mesh: Mesh, family: int) -> None:
    """No exemption for probes: what reaches a STRICT pod from its own node is refused."""
    strict(mesh, "far")
    listener = mesh.listen("far")
    port = listener.getsockname()[1]
    kind = socket.AF_INET6 if family == 6 else socket.AF_INET
    node = mesh.lab.node(mesh.node_of("far"))
    sock = mesh.keep(namespaces.run_in(node.space, lambda: socket.socket(kind)))
    with pytest.raises(ConnectionResetError):  # noqa: PT012 - at any of these
        sock.connect((mesh.address("far", family), port))
        sock.recv(1)
    assert mesh.line("far", "inbound", port)["reason"] == "strict_requires_mtls"
    assert nobody_came(listener)


# --- the node's own services ----------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("port", [15000, 15020, 15021])
def test_a_pod_does_not_reach_the_daemons_ports(mesh: Mesh, port: int, family: int) -> None:
    for node in mesh.lab.nodes:
        gateway = node.plan.gateways[0 if family == 4 else 1].partition("/")[0]
        uplink = node.plan.addresses[0 if family == 4 else 1]
        for address in (gateway, uplink):
            mesh.refuses("client", address, port, b"GET /status HTTP/1.0\r\n\r\n")


def test_the_daemons_listen_on_loopback_alone(mesh: Mesh) -> None:
    for node in mesh.lab.nodes:
        shown = node.run(["ss", "-Htln"]).stdout.splitlines()
        ports = {int(line.split()[3].rpartition(":")[2]): line.split()[3] for line in shown}
        assert {15000, 15020, 15021} <= ports.keys()
        assert all(address.startswith("127.0.0.1:") for address in ports.values()), ports
        # Abstract sockets have no owner and no mode (unix(7)); those of a network namespace are
        # open to whoever is in it.
        abstract = node.run(["cat", "/proc/net/unix"]).stdout
        assert " @" not in abstract


def test_other_users_of_the_node_reach_nothing(mesh: Mesh) -> None:
    """A user without privileges, in the node's own namespaces."""
    layout = mesh.lab.layout
    secret: list[Path] = [layout.ca / "root-key.pem", layout.ca / "intermediate.pem", layout.bpf]
    for node in mesh.lab.nodes:
        run = layout.run(node.name)
        secret += [run, run / "ztunnel.sock", run / "admin.sock"]
    assert all(path.exists() for path in secret)
    program = (
        "import os, socket, sys\n"
        "for path in sys.argv[1:]:\n"
        "    for attempt in (\n"
        "        lambda: os.listdir(path),\n"
        "        lambda: open(path, 'rb'),\n"
        "        lambda: socket.socket(socket.AF_UNIX).connect(path),\n"
        "    ):\n"
        "        try:\n"
        "            attempt()\n"
        "        except PermissionError:\n"
        "            continue\n"
        "        sys.exit(f'reached {path}')\n"
    )
    done = subprocess.run(
        ["/usr/bin/python3", "-c", program, *map(str, secret)],
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_key_is_in_what_the_daemons_say(mesh: Mesh) -> None:
    sock, app, _ = mesh.call("client", "far")
    mesh.carries(sock, app)
    layout = mesh.lab.layout
    said = ""
    for node in mesh.lab.nodes:
        said += node.logs("nodeagent") + node.logs("ztunnel")
        said += layout.access_log(node.name).read_text()
        said += node.metrics("nodeagent") + node.metrics("ztunnel")
        for path in ("/status", "/config_dump", "/flows"):
            said += node.get(path, 15000)[1].decode()
    assert spiffe("far") in said
    assert "PRIVATE" not in said
    keys = (layout.ca / "root-key.pem").read_text() + (layout.ca / "intermediate.pem").read_text()
    blocks = [part.split("-----END")[0] for part in keys.split("PRIVATE KEY-----\n")[1::2]]
    assert len(blocks) == 2
    for line in "".join(blocks).splitlines():
        # The first two of a key's lines: the rest names its public half, too.
        assert line not in said


def test_loopback_stays_out_of_reach_of_the_network(mesh: Mesh) -> None:
    """net.ipv4.conf.*.route_localnet would let packets for 127/8 in from a device."""
    spaces = [mesh.space(pod) for pod in ("client", "far")]
    spaces += [node.space for node in mesh.lab.nodes]
    for space in spaces:
        values = namespaces.run_in(
            space,
            lambda: [
                path.read_text().strip()
                for path in Path("/proc/sys/net/ipv4/conf").glob("*/route_localnet")
            ],
        )
        assert values
        assert set(values) == {"0"}


# --- a pod that undoes its own capture ------------------------------------------------------------

SABOTAGE: Final = """
set -e
for family in -4 -6; do
    for preference in 98 99 100 101 102; do ip $family rule del pref $preference; done
    ip $family route flush table 100
done
tc qdisc del dev eth0 clsact
"""


def test_a_pod_that_removes_its_rules_stays_closed_and_is_repaired(mesh: Mesh) -> None:
    """With CAP_NET_ADMIN, and the sysctls as uid 0 without it."""
    strict(mesh, "near", "far")
    before = row(mesh, "near")["repaired"]
    done = mesh.run("near", "sh", "-c", "echo 2 > /proc/sys/net/ipv4/conf/all/rp_filter")
    assert done.returncode == 0, done.stderr
    done = mesh.lab.run(PODS["near"], ["sh", "-c", SABOTAGE])
    assert done.returncode == 0, done.stderr
    # Its own way out is its own harm; what comes in still meets its tunnel, and the other pod's
    # tunnel refuses what left in plaintext.
    port = mesh.listen("near").getsockname()[1]
    mesh.refuses("outsider", mesh.address("near"), port)
    out = mesh.listen("far")
    with pytest.raises(OSError):  # noqa: PT011, PT012 - a reset, or no way back
        escaped = mesh.open("near")
        escaped.settimeout(1)
        escaped.connect((mesh.address("far"), out.getsockname()[1]))
        escaped.recv(1)
    assert nobody_came(out)

    wait_until(lambda: row(mesh, "near")["repaired"] > before, "an audit puts it right")
    wait_until(lambda: row(mesh, "near")["state"] == "Enrolled", "the pod is whole again")
    port = mesh.visit("near", "far")
    assert mesh.line("near", "outbound", port)["connection_security_policy"] == "mutual_tls"


def test_a_pod_that_destroys_the_tunnels_listeners_is_repaired(mesh: Mesh) -> None:
    """SOCK_DESTROY (sock_diag(7)) from inside, with CAP_NET_ADMIN."""
    strict(mesh, "near")
    before = row(mesh, "near")["repaired"]
    destroy = "ss -K state listening '( sport = :15001 or sport = :15006 or sport = :15008 )'"
    done = mesh.lab.run(PODS["near"], ["sh", "-c", destroy])
    assert done.returncode == 0, done.stderr
    wait_until(lambda: row(mesh, "near")["repaired"] > before, "an audit opens them anew")
    sock, app, port = mesh.call("client", "near")
    mesh.carries(sock, app)
    mesh.refuses("outsider", mesh.address("near"), port)
