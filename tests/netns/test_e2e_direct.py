"""Same node, direct: two pods of one node joined without a tunnel, through both daemons."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from nodeagent.lab import Lab
from nodeagent.lab.sniffer import Sniffer
from support.e2e import (
    HTTP_PORT,
    PODS,
    Mesh,
    authority,
    peer_authentication,
    read_all,
    reset,
    running,
    spec,
    spiffe,
    strict,
    watched,
    with_changes,
)
from support.netns import wait_until
from support.pump import exchange

FAMILIES = pytest.mark.parametrize("family", [4, 6], ids=["v4", "v6"])
SECRET = b"the quick brown fox of this very test"
DIRECT = {"same_node": "direct"}

Call = tuple[socket.socket, socket.socket, int]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(spec(settings=DIRECT)) as made:
        yield made


@pytest.fixture
def mesh(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Mesh]:
    with watched(lab, request) as made:
        yield made


@pytest.fixture
def own(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    """A lab for a test that does not leave it as it was."""
    described = spec(settings=DIRECT, pods=("client", "near", "far"), apps=False)
    with running(described) as made, watched(made, request) as found:
        yield found


@FAMILIES
def test_a_call_is_carried_and_reported_as_what_it_is(mesh: Mesh, family: int) -> None:
    address = mesh.address("near", family)
    sock, app, port = mesh.call("client", "near", family)
    mesh.carries(sock, app)
    assert sock.getpeername()[:2] == (address, port)
    assert app.getpeername()[0].removeprefix("::ffff:") == mesh.address("client", family)
    source = authority(*sock.getsockname()[:2])
    sock.close()
    assert app.recv(1) == b""
    app.close()
    for direction in ("outbound", "inbound"):
        line = mesh.line("client", direction, port)
        assert line["reason"] == "closed"
        assert line["connection_security_policy"] == "none"
        assert line["same_node"] == "direct"
        assert (line["src.identity"], line["dst.identity"]) == (spiffe("client"), spiffe("near"))
        assert line["src.addr"] == source
        assert line["dst.addr"] == authority(address, port)
        assert "dst.hbone_addr" not in line
        assert (line["bytes_recv"], line["bytes_sent"]) == (4, 4)


def test_it_is_counted_by_both_reporters(mesh: Mesh) -> None:
    known = {
        "connection_security_policy": "none",
        "source_principal": spiffe("client"),
        "destination_principal": spiffe("near"),
        "source_workload": "client",
        "destination_workload": "near",
    }
    names = ("connections_opened", "connections_closed", "received_bytes", "sent_bytes")

    def counts() -> list[float]:
        return [
            mesh.count("client", f"istio_tcp_{name}_total", reporter=reporter, **known)
            for reporter in ("source", "destination")
            for name in names
        ]

    before = counts()
    sock, app, _ = mesh.call("client", "near")
    mesh.carries(sock, app)
    sock.close()
    assert app.recv(1) == b""
    app.close()
    wait_until(
        lambda: [new - old for new, old in zip(counts(), before, strict=True)] == [1, 1, 4, 4] * 2,
        "each reporter counts one connection of 4 and 4 bytes",
    )
    assert mesh.count("client", "ztunnel_same_node_direct") == 1


@FAMILIES
def test_a_service_is_reached_by_its_name(mesh: Mesh, family: int) -> None:
    done = mesh.curl("client", f"http://near:{HTTP_PORT}/ip", f"-{family}")
    assert done.returncode == 0, done.stderr
    assert f'"{mesh.address("client", family)}"' in done.stdout
    line = mesh.line("client", "inbound", HTTP_PORT, src_addr=_client_of(mesh, family))
    assert line["dst.service"] == "near.shop.svc.cluster.local"
    assert line["same_node"] == "direct"


def _client_of(mesh: Mesh, family: int) -> str:
    """Return the client's address in the last line for HTTP of this family."""
    host = authority(mesh.address("client", family), 0).removesuffix("0")
    found = wait_until(
        lambda: [
            line["src.addr"]
            for line in mesh.lines("client", "inbound", HTTP_PORT)
            if line["src.addr"].startswith(host)
        ],
        "the call is logged",
    )
    return str(found[-1])


