"""Daemons that are killed, pods that come and go, certificates that are replaced: what is promised.

Whatever ends a daemon here ends it without a word (SIGKILL).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nodeagent.lab import Lab
from nodeagent.lab.sniffer import Sniffer
from support.e2e import PODS, Mesh, running, spec, spiffe, strict, watched, with_changes
from support.netns import DEADLINE, wait_until

SECRET = b"a secret that must not be seen"
RENEWAL_SECONDS = 120.0
"""A certificate of 60 s is renewed after 40 s or so."""


@pytest.fixture(scope="module")
def shared() -> Iterator[Lab]:
    # The shortest life that the settings take, so that renewal comes soon.
    with running(spec(apps=False, settings={"svid_ttl_seconds": 60})) as made:
        yield made


@pytest.fixture
def mesh(shared: Lab, request: pytest.FixtureRequest) -> Iterator[Mesh]:
    with watched(shared, request) as made:
        yield made


@pytest.fixture
def own(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    """A mesh of the test's own, which it may break."""
    pods = ("client", "far", "outsider", "twin")
    with running(spec(apps=False, pods=pods)) as lab, watched(lab, request) as made:
        yield made


def kill(mesh: Mesh, *daemons: str) -> None:
    """Kill daemons, one after the other, and wait until each one's last thread has ended."""
    for each in daemons:
        node, _, daemon = each.partition("/")
        process = mesh.lab.node(node).process(daemon)
        # Not by its state: the first thread is a zombie while others still hold the sockets.
        watch = process.open()
        assert watch is not None
        assert process.send(signal.SIGKILL)
        assert select.select([watch], [], [], DEADLINE)[0]
        os.close(watch)


BOTH = ("node-2/nodeagent", "node-2/ztunnel")
ALL = ("node-1/nodeagent", "node-1/ztunnel", *BOTH)


def start(mesh: Mesh, *daemons: str) -> None:
    for each in daemons:
        node, _, daemon = each.partition("/")
        mesh.lab.node(node).restart(daemon, wait=False)
    for each in daemons:
        node, _, daemon = each.partition("/")
        wait_until(partial(mesh.ready, node, daemon), f"{each} is ready")


def pending(sock: socket.socket) -> bool:
    """Whether a connection neither ended nor got an answer so far."""
    return not select.select([sock], [], [], 0)[0]


# --- nodeagent is killed --------------------------------------------------------------------------


def test_killing_nodeagent_disturbs_nothing(mesh: Mesh) -> None:
    listener = mesh.listen("far")
    opened = [
        mesh.call("client", "far", listener=listener)[:2],
        mesh.call("outsider", "far", 6, listener=listener)[:2],
    ]
    kill(mesh, "node-1/nodeagent", "node-2/nodeagent")
    for sock, app in opened:
        mesh.carries(sock, app)
    for client in ("client", "outsider"):
        for family in (4, 6):
            sock, app, _ = mesh.call(client, "far", family, listener=listener)
            mesh.carries(sock, app)
            opened.append((sock, app))
    # A destination that nobody has called before is judged too.
    sock, app, _ = mesh.call("client", "near", 6)
    mesh.carries(sock, app)
    assert mesh.ready("node-1", "ztunnel")
    assert mesh.ready("node-2", "ztunnel")

    start(mesh, "node-1/nodeagent", "node-2/nodeagent")
    for node in ("node-1", "node-2"):
        pods = mesh.status(node)["pods"]
        assert pods
        assert all(pod["state"] == "Enrolled" for pod in pods)
    for sock, app in opened:
        mesh.carries(sock, app)
    # And it is in charge again.
    mesh.policy("far", strict(), mode="STRICT")
    mesh.refuses("outsider", mesh.address("far"), listener.getsockname()[1])
    mutual, plaintext = opened[0], opened[1]
    mesh.carries(*mutual)
    with pytest.raises(ConnectionResetError):
        plaintext[0].recv(1)


def listening(mesh: Mesh) -> set[str]:
    """Return the inodes of the tunnel's listening sockets in `far`."""
    shown = mesh.lab.run(PODS["far"], ["ss", "-Htlne"]).stdout
    found = {line for line in shown.splitlines() if re.search(r":1500[168] ", line)}
    assert len(found) == 3
    return {word for line in found for word in line.split() if word.startswith("ino:")}


