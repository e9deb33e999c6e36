"""The graph of a node by real traffic: each connection once, whoever has told of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import msgspec
import pytest
from click.testing import CliRunner

from nodeagent.cli import cli
from nodeagent.lab import Lab
from nodeagent.observe.graph_model import OUTSIDE, Connections, Edge, Graph, Padlock, Reporter
from support.e2e import (
    Mesh,
    in_the_clear,
    peer_authentication,
    running,
    spec,
    spiffe,
    strict,
    watched,
)
from support.netns import wait_until

pytestmark = pytest.mark.netns

CLIENT, NEAR, FAR = "shop/client", "shop/near", "shop/far"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(spec(apps=False)) as made:
        yield made


@pytest.fixture
def mesh(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Mesh]:
    with watched(lab, request) as made:
        yield made


def edges(mesh: Mesh, node: str, port: int) -> list[Edge]:
    status, body = mesh.lab.node(node).get("/graph?seconds=3600", 15000)
    assert status == 200
    found = msgspec.json.decode(body, type=Graph)
    return [edge for edge in found.edges if edge.port == port]


def edge(mesh: Mesh, node: str, port: int, source: str, done: Callable[[Edge], bool]) -> Edge:
    """Wait for the edge that is as `done` says."""

    def look() -> list[Edge]:
        return [each for each in edges(mesh, node, port) if each.source == source and done(each)]

    (found,) = wait_until(look, f"an edge from {source} to port {port} on {node}")
    return found


def test_between_two_pods_of_a_node_each_connection_is_counted_once(mesh: Mesh) -> None:
    listener = mesh.listen("near")
    port: int = listener.getsockname()[1]
    for _ in range(3):
        mesh.visit("client", "near", listener=listener)
    found = edge(mesh, "node-1", port, CLIENT, lambda each: each.connections.total >= 3)
    assert found.connections == Connections(mutual_tls=3)
    assert (found.destination, found.padlock, found.protected_share) == (NEAR, Padlock.ALL, 1)
    assert (found.bytes_sent, found.bytes_received) == (12, 12)
    assert (found.source_identity, found.destination_identity) == (spiffe("client"), spiffe("near"))
    assert found.reporter is Reporter.DESTINATION


def test_between_two_nodes_each_tells_its_own_side(mesh: Mesh) -> None:
    listener = mesh.listen("far")
    port: int = listener.getsockname()[1]
    for _ in range(2):
        mesh.visit("client", "far", listener=listener)
    for node, reporter in (("node-1", Reporter.SOURCE), ("node-2", Reporter.DESTINATION)):
        found = edge(mesh, node, port, CLIENT, lambda each: each.connections.total >= 2)
        assert found.connections == Connections(mutual_tls=2)
        assert (found.destination, found.reporter) == (FAR, reporter)
        assert (found.bytes_sent, found.bytes_received) == (8, 8)


def test_one_caller_in_plaintext_unlocks_its_own_edge_only(mesh: Mesh) -> None:
    listener = mesh.listen("near")
    port: int = listener.getsockname()[1]
    for caller in ("client", "outsider"):
        mesh.visit(caller, "near", listener=listener)
    outside = edge(mesh, "node-1", port, OUTSIDE, lambda each: each.connections.total >= 1)
    assert (outside.padlock, outside.addresses) == (Padlock.NONE, (mesh.address("outsider"),))
    assert edge(mesh, "node-1", port, CLIENT, lambda _: True).padlock is Padlock.ALL


def test_what_is_refused_has_its_reason_and_locks_nothing(mesh: Mesh) -> None:
    mesh.policy("near", strict(), mode="STRICT")
    listener = mesh.listen("near")
    port: int = listener.getsockname()[1]
    for _ in range(2):
        mesh.refuses("outsider", mesh.address("near"), port)
    found = edge(mesh, "node-1", port, OUTSIDE, lambda each: each.refused >= 2)
    assert (found.padlock, found.reasons) == (Padlock.NO_DATA, {"strict_requires_mtls": 2})
    assert any("strict-all" in policy for policy in found.policies)


def test_a_refusal_on_another_node_is_one_on_both(mesh: Mesh) -> None:
    listener = mesh.listen("far")
    port: int = listener.getsockname()[1]
    deny = {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "deny-client", "namespace": "shop"},
        "spec": {
            "action": "DENY",
            "rules": [{"from": [{"source": {"principals": ["cluster.local/ns/shop/sa/client"]}}]}],
        },
    }
    mesh.apply(deny)
    mesh.settled("node-2", lambda state: "deny-client" in json.dumps(state["pods"]))
    mesh.refuses("client", mesh.address("far"), port, b"?")
    for node, reason in (("node-1", "denied_by_peer"), ("node-2", "policy_denied")):
        found = edge(mesh, node, port, CLIENT, lambda each: each.refused >= 1)
        assert (found.refused, found.failed, found.reasons) == (1, 0, {reason: 1})
        assert found.padlock is Padlock.NO_DATA


def test_nobody_listening_is_a_failure_and_counted_once(mesh: Mesh) -> None:
    mesh.refuses("client", mesh.address("near"), 9998, b"?")
    found = edge(mesh, "node-1", 9998, CLIENT, lambda each: each.failed >= 1)
    assert (found.failed, found.refused, found.reasons) == (1, 0, {"connect_refused": 1})
    assert found.reporter is Reporter.DESTINATION


def test_a_peer_without_an_agent_is_a_failure_that_the_caller_tells(mesh: Mesh) -> None:
    """Twin is said to speak HBONE, and nobody does there."""
    mesh.refuses("client", mesh.address("twin"), 9999, b"?")
    found = edge(mesh, "node-1", 9999, CLIENT, lambda each: each.failed >= 1)
    assert (found.destination, found.reporter) == ("shop/twin", Reporter.SOURCE)
    assert found.reasons == {"connect_refused": 1}


def test_plaintext_to_who_asks_for_it_is_seen_by_both_nodes(mesh: Mesh) -> None:
    mesh.apply(peer_authentication("DISABLE"))
    for node in ("node-1", "node-2"):
        mesh.settled(node, in_the_clear)
    port = mesh.visit("client", "far")
    for node in ("node-1", "node-2"):
        found = edge(mesh, node, port, CLIENT, lambda each: each.connections.total >= 1)
        assert (found.connections, found.padlock) == (Connections(plaintext=1), Padlock.NONE)
        assert (found.source_identity, found.destination_identity) == ("", "")


def test_what_was_open_before_is_in_a_later_window(mesh: Mesh, lab: Lab) -> None:
    sock, app, port = mesh.call("client", "near")
    mesh.carries(sock, app)
    edge(mesh, "node-1", port, CLIENT, lambda each: each.connections.total == 1)
    # One that began before nodeagent did.
    lab.node("node-1").restart("nodeagent")
    wait_until(lambda: mesh.ready("node-1", "nodeagent"), "nodeagent is back")
    mesh.carries(sock, app)
    found = edge(mesh, "node-1", port, CLIENT, lambda each: each.bytes_sent == 8)
    assert found.connections == Connections(mutual_tls=1)


def test_the_command_shows_it_and_answers_a_script(mesh: Mesh) -> None:
    listener = mesh.listen("near")
    port: int = listener.getsockname()[1]
    mesh.visit("outsider", "near", listener=listener)
    edge(mesh, "node-1", port, OUTSIDE, lambda each: each.connections.total >= 1)
    run = str(mesh.lab.layout.run("node-1"))
    result = CliRunner().invoke(cli, ["graph", "--run-dir", run, "--since", "10m", "outside"])
    assert result.exit_code == 0, result.output
    assert str(port) in result.stdout
    failing = ["graph", "--run-dir", run, "--fail-on", "plaintext", "-o", "json"]
    assert CliRunner().invoke(cli, failing).exit_code == 1
