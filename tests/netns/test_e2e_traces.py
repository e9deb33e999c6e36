"""Traces of two nodes' tunnels at one receiver: both halves of a connection are one trace."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from nodeagent.lab import Lab, namespaces
from support.e2e import Mesh, peer_authentication, running, spec, spiffe, watched
from support.netns import wait_until
from support.otlp import Receiver, Span, receiver

pytestmark = pytest.mark.netns

PORT = 4318
ENDPOINT = "172.18.0.1"
"""Node-1's address between the nodes."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    traces = {"endpoint": f"http://{ENDPOINT}:{PORT}", "sample_one_in": 1}
    with running(spec(settings={"traces": traces, "same_node": "direct"}, apps=False)) as made:
        yield made


@pytest.fixture(scope="module")
def collector(lab: Lab) -> Iterator[Receiver]:
    listening = namespaces.run_in(
        lab.node("node-1").space, lambda: socket.create_server((ENDPOINT, PORT))
    )
    with receiver(listening) as made:
        yield made


@pytest.fixture
def mesh(lab: Lab, collector: Receiver, request: pytest.FixtureRequest) -> Iterator[Mesh]:
    with watched(lab, request) as made:
        yield made


def halves(collector: Receiver, port: int) -> tuple[Span, Span]:
    """Return the spans of the one connection to this port: the client's, the server's."""

    def found() -> list[Span]:
        return [each for each in collector.spans if each.attributes["destination.port"] == port]

    wait_until(lambda: len(found()) >= 2, f"two spans of port {port}")
    client, server = sorted(found(), key=lambda each: each.server)
    assert not client.server
    assert server.server
    return client, server


def test_both_halves_of_a_tunnel_are_one_trace(mesh: Mesh, collector: Receiver) -> None:
    port = mesh.visit("client", "far")
    client, server = halves(collector, port)
    assert client.trace == server.trace
    assert (client.parent, server.parent) == ("", client.id)
    assert client.resource["host.name"] == "node-1"
    assert server.resource["host.name"] == "node-2"
    for half in (client, server):
        assert half.attributes["ztunnel.source.identity"] == spiffe("client")
        assert half.attributes["ztunnel.destination.identity"] == spiffe("far")
        assert half.attributes["ztunnel.connection_security_policy"] == "mutual_tls"
        assert half.attributes["ztunnel.bytes_received"] == 4
        assert half.attributes["ztunnel.bytes_sent"] == 4
        assert [event.name for event in half.message.events] == ["open"]
    # What comes in lies within what went out, by one machine's clock.
    assert client.message.start_time_unix_nano <= server.message.start_time_unix_nano
    for pod, direction in (("client", "outbound"), ("far", "inbound")):
        assert mesh.line(pod, direction, port)["trace_id"] == client.trace


def test_a_refusal_is_an_error_of_both(mesh: Mesh, collector: Receiver) -> None:
    listener = mesh.listen("far")
    port = listener.getsockname()[1]
    mesh.apply(
        {
            "apiVersion": "security.istio.io/v1",
            "kind": "AuthorizationPolicy",
            "metadata": {"name": "nobody", "namespace": "shop"},
            "spec": {"selector": {"matchLabels": {"app": "far"}}},
        }
    )
    mesh.settled("node-2", lambda status: "nobody" in str(status["pods"]))
    mesh.refuses("client", mesh.address("far"), port)
    client, server = halves(collector, port)
    assert client.trace == server.trace
    assert server.parent == client.id
    assert client.attributes["error.type"] == "denied_by_peer"
    assert server.attributes["error.type"] == "policy_denied"


def test_both_sides_of_a_direct_connection_are_one_trace(mesh: Mesh, collector: Receiver) -> None:
    port = mesh.visit("client", "near")
    client, server = halves(collector, port)
    assert (client.trace, client.id) == (server.trace, server.parent)
    assert server.attributes["ztunnel.connection_security_policy"] == "none"


def test_plaintext_is_a_trace_of_one(mesh: Mesh, collector: Receiver) -> None:
    mesh.apply(peer_authentication("PERMISSIVE"))
    port = mesh.visit("legacy", "far")

    def found() -> list[Span]:
        return [each for each in collector.spans if each.attributes["destination.port"] == port]

    wait_until(found, "its span")
    (span,) = found()
    assert span.server
    assert span.parent == ""
    assert "ztunnel.source.identity" not in span.attributes