def test_a_restarted_nodeagent_keeps_the_pods_it_finds(mesh: Mesh) -> None:
    def held() -> set[str]:
        return {pod["uid"] for pod in mesh.status("node-2")["ztunnel"]["own"]["pods"]}

    before, sockets = held(), listening(mesh)
    kill(mesh, "node-2/nodeagent")
    start(mesh, "node-2/nodeagent")
    mesh.settled("node-2", lambda _: True)
    assert held() == before
    # The listening sockets are the very same: nobody who waits in one is lost.
    assert listening(mesh) == sockets


# --- ztunnel is killed ----------------------------------------------------------------------------


@pytest.mark.parametrize("client,node", [("client", "node-1"), ("outsider", "node-2")])
def test_killing_ztunnel_refuses_no_new_connection(mesh: Mesh, client: str, node: str) -> None:
    listener = mesh.listen("far")
    port = listener.getsockname()[1]
    sock, app, _ = mesh.call(client, "far", listener=listener)
    mesh.carries(sock, app)
    kill(mesh, f"{node}/ztunnel")
    # What it carried was cut short, and neither side may take it for whole.
    for end in (sock, app):
        with pytest.raises(ConnectionResetError):
            end.recv(1)
    waiting = [mesh.connect(client, mesh.address("far", family), port) for family in (4, 6)]
    for one in waiting:
        one.sendall(b"ping")
        assert pending(one)
    assert not mesh.ready(node, "ztunnel")
    start(mesh, f"{node}/ztunnel")
    for _ in waiting:
        app, _ = mesh.accept(listener)
        assert app.recv(4) == b"ping"
        app.sendall(b"pong")
    for one in waiting:
        assert one.recv(4) == b"pong"


# --- both are killed ------------------------------------------------------------------------------


def test_with_both_killed_no_plaintext_leaks(own: Mesh, tmp_path: Path) -> None:
    mesh = own
    mesh.policy("far", strict(), mode="STRICT")
    listener = mesh.listen("far")
    port = listener.getsockname()[1]
    sock, app, _ = mesh.call("client", "far", listener=listener)
    mesh.carries(sock, app)
    with Sniffer(mesh.lab.namespace("fabric"), "node1", tmp_path / "wire") as sniffer:
        kill(mesh, *ALL)
        with contextlib.suppress(OSError):
            sock.sendall(SECRET)
        attempts = []
        for client in ("client", "outsider"):
            for family in (4, 6):
                one = mesh.open(client, family)
                one.setblocking(False)
                found = one.connect_ex((mesh.address("far", family), port))
                assert found in (errno.EINPROGRESS, errno.ECONNREFUSED)
                attempts.append(one)
        # What passes without the mesh shows that packets had time to pass.
        witness = mesh.listen("twin")
        known = mesh.connect("outsider", mesh.address("twin"), witness.getsockname()[1])
        known.sendall(b"seen on the wire")
        assert mesh.accept(witness)[0].recv(16) == b"seen on the wire"
        for one in attempts:
            # Waiting or refused, but nobody has answered.
            with pytest.raises(OSError):  # noqa: PT011 - EAGAIN, or why it was refused
                one.send(SECRET)
        wait_until(lambda: b"seen on the wire" in sniffer.look().raw, "it is captured")
        capture, dropped = sniffer.stop()
    assert dropped == 0
    assert SECRET not in capture.raw
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.accept()
    # All that the application saw of the old connection is its end.
    with pytest.raises(ConnectionResetError):
        app.recv(1)
    for one in attempts:
        one.close()

    start(mesh, *ALL)
    listener.settimeout(15)
    sock, app, _ = mesh.call("client", "far", listener=listener)
    mesh.carries(sock, app)
    mesh.refuses("outsider", mesh.address("far"), port, SECRET)
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.accept()


# --- pods come and go -----------------------------------------------------------------------------


def only_client() -> dict[str, Any]:
    """Return a policy that lets `client` call, however others are asked to prove themselves."""
    principal = spiffe("client").removeprefix("spiffe://")
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "only-client", "namespace": "shop"},
        "spec": {"rules": [{"from": [{"source": {"principals": [principal]}}]}]},
    }