def test_across_nodes_nothing_changes(mesh: Mesh) -> None:
    port = mesh.visit("client", "far")
    line = mesh.line("far", "inbound", port)
    assert line["connection_security_policy"] == "mutual_tls"
    assert "same_node" not in line


def test_a_pod_outside_the_mesh_is_passed_through(mesh: Mesh) -> None:
    port = mesh.visit("client", "outsider")
    line = mesh.line("client", "outbound", port)
    assert line["connection_security_policy"] == "unknown"
    assert "same_node" not in line


@pytest.mark.parametrize("mode", ["STRICT", "PERMISSIVE"])
def test_each_mode_lets_the_identity_in(mesh: Mesh, mode: str) -> None:
    mesh.policy("near", peer_authentication(mode), mode=mode)
    port = mesh.visit("client", "near")
    line = mesh.line("client", "inbound", port)
    assert line["same_node"] == "direct"
    assert line["policy"].startswith("shop/tested (")


def test_disable_is_plaintext_without_an_identity_as_across_nodes(mesh: Mesh) -> None:
    mesh.policy("near", peer_authentication("DISABLE"), mode="DISABLE")
    port = mesh.visit("client", "near")
    for direction in ("outbound", "inbound"):
        line = mesh.line("client", direction, port)
        assert line["connection_security_policy"] == "none"
        assert "same_node" not in line
        assert "src.identity" not in line
        assert line["policy"].startswith("shop/tested (")


def test_strict_still_keeps_plaintext_out(mesh: Mesh) -> None:
    mesh.policy("near", strict(), mode="STRICT")
    listener = mesh.listen("near")
    mesh.refuses("outsider", mesh.address("near"), listener.getsockname()[1], b"secret")


# --- ends and bytes -------------------------------------------------------------------------------


def test_a_server_may_speak_first(mesh: Mesh) -> None:
    sock, app, _ = mesh.call("client", "near")
    app.sendall(b"220 ready\r\n")
    assert sock.recv(100) == b"220 ready\r\n"


@pytest.mark.parametrize("first", ["client", "server"])
def test_one_direction_may_end_first(mesh: Mesh, first: str) -> None:
    sock, app, port = mesh.call("client", "near")
    ends, goes_on = (sock, app) if first == "client" else (app, sock)
    ends.sendall(b"question")
    ends.shutdown(socket.SHUT_WR)
    assert read_all(goes_on) == b"question"
    goes_on.sendall(b"answer")
    goes_on.close()
    assert read_all(ends) == b"answer"
    assert mesh.line("client", "inbound", port)["reason"] == "closed"


@pytest.mark.parametrize("who", ["client", "server"])
def test_a_reset_arrives_as_a_reset(mesh: Mesh, who: str) -> None:
    sock, app, port = mesh.call("client", "near")
    mesh.carries(sock, app)
    near, far = (sock, app) if who == "client" else (app, sock)
    reset(near)
    with pytest.raises(ConnectionResetError):
        far.recv(1)
    for direction in ("outbound", "inbound"):
        assert mesh.line("client", direction, port)["reason"] == f"{who}_reset"


def test_a_closed_port_is_a_reset(mesh: Mesh) -> None:
    listener = mesh.listen("near")
    port = listener.getsockname()[1]
    listener.close()
    mesh.refuses("client", mesh.address("near"), port)
    for direction in ("outbound", "inbound"):
        assert mesh.line("client", direction, port)["reason"] == "connect_refused"


@FAMILIES
def test_messages_of_every_size_arrive_intact_both_ways(mesh: Mesh, family: int) -> None:
    """Small ones are copied, large ones spliced, and a full receiver makes each of them wait."""
    sock, app, port = mesh.call("client", "near", family)
    sizes = [1, 100, 16383, 16384, 16385, 65536, 1 << 20, 7, 300_000, 4 << 20, 12] * 4
    blocks = [os.urandom(size) for size in sizes]
    exchange(sock, app, blocks, blocks[::-1])
    sock.close()
    app.close()
    line = mesh.line("client", "inbound", port)
    assert line["bytes_recv"] == line["bytes_sent"] == sum(sizes)


# --- what ends it ---------------------------------------------------------------------------------


