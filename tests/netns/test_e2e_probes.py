"""The node's own calls into its pods, such as the kubelet's probes; pods that leave while busy."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from functools import partial

import pytest

from nodeagent.lab import Lab, namespaces
from support.e2e import PODS, Mesh, running, spec, spiffe, strict, watched, with_changes
from support.netns import wait_until


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    # Whoever waited for the keepalive would wait for longer than a test does.
    deadlines = {"ping_suspect": 1, "ping_interval": 120, "ping_answer": 120}
    settings = {"node_plaintext": True, "deadlines": deadlines}
    with running(spec(apps=False, pods=("client", "far", "outsider"), settings=settings)) as made:
        yield made


@pytest.fixture
def mesh(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Mesh]:
    with watched(lab, request) as made:
        yield made


def from_node(mesh: Mesh, node: str, address: str, port: int) -> socket.socket:
    """Connect as the kubelet does: from the node's own namespace."""
    sock = mesh.keep(namespaces.run_in(mesh.lab.node(node).space, socket.socket))
    sock.connect((address, port))
    return sock


def enrolled(mesh: Mesh) -> None:
    """Wait for the capture: what an application did before it has nothing to do with the tunnel."""
    mesh.settled("node-2", lambda state: [pod["state"] for pod in state["pods"]] == ["Enrolled"])


def made_anew(mesh: Mesh, account: str) -> None:
    """Put another pod in the place of `far`: its name and addresses, another identity."""
    old = mesh.lab.pod(PODS["far"])
    mesh.lab.remove_pod(PODS["far"])
    mesh.lab.add_pod(with_changes(old.pod, service_account=account, addresses=old.addresses))
    enrolled(mesh)


def test_the_setting_lets_the_node_in_and_nobody_else(mesh: Mesh) -> None:
    mesh.policy("far", strict(), mode="STRICT")
    listener = mesh.listen("far")
    port = listener.getsockname()[1]
    sock = from_node(mesh, "node-2", mesh.address("far"), port)
    app, source = mesh.accept(listener)
    mesh.carries(sock, app)
    sock.close()
    app.close()
    line = mesh.line("far", "inbound", port)
    assert line["src.addr"].rpartition(":")[0] == source
    assert line["connection_security_policy"] == "none"
    assert line["policy"] == "settings (node_plaintext)"
    assert "src.identity" not in line
    mesh.refuses("outsider", mesh.address("far"), port, b"secret")


def test_callers_of_a_pod_that_has_gone_are_told_before_the_keepalive(mesh: Mesh) -> None:
    """Its namespace is gone at once: nothing answers, and no reset comes either."""
    sock, app, _ = mesh.call("client", "far")
    mesh.carries(sock, app)
    old = mesh.lab.pod(PODS["far"])
    mesh.lab.remove_pod(PODS["far"])
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    mesh.lab.add_pod(with_changes(old.pod, addresses=old.addresses))
    enrolled(mesh)


def test_an_address_that_becomes_anothers_is_never_taken_for_the_old_one(mesh: Mesh) -> None:
    """A caller keeps calling while the pod behind the address is made anew as somebody else.

    Under STRICT: while its own node knows nobody at the address, a caller's plaintext goes there as
    to the outside, and is refused.

    Each application answers with the identity that it has; the caller's tunnel must have proved
    exactly that one, in the order in which they were there, and none after it had gone.
    """
    mesh.policy("far", strict(), mode="STRICT")
    port = 19999
    seen: list[str] = []

    def answered(listener: socket.socket, name: str) -> bool:
        sock = mesh.open("client")
        listener.settimeout(0.5)
        try:
            sock.connect((mesh.address("far"), port))
            app, _ = mesh.accept(listener)
        except OSError:
            return False
        app.sendall(name.encode())
        app.close()
        seen.append(sock.recv(100).decode())
        sock.close()
        return True

    names = ["first", "second", "third"]
    for name in names:
        made_anew(mesh, name)
        listener = mesh.listen("far", port)
        wait_until(partial(answered, listener, name), f"{name} answers")
        listener.close()
    assert seen == names

    def carried() -> list[str]:
        lines = mesh.lines("client", "outbound", port, reason="closed")
        return [line["dst.identity"] for line in lines if line["bytes_sent"]]

    wait_until(lambda: len(carried()) == len(names), "the lines of all three")
    assert carried() == [spiffe(name) for name in names]
