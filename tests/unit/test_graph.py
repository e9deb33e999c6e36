"""The graph of recorded flows: what is one edge, what is counted once, and when a padlock locks."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.admin.model import PodReport, PodState
from nodeagent.flows import Recorded, Recording
from nodeagent.observe import graph as graphs
from nodeagent.observe.graph import Place, build
from nodeagent.observe.graph_model import (
    NODE,
    OUTSIDE,
    UNKNOWN,
    Connections,
    Edge,
    Graph,
    Kind,
    Padlock,
    Reporter,
)
from support.mesh_state import identity, workload
from ztunnel import reasons
from ztunnel.protocol import DataPlane, Endpoint, Service, ServicePort, Workload
from ztunnel.reasons import Reason

NOW = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
WEB = workload("web", "10.1.0.1")
DATABASE = workload("db", "10.1.0.2")
FAR = workload("far", "10.2.0.1")
OLD = workload("old", "10.3.0.1", plane=DataPlane.TCP)
SERVICE = Service(
    "default/db.default.svc.cluster.local",
    "db.default.svc.cluster.local",
    "default",
    ("10.96.0.1",),
    (ServicePort(80, 5432),),
    (Endpoint(DATABASE.uid, "10.1.0.2"),),
)
HOST = Service(
    "default/api.example.com", "api.example.com", "default", (), (ServicePort(443, 443),), ()
)


def pod(of: Workload, state: PodState = PodState.ENROLLED) -> PodReport:
    return PodReport(
        workload=of.uid,
        identity=of.identity,
        netns=of.name,
        state=state,
        since=NOW,
        mode="PERMISSIVE",
    )


PLACE = Place(
    workloads={each.uid: each for each in (WEB, DATABASE, FAR, OLD)},
    services={each.uid: each for each in (SERVICE, HOST)},
    pods=(pod(WEB), pod(DATABASE)),
    node_addresses=frozenset({"10.0.0.1"}),
)

INBOUND = Recorded(
    identity=WEB.identity,
    source="10.1.0.1",
    workload=WEB.uid,
    arrival="hbone",
    destination=DATABASE.uid,
    address="10.1.0.2",
    port=5432,
    allowed=True,
    reason="",
    first=NOW - timedelta(seconds=60),
    last=NOW,
    connections=1,
    most_open=1,
    received=10,
    sent=20,
)


def told(**fields: Any) -> Recorded:  # noqa: ANN401 - fields of a flow
    return msgspec.structs.replace(INBOUND, **fields)


def called(**fields: Any) -> Recorded:  # noqa: ANN401 - fields of a flow
    """Return the account of a pod of this node that calls."""
    return told(outbound=True, source="", **fields)


def plaintext(**fields: Any) -> Recorded:  # noqa: ANN401 - fields of a flow
    return told(arrival="plaintext", identity="", **fields)


def graph_of(flows: Iterable[Recorded], place: Place = PLACE, **recording: Any) -> Graph:  # noqa: ANN401 - fields of a recording
    defaults: dict[str, Any] = {
        "schema": 1,
        "node": "node-1",
        "time": NOW,
        "since": NOW - timedelta(hours=1),
        "oldest": NOW - timedelta(days=2),
        "complete": NOW - timedelta(days=2),
    }
    return build(Recording(flows=tuple(flows), **{**defaults, **recording}), place)


def edge_of(*flows: Recorded, place: Place = PLACE) -> Edge:
    (edge,) = graph_of(flows, place).edges
    return edge


# --- the padlock ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "connections,expected",
    [
        (Connections(), Padlock.NO_DATA),
        (Connections(mutual_tls=1), Padlock.ALL),
        (Connections(mutual_tls=996, plaintext=4), Padlock.SOME),
        (Connections(mutual_tls=10**9, plaintext=1), Padlock.SOME),
        (Connections(mutual_tls=10**9, direct=1), Padlock.SOME),
        (Connections(plaintext=1), Padlock.NONE),
        (Connections(direct=5), Padlock.NONE),
    ],
)
def test_a_padlock_locks_only_what_was_all_mutual_tls(
    connections: Connections, expected: Padlock
) -> None:
    assert graphs.padlock(connections) is expected


def test_refused_plaintext_unlocks_nothing_and_locks_nothing() -> None:
    refused = plaintext(allowed=False, reason="strict_requires_mtls", connections=7)
    edge = edge_of(refused)
    assert (edge.padlock, edge.protected_share) == (Padlock.NO_DATA, None)
    assert (edge.refused, edge.failed) == (7, 0)
    edge = edge_of(refused, told(connections=2))
    assert (edge.padlock, edge.protected_share) == (Padlock.ALL, 1)
    assert edge.reasons == {"strict_requires_mtls": 7}


def test_the_share_of_what_was_carried_is_mutual_tls_alone() -> None:
    edge = edge_of(
        told(connections=6), told(arrival="direct", connections=1), plaintext(connections=1)
    )
    assert edge.protected_share == 0.75
    assert edge.connections == Connections(mutual_tls=6, direct=1, plaintext=1)


counts = st.integers(min_value=0, max_value=3)
flows = st.builds(
    told,
    workload=st.sampled_from([WEB.uid, FAR.uid, ""]),
    destination=st.sampled_from([DATABASE.uid, WEB.uid, FAR.uid, OLD.uid]),
    identity=st.sampled_from(["", WEB.identity]),
    arrival=st.sampled_from(["hbone", "plaintext", "direct"]),
    port=st.sampled_from([80, 5432]),
    connections=counts,
    carried=counts,
    outbound=st.booleans(),
    allowed=st.booleans(),
    reason=st.sampled_from(["", *Reason]),
).map(
    # A refusal has a reason, and so have connections that came to nothing.
    lambda flow: flow if flow.allowed or flow.reason else told(reason="policy_denied")
)


@given(st.lists(flows, max_size=20))
def test_no_padlock_is_shut_over_one_connection_that_was_let_in_unprotected(
    told_flows: list[Recorded],
) -> None:
    answer = graph_of(told_flows)
    edges = {(edge.source, edge.destination, edge.port): edge for edge in answer.edges}
    assert len(edges) == len(answer.edges)
    judged = [flow for flow in told_flows if not flow.outbound and not flow.reason]
    for flow in judged:
        if flow.arrival != "hbone" and flow.connections + flow.carried:
            caller = flow.workload or flow.identity or OUTSIDE
            found = edges[caller, flow.destination, flow.port]
            assert found.padlock in {Padlock.SOME, Padlock.NONE}
            assert found.protected_share is not None
            assert found.protected_share < 1
    # The accounts of those that were called are all there, each connection once.
    there = [edge for edge in answer.edges if edge.reporter is Reporter.DESTINATION]
    counted = sum(edge.connections.total for edge in there)
    assert counted == sum(flow.connections + flow.carried for flow in judged)


# --- each connection once -------------------------------------------------------------------------


def test_a_connection_within_the_node_is_told_twice_and_counted_once() -> None:
    edge = edge_of(told(connections=5), called(connections=5))
    assert edge.connections == Connections(mutual_tls=5)
    assert (edge.bytes_sent, edge.bytes_received) == (10, 20)
    assert edge.reporter is Reporter.DESTINATION


def test_what_a_captured_pod_has_not_told_of_did_not_come() -> None:
    assert graph_of([called(connections=5)]).edges == ()


def test_a_call_to_another_node_is_the_sources_account() -> None:
    edge = edge_of(called(destination=FAR.uid, connections=5))
    assert (edge.source, edge.destination) == (WEB.uid, FAR.uid)
    assert edge.connections == Connections(mutual_tls=5)
    assert edge.reporter is Reporter.SOURCE


def test_of_a_pod_that_is_not_captured_the_source_tells() -> None:
    place = msgspec.structs.replace(PLACE, pods=(pod(WEB), pod(DATABASE, PodState.FAILED)))
    edge = edge_of(called(arrival="plaintext", connections=2), place=place)
    assert (edge.padlock, edge.reporter) == (Padlock.NONE, Reporter.SOURCE)


def test_failures_on_the_way_are_known_to_the_source_alone_and_added() -> None:
    edge = edge_of(
        told(connections=3),
        called(connections=3),
        called(connections=2, reason="connect_timeout"),
        called(connections=4, reason="denied_by_peer"),
        told(connections=4, allowed=False, reason="policy_denied"),
    )
    assert edge.reasons == {"connect_timeout": 2, "policy_denied": 4}
    assert (edge.refused, edge.failed) == (4, 2)
    assert edge.connections.total == 3


def test_a_failure_on_the_way_is_an_edge_by_itself() -> None:
    edge = edge_of(
        called(connections=3), called(connections=2, reason="tls_alert", received=0, sent=0)
    )
    assert (edge.failed, edge.padlock) == (2, Padlock.NO_DATA)
    assert (edge.bytes_sent, edge.reporter) == (0, Reporter.SOURCE)


def test_what_the_other_node_denied_is_refused() -> None:
    edge = edge_of(called(destination=FAR.uid, connections=4, reason="denied_by_peer"))
    assert (edge.refused, edge.failed) == (4, 0)


def test_what_found_no_endpoint_failed_and_nobody_refused_it() -> None:
    edge = edge_of(
        called(destination="", service="api.example.com", allowed=False, reason="no_endpoints"),
        called(destination="", service="api.example.com", allowed=False, reason="self_call"),
    )
    assert (edge.refused, edge.failed) == (1, 1)


def test_what_was_open_before_the_window_counts_and_so_locks() -> None:
    edge = edge_of(plaintext(connections=0, carried=1), told(connections=9))
    assert edge.padlock is Padlock.SOME
    assert edge.connections.total == 10


def test_every_refusal_of_the_access_log_is_one_here() -> None:
    denials = {each.value for each, flag in reasons.RESPONSE_FLAGS.items() if flag == "DENY"}
    assert denials == graphs._REFUSALS


def test_ends_on_the_other_side_are_tokens_of_the_access_log() -> None:
    assert {each.value for each in Reason} >= graphs._SEEN_THERE


# --- who it was -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flow,source",
    [
        (INBOUND, WEB.uid),
        (told(workload=""), WEB.identity),
        (plaintext(workload="", source="10.0.0.1"), NODE),
        (plaintext(workload="", source="203.0.113.7"), OUTSIDE),
        (plaintext(workload="", source="", address="", port=0), UNKNOWN),
    ],
)
def test_who_called(flow: Recorded, source: str) -> None:
    assert edge_of(flow).source == source


@pytest.mark.parametrize(
    "flow,destination",
    [
        (called(destination=FAR.uid), FAR.uid),
        (called(destination="", address="203.0.113.7"), OUTSIDE),
        (called(destination="", address="203.0.113.7", service="api.example.com"), HOST.hostname),
        (called(destination="", address="10.0.0.1"), NODE),
        (called(destination="", address="", port=0), UNKNOWN),
    ],
)
def test_who_was_called(flow: Recorded, destination: str) -> None:
    assert edge_of(flow).destination == destination


def test_some_of_the_addresses_outside_are_named() -> None:
    many = [plaintext(workload="", source=f"203.0.113.{n}") for n in range(20)]
    edge = edge_of(*many)
    assert edge.connections.plaintext == 20
    assert edge.addresses == tuple(f"203.0.113.{n}" for n in range(graphs.MAX_NAMED))


def test_this_nodes_pods_are_in_it_whether_called_or_not() -> None:
    answer = graph_of([])
    assert [(v.id, v.local, v.mode, v.state) for v in answer.vertices] == [
        (DATABASE.uid, True, "PERMISSIVE", "Enrolled"),
        (WEB.uid, True, "PERMISSIVE", "Enrolled"),
    ]
    assert answer.vertices[0].identities == (identity("db"),)


def test_what_the_others_are() -> None:
    answer = graph_of(
        [
            plaintext(workload="", source="203.0.113.7"),
            plaintext(workload="default/gone"),
            told(workload="", identity="spiffe://other/ns/a/sa/b"),
            called(destination="", service="api.example.com", port=443),
            called(destination=FAR.uid),
        ]
    )
    found = {vertex.id: (vertex.kind, vertex.name, vertex.local) for vertex in answer.vertices}
    assert found == {
        WEB.uid: (Kind.WORKLOAD, "web", True),
        DATABASE.uid: (Kind.WORKLOAD, "db", True),
        FAR.uid: (Kind.WORKLOAD, "far", False),
        "default/gone": (Kind.WORKLOAD, "gone", False),
        OUTSIDE: (Kind.OUTSIDE, "outside", False),
        "api.example.com": (Kind.OUTSIDE, "api.example.com", False),
        "spiffe://other/ns/a/sa/b": (Kind.UNKNOWN, "spiffe://other/ns/a/sa/b", False),
    }


def test_identities_are_named_where_they_were_proved() -> None:
    assert edge_of(INBOUND).destination_identity == DATABASE.identity
    edge = edge_of(plaintext())
    assert (edge.source_identity, edge.destination_identity) == ("", "")


def test_the_service_is_what_the_caller_named_or_the_one_with_that_port() -> None:
    assert edge_of(INBOUND).service == SERVICE.hostname
    assert edge_of(told(port=9)).service == ""
    assert edge_of(INBOUND, called(service="alias.example")).service == "alias.example"


def test_policies_are_named_once() -> None:
    edge = edge_of(told(policy="a"), told(policy="b"), told(policy="a"))
    assert edge.policies == ("a", "b")


# --- the window and the bounds --------------------------------------------------------------------


def test_a_window_that_is_not_all_recorded_is_not_complete() -> None:
    assert graph_of([]).complete
    assert not graph_of([], complete=NOW).complete
    assert not graph_of([], complete=None).complete
    broken = graph_of([], problem="no room")
    assert (broken.complete, broken.problem) == (False, "no room")


def test_more_edges_than_fit_are_left_out_the_oldest_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graphs, "MAX_EDGES", 2)
    flows = [
        told(port=port, workload=f"default/{port}", last=NOW - timedelta(seconds=port))
        for port in (3, 1, 2)
    ]
    answer = graph_of(flows)
    assert [edge.port for edge in answer.edges] == [1, 2]
    assert answer.truncated
    assert "default/3" not in {vertex.id for vertex in answer.vertices}


def test_it_reads_back_as_it_was_written() -> None:
    answer = graph_of([INBOUND, called(destination=FAR.uid), plaintext(workload="")])
    assert msgspec.json.decode(msgspec.json.encode(answer), type=Graph) == answer