def cut(mesh: Mesh, call: Call, reason: str) -> None:
    """Assert that both applications see a reset, and both sides' logs the reason."""
    sock, app, port = call
    for side in (sock, app):
        with pytest.raises(ConnectionResetError):
            side.recv(1)
    for direction in ("outbound", "inbound"):
        assert mesh.line("client", direction, port)["reason"] == reason


@pytest.mark.parametrize("pod", ["client", "near"])
def test_either_pod_may_leave_while_it_is_busy(own: Mesh, pod: str) -> None:
    call = own.call("client", "near")
    own.carries(*call[:2])
    own.lab.enrol(PODS[pod], enrolled=False)
    cut(own, call, "pod_removed")
    wait_until(lambda: own.count("client", "ztunnel_connections") == 0, "all is given back")
    # The other goes on; nobody is joined to who is not captured.
    own.settled("node-1", lambda state: len(state["pods"]) == 1)
    sock, app, port = own.call("far", pod if pod == "client" else "client")
    own.carries(sock, app)
    assert own.count("client", "ztunnel_internal_errors_total") == 0
    assert port


def test_an_identity_that_changes_is_judged_anew(own: Mesh) -> None:
    """Another service account: what was joined to the old identity ends."""
    old = own.lab.pod(PODS["near"])
    sock, app, _ = own.call("client", "near")
    own.carries(sock, app)
    own.lab.remove_pod(PODS["near"])
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    own.settled("node-1", lambda state: len(state["pods"]) == 1)
    changed = with_changes(old.pod, service_account="usurper", addresses=old.addresses)
    own.lab.add_pod(changed)
    own.settled("node-1", lambda s: [p["state"] for p in s["pods"]] == ["Enrolled"] * 2)
    port = own.visit("client", "near")
    for direction in ("outbound", "inbound"):
        line = own.line("client", direction, port)
        assert line["dst.identity"] == spiffe("usurper")
        assert line["same_node"] == "direct"


def test_taking_the_setting_back_cuts_what_was_in_clear(own: Mesh) -> None:
    call = own.call("client", "near")
    own.carries(*call[:2])
    assert own.status("node-1")["same_node"] == "direct"
    path = own.lab.layout.settings("node-1")
    path.write_text(path.read_text().replace("same_node: direct", "same_node: hbone"))
    own.lab.node("node-1").restart("nodeagent")
    cut(own, call, "policy_changed")
    port = own.visit("client", "near")
    line = own.line("client", "inbound", port)
    assert line["connection_security_policy"] == "mutual_tls"
    assert "same_node" not in line
    assert own.status("node-1")["same_node"] == "hbone"


# --- who can see it -------------------------------------------------------------------------------


def test_nothing_of_it_is_on_a_device_that_leads_out_of_a_pod(mesh: Mesh, tmp_path: Path) -> None:
    """Readable on the loopback devices of the two pods, where applications' bytes always are."""

    def sniffer(pod: str, device: str) -> Sniffer:
        return Sniffer(mesh.space(pod), device, tmp_path / f"{pod}-{device}")

    listener = mesh.listen("near")
    with (
        sniffer("client", "eth0") as client,
        sniffer("near", "eth0") as near,
        sniffer("client", "lo") as inside,
        sniffer("near", "lo") as inside_near,
    ):
        sock, app, _ = mesh.call("client", "near", listener=listener)
        sock.sendall(SECRET)
        assert app.recv(100) == SECRET
        # What does cross the devices shows that there was time to capture it.
        witness, theirs, _ = mesh.call("client", "outsider")
        witness.sendall(b"seen on the wire")
        assert theirs.recv(100) == b"seen on the wire"
        witness, theirs, _ = mesh.call("outsider", "near")
        witness.sendall(b"seen on the wire")
        assert theirs.recv(100) == b"seen on the wire"
        for each in (client, near):
            wait_until(partial(_has, each, b"seen on the wire"), "it is captured")
            capture, dropped = each.stop()
            assert dropped == 0
            assert SECRET not in capture.raw
        for each in (inside, inside_near):
            wait_until(partial(_has, each, SECRET), "the applications' own hop is readable")


def _has(sniffer: Sniffer, words: bytes) -> bool:
    return words in sniffer.look().raw
