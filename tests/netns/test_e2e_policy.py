"""PeerAuthentication in force: who is let in, what an edit does, and what a bad one does not."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from nodeagent.lab import Lab
from support.e2e import (
    Mesh,
    authority,
    in_the_clear,
    peer_authentication,
    running,
    spec,
    spiffe,
    strict,
    watched,
)
from support.netns import wait_until

CALLS = 10
"""After each change, at least."""

FAMILIES = pytest.mark.parametrize("family", [4, 6], ids=["v4", "v6"])


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(spec(apps=False)) as made:
        yield made


@pytest.fixture
def mesh(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Mesh]:
    with watched(lab, request) as made:
        yield made


def accepts(mesh: Mesh, client: str, listener: socket.socket, family: int = 4) -> None:
    mesh.visit(client, "far", family, listener=listener)


def refuses(mesh: Mesh, client: str, listener: socket.socket, family: int = 4) -> None:
    """A reset for the client, and nothing at all for the application."""
    mesh.refuses(client, mesh.address("far", family), listener.getsockname()[1], b"secret")
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.accept()
    listener.settimeout(15)


@FAMILIES
def test_permissive_accepts_both(mesh: Mesh, family: int) -> None:
    mesh.policy("far", peer_authentication("PERMISSIVE"), mode="PERMISSIVE")
    listener = mesh.listen("far")
    for client in ("client", "outsider", "legacy"):
        accepts(mesh, client, listener, family)
    port = listener.getsockname()[1]
    for client, security in (("client", "mutual_tls"), ("legacy", "none")):
        line = mesh.line("far", "inbound", port, src_workload=client)
        assert line["connection_security_policy"] == security
        assert line["policy"].startswith("shop/tested (")


@FAMILIES
def test_strict_accepts_mutual_tls_only(mesh: Mesh, family: int) -> None:
    mesh.policy("far", strict(), mode="STRICT")
    listener = mesh.listen("far")
    port = listener.getsockname()[1]
    denied: dict[str, str] = {
        "reporter": "destination",
        "destination_workload": "far",
        "response_flags": "DENY",
        "connection_security_policy": "none",
    }
    before = mesh.count("far", "istio_tcp_connections_failed_total", **denied)
    refuses(mesh, "outsider", listener, family)
    refuses(mesh, "legacy", listener, family)
    accepts(mesh, "client", listener, family)
    line = mesh.line("far", "inbound", port, src_workload="legacy")
    assert line["reason"] == "strict_requires_mtls"
    assert "STRICT" in line["error"]
    assert line["policy"].startswith("shop/strict-all (")
    assert (line["bytes_recv"], line["bytes_sent"]) == (0, 0)
    mesh.counted("far", "istio_tcp_connections_failed_total", before + 2, **denied)
    opened = mesh.line("far", "inbound", port, reason="closed")
    assert opened["src.identity"] == spiffe("client")


def disabled(mesh: Mesh, *documents: dict[str, Any]) -> None:
    """Put a DISABLE for `far` in force on its node, and on that of its caller."""
    mesh.apply(*documents)
    for node in ("node-1", "node-2"):
        mesh.settled(node, in_the_clear)


@FAMILIES
def test_disable_is_called_in_plaintext_and_takes_what_comes(mesh: Mesh, family: int) -> None:
    disabled(mesh, peer_authentication("DISABLE"))
    listener = mesh.listen("far")
    port = listener.getsockname()[1]
    for client in ("client", "outsider"):
        accepts(mesh, client, listener, family)
    for direction, pod in (("outbound", "client"), ("inbound", "far")):
        line = mesh.line(pod, direction, port, src_workload="client")
        assert line["connection_security_policy"] == "none"
        assert "src.identity" not in line
        assert "dst.hbone_addr" not in line
        assert line["policy"].startswith("shop/tested (")
    # Who does not know the mode comes by HBONE, and is taken at its proven word.
    twin = mesh.hbone("twin", "far", family=family)
    stream = twin.connect(authority(mesh.address("far", family), port))
    assert twin.status(stream) == 200
    app, _ = mesh.accept(listener)
    twin.send(stream, b"", end=True)
    app.close()
    line = mesh.line("far", "inbound", port, src_identity=spiffe("twin"))
    assert line["connection_security_policy"] == "mutual_tls"


def test_disable_of_a_port_is_for_that_port_only(mesh: Mesh) -> None:
    clear, kept = mesh.listen("far"), mesh.listen("far")
    ports = {clear.getsockname()[1]: "DISABLE"}
    disabled(mesh, peer_authentication("STRICT", app="far", ports=ports))
    for listener, security in ((clear, "none"), (kept, "mutual_tls")):
        accepts(mesh, "client", listener)
        line = mesh.line("far", "inbound", listener.getsockname()[1])
        assert line["connection_security_policy"] == security
    accepts(mesh, "outsider", clear)
    refuses(mesh, "outsider", kept)


def test_no_call_is_lost_between_disable_and_permissive(mesh: Mesh) -> None:
    """Whichever node hears of the change first: both take what the other sends."""
    listener = mesh.listen("far")
    stop = threading.Event()
    answered: list[float] = []
    failed: list[Exception] = []

    def caller() -> None:
        try:
            while not stop.is_set():
                accepts(mesh, "client", listener)
                answered.append(time.monotonic())
        except (OSError, AssertionError) as error:
            failed.append(error)

    def more(before: int) -> bool:
        return bool(failed) or len(answered) > before + CALLS

    thread = threading.Thread(target=caller)
    thread.start()
    try:
        for mode in ("DISABLE", "PERMISSIVE") * 3:
            mesh.policy("far", peer_authentication(mode), mode=mode)
            wait_until(partial(more, len(answered)), "calls go on")
    finally:
        stop.set()
        thread.join()
    assert not failed
    lines = mesh.lines("far", "inbound", listener.getsockname()[1])
    assert {line["connection_security_policy"] for line in lines} == {"mutual_tls", "none"}
    assert {line["reason"] for line in lines} == {"closed"}


def test_disable_that_is_taken_back_is_mutual_tls_again(mesh: Mesh) -> None:
    disabled(mesh, peer_authentication("DISABLE"))
    sock, app, port = mesh.call("client", "far")
    mesh.carries(sock, app)
    mesh.apply(strict())
    for node in ("node-1", "node-2"):
        mesh.settled(node, lambda state: not in_the_clear(state))
    # STRICT cuts what came without an identity, and the next call brings one.
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    assert mesh.line("far", "inbound", port)["reason"] == "policy_changed"
    listener = mesh.listen("far")
    accepts(mesh, "client", listener)
    line = mesh.line("far", "inbound", listener.getsockname()[1])
    assert line["src.identity"] == spiffe("client")


def test_a_ports_mode_wins_over_the_workloads(mesh: Mesh) -> None:
    open_port, closed_port = mesh.listen("far"), mesh.listen("far")
    ports = {open_port.getsockname()[1]: "PERMISSIVE"}
    mesh.policy("far", peer_authentication("STRICT", app="far", ports=ports), mode="STRICT")
    accepts(mesh, "outsider", open_port)
    refuses(mesh, "outsider", closed_port)
    ports = {closed_port.getsockname()[1]: "STRICT"}
    mesh.policy("far", peer_authentication("PERMISSIVE", app="far", ports=ports), mode="PERMISSIVE")
    accepts(mesh, "outsider", open_port)
    refuses(mesh, "outsider", closed_port)
    accepts(mesh, "client", closed_port)


def test_the_narrowest_level_wins(mesh: Mesh) -> None:
    mesh.policy(
        "far",
        peer_authentication("STRICT", name="mesh", namespace="istio-system"),
        mode="STRICT",
        name="level-mesh",
    )
    listener = mesh.listen("far")
    refuses(mesh, "outsider", listener)
    mesh.policy("far", peer_authentication("PERMISSIVE"), mode="PERMISSIVE", name="level-namespace")
    accepts(mesh, "outsider", listener)
    mesh.policy("far", strict("far"), mode="STRICT", name="level-workload")
    refuses(mesh, "outsider", listener)
    # Its neighbour has the namespace's mode still.
    near = mesh.listen("near")
    sock = mesh.connect("outsider", mesh.address("near"), near.getsockname()[1])
    mesh.carries(sock, mesh.accept(near)[0])


def test_an_edit_is_live_without_a_restart(mesh: Mesh, lab: Lab) -> None:
    daemons = {name: one.pid for name, one in lab.state.processes.items()}
    listener = mesh.listen("far")
    address, port = mesh.address("far"), listener.getsockname()[1]

    def let_in() -> bool:
        try:
            sock = mesh.connect("outsider", address, port)
            sock.sendall(b"?")
            listener.settimeout(0.05)
            app, _ = mesh.accept(listener)
            app.sendall(b"!")
            return sock.recv(1) == b"!"
        except (ConnectionResetError, TimeoutError):
            return False

    assert let_in()
    for _ in range(2):
        mesh.apply(strict())
        wait_until(lambda: not let_in(), "STRICT is in force")
        mesh.withdraw()
        wait_until(let_in, "plaintext is accepted again")
    assert {name: one.pid for name, one in lab.state.processes.items()} == daemons


def test_what_is_no_longer_allowed_is_cut_and_nothing_else(mesh: Mesh) -> None:
    before = mesh.count("far", "ztunnel_connections_cut_total")
    plaintext, plaintext_app, port = mesh.call("outsider", "far")
    mutual, mutual_app, _ = mesh.call("client", "far")
    mesh.carries(plaintext, plaintext_app)
    mesh.carries(mutual, mutual_app)
    mesh.apply(strict())
    for sock in (plaintext, plaintext_app):
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    mesh.carries(mutual, mutual_app)
    assert mesh.line("far", "inbound", port)["reason"] == "policy_changed"
    mesh.counted("far", "ztunnel_connections_cut_total", before + 1)


HEAD = "apiVersion: security.istio.io/v1\nkind: {}\nmetadata: {{name: tested, namespace: shop}}\n"

# Text, line, field, and a word of the reason.
BAD: dict[str, tuple[str, int, str, str]] = {
    "not YAML": ("a: [1\n", 2, "", ""),
    "wrong mode": (
        HEAD.format("PeerAuthentication") + "spec:\n  mtls:\n    mode: STRIKT\n",
        *(6, "spec.mtls.mode", "STRIKT"),
    ),
    "unknown field": (
        HEAD.format("PeerAuthentication") + "spec:\n  mtlss: {mode: STRICT}\n",
        *(5, "spec.mtlss", ""),
    ),
    "action that nobody enforces": (
        HEAD.format("AuthorizationPolicy") + "spec:\n  action: CUSTOM\n",
        *(5, "spec.action", "CUSTOM"),
    ),
    "kind that nobody enforces": (
        HEAD.format("RequestAuthentication") + "spec: {}\n",
        *(2, "kind", "RequestAuthentication"),
    ),
}


@pytest.mark.parametrize("why", BAD)
def test_a_bad_document_is_refused_with_its_place_and_the_last_good_stays(
    mesh: Mesh, lab: Lab, why: str
) -> None:
    mesh.policy("far", strict(), mode="STRICT")
    listener = mesh.listen("far")
    text, line, field, word = BAD[why]
    path = mesh.apply(text)

    def problems() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = mesh.status("node-2")["config"]["problems"]
        return found

    (problem,) = wait_until(problems, "the document is refused")
    assert (problem["file"], problem["line"]) == (str(path), line)
    assert problem["field"] == field
    assert word in problem["reason"]
    refuses(mesh, "outsider", listener)
    accepts(mesh, "client", listener)
    shown = lab.node("node-2").logs("nodeagent")
    assert f"{path}:{line}" in shown or f'"{path}"' in shown
    mesh.policy("far", peer_authentication("PERMISSIVE"), mode="PERMISSIVE")
    assert problems() == []
    accepts(mesh, "outsider", listener)


# --- what dashboards read -------------------------------------------------------------------------


COMMON = {"request_protocol": "tcp", "response_flags": "-"}
SOURCE = {
    "source_workload": "client",
    "source_workload_namespace": "shop",
    "source_canonical_service": "client",
    "source_canonical_revision": "v1",
    "source_app": "client",
    "source_version": "v1",
    "source_cluster": "Kubernetes",
    "source_principal": spiffe("client"),
    "source_region": "lab",
    "source_zone": "a",
}
DESTINATION = {
    "destination_workload": "far",
    "destination_workload_namespace": "shop",
    "destination_canonical_service": "far",
    "destination_canonical_revision": "v1",
    "destination_app": "far",
    "destination_version": "v1",
    "destination_cluster": "Kubernetes",
    "destination_principal": spiffe("far"),
    "destination_region": "lab",
    "destination_zone": "b",
    "destination_service": "far.shop.svc.cluster.local",
    "destination_service_name": "far",
    "destination_service_namespace": "shop",
}


def unknown(labels: dict[str, str]) -> dict[str, str]:
    return dict.fromkeys(labels, "unknown")


METRICS = ("connections_opened", "connections_closed", "received_bytes", "sent_bytes")


def counters(mesh: Mesh, pod: str, labels: dict[str, str]) -> list[float]:
    return [mesh.count(pod, f"istio_tcp_{name}_total", **labels) for name in METRICS]


def counted_once(
    mesh: Mesh, series: list[tuple[str, dict[str, str]]], call: Callable[[], object]
) -> None:
    before = [counters(mesh, *each) for each in series]
    call()

    def moved() -> bool:
        after = [counters(mesh, *each) for each in series]
        grown = [
            [new - old for new, old in zip(*pair, strict=True)]
            for pair in zip(after, before, strict=True)
        ]
        return grown == [[1, 1, 7, 3]] * len(series)

    wait_until(moved, f"each of {series} counts one connection of 7 and 3 bytes")


def one_call(mesh: Mesh, client: str, listener: socket.socket, address: str, port: int) -> None:
    sock = mesh.connect(client, address, port)
    app, _ = mesh.accept(listener)
    sock.sendall(b"7 bytes")
    assert app.recv(7) == b"7 bytes"
    app.sendall(b"thr")
    assert sock.recv(3) == b"thr"
    sock.close()
    assert app.recv(1) == b""
    app.close()


@FAMILIES
def test_a_mutual_tls_call_is_counted_by_both_reporters(mesh: Mesh, family: int) -> None:
    labels = COMMON | SOURCE | DESTINATION | {"connection_security_policy": "mutual_tls"}
    listener = mesh.listen("far", 8080)
    counted_once(
        mesh,
        [
            ("client", labels | {"reporter": "source"}),
            ("far", labels | {"reporter": "destination"}),
        ],
        lambda: one_call(mesh, "client", listener, mesh.vip("far", family), 80),
    )


def test_a_plaintext_call_from_outside_is_counted_by_the_destination(mesh: Mesh) -> None:
    labels = COMMON | unknown(SOURCE) | DESTINATION
    labels |= {"destination_principal": "unknown", "connection_security_policy": "none"}
    listener = mesh.listen("far", 8080)
    counted_once(
        mesh,
        [("far", labels | {"reporter": "destination"})],
        lambda: one_call(mesh, "outsider", listener, mesh.address("far"), 8080),
    )


def test_a_call_to_a_workload_without_an_agent_is_counted_as_plaintext(mesh: Mesh) -> None:
    labels = COMMON | SOURCE | {"source_principal": "unknown"}
    labels |= {"destination_workload": "legacy", "destination_principal": "unknown"}
    labels |= {"connection_security_policy": "none", "reporter": "source"}
    listener = mesh.listen("legacy")
    counted_once(
        mesh,
        [("client", labels)],
        lambda: one_call(
            mesh, "client", listener, mesh.address("legacy"), listener.getsockname()[1]
        ),
    )


def test_a_call_out_of_the_mesh_is_counted_as_unknown(mesh: Mesh) -> None:
    labels = COMMON | SOURCE | {"source_principal": "unknown"} | unknown(DESTINATION)
    labels |= {"connection_security_policy": "unknown", "reporter": "source"}
    listener = mesh.listen("outsider")
    counted_once(
        mesh,
        [("client", labels)],
        lambda: one_call(
            mesh, "client", listener, mesh.address("outsider"), listener.getsockname()[1]
        ),
    )