@pytest.mark.parametrize("closed", [strict, only_client], ids=["STRICT", "ALLOW"])
def test_a_connection_older_than_the_enrolment_does_not_reach_a_closed_application(
    own: Mesh, closed: Callable[[], dict[str, Any]]
) -> None:
    mesh, lab = own, own.lab
    lab.enrol(PODS["far"], enrolled=False)
    mesh.settled("node-2", lambda state: state["pods"] == [])
    listener = mesh.listen("far")
    older = []
    for family in (4, 6):
        sock = mesh.connect("outsider", mesh.address("far", family), listener.getsockname()[1])
        app, _ = mesh.accept(listener)
        mesh.carries(sock, app)
        older.append((sock, app))
    mesh.apply(closed())
    lab.enrol(PODS["far"])
    mesh.settled("node-2", lambda s: [p["state"] for p in s["pods"]] == ["Enrolled"])
    for sock, app in older:
        with contextlib.suppress(OSError):
            sock.sendall(SECRET)
        # Cut inside the pod (SOCK_DESTROY); what is on its way meets a guard.
        with pytest.raises((ConnectionAbortedError, ConnectionResetError)):
            app.recv(1)
    mesh.refuses("outsider", mesh.address("far"), listener.getsockname()[1], SECRET)
    sock, app, _ = mesh.call("client", "far", listener=listener)
    mesh.carries(sock, app)


KEEPALIVE_SECONDS = 60.0
"""The tunnel asks a silent peer after 10 s and waits 20 s for the answer."""


@contextlib.contextmanager
def busy(socks: Sequence[socket.socket]) -> Iterator[None]:
    """Keep data on its way on all of them."""
    stop = threading.Event()

    def talk() -> None:
        while not stop.is_set():
            for sock in socks:
                with contextlib.suppress(OSError):
                    sock.send(bytes(10_000), socket.MSG_DONTWAIT)
            stop.wait(0.01)

    thread = threading.Thread(target=talk)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def idle(mesh: Mesh, pod: str) -> bool:
    return mesh.count(pod, "ztunnel_connections") == 0


def reset_by_peer(sock: socket.socket) -> None:
    """Wait for the end, which must be a reset (or, when it was writing, the news of one)."""
    with pytest.raises((ConnectionResetError, BrokenPipeError)):  # noqa: PT012 - at any of these
        while sock.recv(4096):
            pass
        sock.sendall(b"x")
        sock.sendall(b"x")


@pytest.mark.parametrize("how", ["released", pytest.param("removed", marks=pytest.mark.slow)])
def test_a_pod_may_go_while_it_is_busy(own: Mesh, how: str) -> None:
    """Released, its tunnel says so; a namespace that is gone cannot, and is missed."""
    mesh = own
    listener = mesh.listen("far")
    socks = [mesh.call("client", "far", listener=listener)[0] for _ in range(20)]
    with busy(socks):
        if how == "released":
            mesh.lab.enrol(PODS["far"], enrolled=False)
        else:
            mesh.lab.remove_pod(PODS["far"])
        mesh.settled("node-2", lambda state: state["pods"] == [])
        for sock in socks:
            sock.settimeout(KEEPALIVE_SECONDS)
            reset_by_peer(sock)
    for pod in ("client", "far"):
        wait_until(partial(idle, mesh, pod), "all are given back")
        assert mesh.count(pod, "ztunnel_internal_errors_total") == 0
    # The others go on.
    witness = mesh.listen("twin", 15008)
    sock = mesh.connect("client", mesh.address("twin"), 8080)
    server = mesh.hbone_server(witness)
    stream, _ = server.request()
    server.answer(stream, 200)
    server.send(stream, b"pong")
    assert sock.recv(4) == b"pong"


def test_a_pod_made_anew_under_another_identity_has_nothing_of_the_old_one(own: Mesh) -> None:
    mesh = own

    def seen() -> str:
        """The identity that `far` shows to whom it calls."""
        # A listener each time: what the tunnel dials again, when the server has gone, stays in it.
        hbone = mesh.listen("twin", 15008)
        sock = mesh.connect("far", mesh.address("twin"), 8080)
        server = mesh.hbone_server(hbone)
        hbone.close()
        server.close()
        sock.close()
        return server.tls.identity()

    sock, app, _ = mesh.call("client", "far")
    mesh.carries(sock, app)
    assert seen() == spiffe("far")
    old = mesh.lab.pod(PODS["far"])
    addresses = old.addresses
    mesh.lab.remove_pod(PODS["far"])
    mesh.settled("node-2", lambda state: state["pods"] == [])
    mesh.settled("node-1", lambda _: True)
    mesh.lab.add_pod(with_changes(old.pod, service_account="usurper", addresses=addresses))
    mesh.settled("node-2", lambda s: [p["state"] for p in s["pods"]] == ["Enrolled"])
    assert mesh.lab.addresses(PODS["far"]) == addresses
    assert seen() == spiffe("usurper")
    assert mesh.hbone("twin", "far").tls.identity() == spiffe("usurper")
    # Its callers ask for the new identity, and find it.
    listener = mesh.listen("far")
    port = mesh.visit("client", "far", listener=listener)
    assert mesh.line("client", "outbound", port)["dst.identity"] == spiffe("usurper")


