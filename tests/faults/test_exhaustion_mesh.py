"""Limits of a pod through both daemons: neighbours go on, log and metrics say why."""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator

import pytest

from nodeagent.lab import Lab
from support.e2e import Mesh, running, spec, watched
from support.netns import wait_until

LIMIT = 20
LINES = 5
STORM = 40


@pytest.fixture(scope="module")
def limited() -> Iterator[Lab]:
    settings = {"limits": {"connections": LIMIT, "failure_lines": LINES}}
    with running(spec(settings=settings, apps=False)) as made:
        yield made


@pytest.fixture
def mesh(limited: Lab, request: pytest.FixtureRequest) -> Iterator[Mesh]:
    with watched(limited, request) as made:
        yield made


def attempt(mesh: Mesh, pod: str, address: str, port: int) -> socket.socket | None:
    """Connect; None when the reset of a refusal was quicker than the answer of connect()."""
    sock = mesh.open(pod)
    try:
        sock.connect((address, port))
    except ConnectionResetError:
        return None
    return sock


def turned_away(sock: socket.socket | None) -> bool:
    """Say whether a connection has been reset, or is now."""
    if sock is None:
        return True
    try:
        return not sock.recv(1)
    except ConnectionResetError:
        return True


def test_a_greedy_pod_meets_its_limit_and_its_neighbour_goes_on(mesh: Mesh) -> None:
    far, near = mesh.listen("far"), mesh.listen("near")
    port = far.getsockname()[1]
    # Half of them to each server, for a server's pod has the same limit.
    targets = ((far, mesh.address("far")), (near, mesh.address("near")))
    mine = []
    for number in range(LIMIT):
        listener, address = targets[number % 2]
        mine.append(mesh.connect("client", address, listener.getsockname()[1]))
        mesh.carries(mine[-1], mesh.accept(listener)[0])
    mesh.counted("client", "ztunnel_pod_connections", LIMIT, pod="shop/client")

    for _ in range(STORM):
        assert turned_away(attempt(mesh, "client", mesh.address("far"), port))
    wanted = {"pod": "shop/client", "reason": "pod_connection_limit"}
    assert mesh.count("client", "ztunnel_pod_refusals_total", **wanted) == STORM
    # The neighbour on the same node, through the same tunnel; and those that were there before.
    mesh.carries(*mesh.call("near", "far", listener=far)[:2])

    def summary() -> list[str]:
        errors = [line.get("error", "") for line in mesh.lines("client", "outbound", port)]
        return [error for error in errors if "left out" in error]

    (said,) = wait_until(summary, "what was left out of the log is said", 30)
    assert f"[{STORM - LINES - 1} more lines of this kind were left out]" in said
    refused = mesh.lines("client", "outbound", port, reason="pod_connection_limit")
    assert len(refused) == LINES + 1
    assert mesh.count("client", "ztunnel_access_log_left_out_total") == STORM - LINES - 1

    mesh.close()
    wait_until(
        lambda: mesh.count("client", "ztunnel_pod_connections", pod="shop/client") == 0,
        "all have ended",
    )
    with mesh:
        mesh.carries(*mesh.call("client", "far")[:2])


def test_a_tunnel_says_at_its_start_how_many_connections_it_can_have(mesh: Mesh) -> None:
    (said,) = [
        line
        for line in mesh.lab.node("node-1").logs("ztunnel").splitlines()
        if "starting" in line and "connections" in line
    ]
    assert "descriptors" in said
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Less its reserve and the pods'.
    assert hard - 1000 < mesh.count("client", "ztunnel_descriptors_limit") < hard


def test_a_tunnel_without_descriptors_keeps_what_it_has_and_recovers(mesh: Mesh) -> None:
    """The whole process runs out while it serves: not even a closed one's number may be used."""
    node = mesh.lab.node("node-1")
    pid = node.process("ztunnel").pid
    listener = mesh.listen("far", backlog=512)
    port = listener.getsockname()[1]
    kept, served, _ = mesh.call("near", "far", listener=listener)
    mesh.carries(kept, served)
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        waiting = [attempt(mesh, "client", mesh.address("far"), port) for _ in range(5)]
        mesh.carries(kept, served)
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    # They waited in the kernel, and are served now, in whatever order.
    for number, sock in enumerate(waiting):
        assert sock is not None
        sock.sendall(b"%d" % number)
    said = {mesh.accept(listener)[0].recv(1) for _ in waiting}
    assert said == {b"%d" % number for number in range(len(waiting))}
    assert node.process("ztunnel").pid == pid
    assert mesh.ready("node-1")