def test_churn_leaves_no_generation_behind(own: Mesh) -> None:
    """One name and address, again and again, each time as somebody else: the kernel may reuse the
    namespace's inode, and the core the number of a descriptor.
    """
    mesh = own
    pins = mesh.lab.layout.bpf / "node-2"
    old = mesh.lab.pod(PODS["far"])
    before = len(list(pins.rglob("*")))
    for generation in range(5):
        mesh.lab.remove_pod(PODS["far"])
        mesh.settled("node-2", lambda state: state["pods"] == [])
        name = f"generation-{generation}"
        mesh.lab.add_pod(with_changes(old.pod, service_account=name, addresses=old.addresses))
        mesh.settled("node-2", lambda s: [p["state"] for p in s["pods"]] == ["Enrolled"])
        assert mesh.hbone("twin", "far").tls.identity() == spiffe(name)
        listener = mesh.listen("far")
        port = mesh.visit("client", "far", 6, listener=listener)
        listener.close()
        assert mesh.line("client", "outbound", port)["dst.identity"] == spiffe(name)
    assert mesh.count("far", "ztunnel_pods") == 1
    assert len(list(pins.rglob("*"))) == before


# --- certificates are replaced --------------------------------------------------------------------


class Load:
    """Connections that talk all the time, old ones and new ones, and must not miss a byte."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.listener = mesh.listen("far")
        self.long = [mesh.call("client", "far", f, listener=self.listener)[:2] for f in (4, 6) * 5]
        self.rounds = 0

    def round(self) -> None:
        for sock, app in self.long:
            self.mesh.carries(sock, app)
        for family in (4, 6):
            sock, app, _ = self.mesh.call("client", "far", family, listener=self.listener)
            self.mesh.carries(sock, app)
            sock.close()
            assert app.recv(1) == b""
            app.close()
        self.rounds += 1


def expiries(mesh: Mesh) -> tuple[float, float]:
    name = "ztunnel_svid_expiry_timestamp_seconds"
    return (
        mesh.count("client", name, identity=spiffe("client")),
        mesh.count("far", name, identity=spiffe("far")),
    )


@pytest.mark.slow
def test_renewal_under_load_loses_nothing(mesh: Mesh) -> None:
    load = Load(mesh)
    before = expiries(mesh)
    shown = mesh.hbone("twin", "far").tls.peer().serial_number

    def renewed() -> bool:
        load.round()
        now = expiries(mesh)
        return now[0] > before[0] and now[1] > before[1]

    wait_until(renewed, "both identities have new certificates", RENEWAL_SECONDS)
    for _ in range(5):
        load.round()
    assert mesh.hbone("twin", "far").tls.peer().serial_number != shown
    assert load.rounds > 10
    for line in mesh.lines("client", "outbound", load.listener.getsockname()[1]):
        assert line["reason"] == "closed"


# --- readiness ------------------------------------------------------------------------------------


def test_readiness_waits_for_the_other_daemon(own: Mesh) -> None:
    mesh = own
    node = mesh.lab.node("node-2")
    assert mesh.ready("node-2", "ztunnel")
    assert mesh.ready("node-2", "nodeagent")
    kill(mesh, *BOTH)
    node.restart("ztunnel", wait=False)

    def says() -> str:
        with contextlib.suppress(OSError):
            status, body = node.get("/healthz/ready", 15021)
            return f"{status} {body.decode()}"
        return ""

    assert "no state from nodeagent" in wait_until(says, "ztunnel answers")
    assert says().startswith("503")
    kill(mesh, "node-2/ztunnel")
    node.restart("nodeagent", wait=False)

    def unready() -> str:
        with contextlib.suppress(OSError):
            status, body = node.get("/healthz/ready", 15000)
            return f"{status} {body.decode()}"
        return ""

    answer = wait_until(unready, "nodeagent answers")
    assert answer.startswith("503")
    assert "ztunnel" in answer
    node.restart("ztunnel", wait=False)
    wait_until(lambda: mesh.ready("node-2", "ztunnel"), "ztunnel is ready")
    # Ready means that traffic passes, at the first attempt.
    sock, app, _ = mesh.call("client", "far")
    mesh.carries(sock, app)
    wait_until(lambda: mesh.ready("node-2", "nodeagent"), "nodeagent is ready")
