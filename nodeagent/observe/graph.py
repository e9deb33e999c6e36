"""The graph: recorded flows, summed by who called whom at which port.

This module owns how flows become edges. It promises that a connection is in one edge and in one of
its numbers, whichever nodes and sides have told of it; that a padlock is ALL only where everything
that was carried was mutual TLS; and that nothing in an edge is taken from what configuration says
should happen. Pure.

Two accounts of one connection
------------------------------
A connection between two pods of this node is told twice: by the one that called and by the one that
was called. The destination's account counts, for it judged the caller; of the source's only what
the destination cannot know is added, failures on the way there (not `_SEEN_THERE`). Where the
destination is not captured on this node, the source's account is all there is.

A connection counts when it was open at any time in the window: those that began in it, and those
that were open when it began (`Recorded.carried`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from datetime import datetime
from typing import Final, NamedTuple

import msgspec

from nodeagent.admin.model import PodReport, PodState
from nodeagent.flows import Recorded, Recording
from nodeagent.observe.graph_model import (
    NODE,
    OUTSIDE,
    SCHEMA,
    UNKNOWN,
    Connections,
    Edge,
    Graph,
    Kind,
    Padlock,
    Reporter,
    Vertex,
)
from ztunnel.protocol import Service, Workload

__all__ = ["MAX_EDGES", "Place", "build", "padlock"]

MAX_EDGES: Final = 5000
"""Of one answer, the last seen first: 3 MB of JSON, ten times what a person can look at."""

MAX_NAMED: Final = 10
"""Policies, identities and addresses named in one edge or vertex."""

_CAPTURED: Final = frozenset({PodState.ENROLLED, PodState.DEGRADED})

_REFUSALS: Final = frozenset(
    {
        "authority_mismatch",
        "denied_by_peer",
        "foreign_source_address",
        "policy_changed",
        "policy_denied",
        "policy_missing",
        "self_call",
        "strict_requires_mtls",
    }
)
"""Reasons of the access log that are a judgement; the others are failures."""

_SEEN_THERE: Final = frozenset(
    {
        "bad_request_by_peer",
        "client_lost",
        "client_reset",
        "connect_answer_timeout",
        "denied_by_peer",
        "peer_connection_lost",
        "peer_reset",
        "server_lost",
        "server_reset",
        "unavailable_by_peer",
        "unexpected_status_by_peer",
    }
)
"""Ends of a source's connection that its destination has had, too: its tunnel was reached."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """What is known now of those who may have called or been called. Keys are uids.

    `asdex` has the scores of this node's workloads, as far as they have one.
    """

    workloads: Mapping[str, Workload]
    services: Mapping[str, Service]
    pods: tuple[PodReport, ...]
    node_addresses: frozenset[str]
    asdex: Mapping[str, float] = {}


class _Key(NamedTuple):
    source: str
    destination: str
    port: int


class _Account:
    """What one side has told of an edge, or both put together."""

    def __init__(self, first: datetime, last: datetime) -> None:
        self.first = first
        self.last = last
        self.carried: Counter[str] = Counter()
        """Connections by arrival."""
        self.ends: Counter[str] = Counter()
        """Connections that were not carried, by reason."""
        self.refused = 0
        self.received = 0
        self.sent = 0
        self.identity = ""
        self.policies: dict[str, None] = {}
        self.services: Counter[str] = Counter()
        self.addresses: dict[str, None] = {}

    def add(self, flow: Recorded) -> None:
        self._span(flow.first, flow.last)
        if flow.reason:
            self._end(flow.reason, flow.connections, judged=not (flow.allowed or flow.outbound))
        else:
            self.carried[flow.arrival] += flow.connections + flow.carried
        self.received += flow.received
        self.sent += flow.sent
        self.identity = self.identity or flow.identity
        _note(self.policies, flow.policy)
        if flow.service:
            self.services[flow.service] += 1 + flow.connections

    def add_failures(self, source: _Account) -> None:
        """Add what the source alone knows of."""
        for reason, count in source.ends.items():
            if reason not in _SEEN_THERE:
                self._end(reason, count)
                self._span(source.first, source.last)
        self.identity = self.identity or source.identity
        self.services.update(source.services)

    def _span(self, first: datetime, last: datetime) -> None:
        self.first = min(self.first, first)
        self.last = max(self.last, last)

    def _end(self, reason: str, count: int, *, judged: bool = False) -> None:
        self.ends[reason] += count
        if judged or reason in _REFUSALS:
            self.refused += count

    @property
    def connections(self) -> Connections:
        return Connections(
            mutual_tls=self.carried["hbone"],
            direct=self.carried["direct"],
            plaintext=self.carried["plaintext"],
        )


class _Side:
    """Edges as one side has told of them."""

    def __init__(self) -> None:
        self.accounts: dict[_Key, _Account] = {}

    def add(self, key: _Key, flow: Recorded) -> _Account:
        account = self.accounts.get(key)
        if account is None:
            account = self.accounts[key] = _Account(flow.first, flow.last)
        account.add(flow)
        return account


def padlock(connections: Connections) -> Padlock:
    if not connections.total:
        return Padlock.NO_DATA
    if connections.mutual_tls == connections.total:
        return Padlock.ALL
    return Padlock.SOME if connections.mutual_tls else Padlock.NONE


def build(recording: Recording, place: Place) -> Graph:
    """Return the graph of what `recording` holds, from the time that it was asked for."""
    told_by_destination, told_by_source = _Side(), _Side()
    for flow in recording.flows:
        if flow.outbound:
            key = _Key(flow.workload, _called(flow, place), flow.port)
            account = told_by_source.add(key, flow)
            if key.destination == OUTSIDE:
                _note(account.addresses, flow.address)
        else:
            key = _Key(_caller(flow, place), flow.destination, flow.port)
            account = told_by_destination.add(key, flow)
            if key.source == OUTSIDE:
                _note(account.addresses, flow.source)
    edges = _edges(told_by_destination.accounts, told_by_source.accounts, place)
    edges.sort(key=lambda edge: (edge.last, edge.source, edge.destination, edge.port), reverse=True)
    truncated = recording.truncated or len(edges) > MAX_EDGES
    del edges[MAX_EDGES:]
    since = recording.since
    return Graph(
        schema=SCHEMA,
        time=recording.time,
        node=recording.node,
        window_seconds=round((recording.time - since).total_seconds()),
        complete=recording.complete is not None
        and recording.complete <= since
        and not recording.problem,
        vertices=_vertices(edges, place),
        edges=tuple(edges),
        truncated=truncated,
        problem=recording.problem,
    )


def _caller(flow: Recorded, place: Place) -> str:
    if flow.workload:
        return flow.workload
    if flow.identity:
        return flow.identity
    if flow.is_folded:
        return UNKNOWN
    return NODE if flow.source in place.node_addresses else OUTSIDE


def _called(flow: Recorded, place: Place) -> str:
    if flow.destination:
        return flow.destination
    if flow.is_folded:
        return UNKNOWN
    if flow.service:
        return flow.service
    return NODE if flow.address in place.node_addresses else OUTSIDE


def _edges(
    there: Mapping[_Key, _Account], here: Mapping[_Key, _Account], place: Place
) -> list[Edge]:
    """Join both accounts: `there` the destinations', `here` the sources'."""
    ours = {pod.workload for pod in place.pods if pod.state in _CAPTURED}
    ours |= {key.destination for key in there}
    services = _services(place, {key.destination for key in (*there, *here)})
    made: list[Edge] = []
    for key in there.keys() | here.keys():
        account, source = there.get(key), here.get(key)
        reporter = Reporter.DESTINATION if account is not None else Reporter.SOURCE
        if source is not None and key.destination not in ours:
            account = source
        elif source is not None:
            account = account or _Account(source.first, source.last)
            account.add_failures(source)
        if account is not None and (account.carried or account.ends):
            made.append(_edge(key, account, reporter, place, services))
    return made


def _edge(
    key: _Key,
    account: _Account,
    reporter: Reporter,
    place: Place,
    services: Mapping[tuple[str, int], str],
) -> Edge:
    connections = account.connections
    proved = connections.mutual_tls + connections.direct > 0
    called = place.workloads.get(key.destination)
    service = services.get((key.destination, key.port), "")
    if account.services:
        service = max(sorted(account.services), key=lambda name: account.services[name])
    return Edge(
        source=key.source,
        destination=key.destination,
        port=key.port,
        service=service,
        connections=connections,
        refused=account.refused,
        failed=account.ends.total() - account.refused,
        reasons=dict(sorted(account.ends.items())),
        padlock=padlock(connections),
        protected_share=connections.mutual_tls / connections.total if connections.total else None,
        bytes_sent=account.received,
        bytes_received=account.sent,
        policies=tuple(account.policies),
        source_identity=account.identity,
        destination_identity=called.identity if called is not None and proved else "",
        first=account.first,
        last=account.last,
        reporter=reporter,
        addresses=tuple(account.addresses),
    )


def _services(place: Place, wanted: Collection[str]) -> dict[tuple[str, int], str]:
    """Return through which service a port of a workload is most likely called.

    The wire does not say it to the one who is called. Of several the first by uid is named.
    """
    found: dict[tuple[str, int], str] = {}
    for uid in sorted(place.services):
        service = place.services[uid]
        for endpoint in service.endpoints:
            if endpoint.workload in wanted:
                for port in service.ports:
                    target = endpoint.ports.get(port.number, port.target)
                    found.setdefault((endpoint.workload, target), service.hostname)
    return found


def _vertices(edges: Iterable[Edge], place: Place) -> tuple[Vertex, ...]:
    """Return whoever an edge names, and this node's pods, called or not."""
    identities: dict[str, dict[str, None]] = {pod.workload: {} for pod in place.pods}
    for edge in edges:
        _note(identities.setdefault(edge.source, {}), edge.source_identity)
        _note(identities.setdefault(edge.destination, {}), edge.destination_identity)
    pods = {pod.workload: pod for pod in place.pods}
    hosts = {service.hostname: service for service in place.services.values()}
    return tuple(
        _vertex(name, tuple(known), pods.get(name), place, hosts)
        for name, known in sorted(identities.items())
    )


def _vertex(
    name: str,
    identities: tuple[str, ...],
    pod: PodReport | None,
    place: Place,
    hosts: Mapping[str, Service],
) -> Vertex:
    workload = place.workloads.get(name)
    if workload is not None or pod is not None:
        namespace, _, short = name.partition("/")
        own = workload.identity if workload is not None else ""
        return Vertex(
            id=name,
            kind=Kind.WORKLOAD,
            name=short,
            namespace=namespace,
            identities=identities or ((own,) if own else ()),
            local=pod is not None,
            mode=pod.mode if pod is not None else "",
            state=pod.state.value if pod is not None else "",
            asdex=place.asdex.get(name),
        )
    if name in {NODE, OUTSIDE, UNKNOWN}:
        return Vertex(id=name, kind=Kind(name), name=name)
    service = hosts.get(name)
    if service is not None:
        return Vertex(id=name, kind=Kind.OUTSIDE, name=name, namespace=service.namespace)
    namespace, slash, short = name.partition("/")
    if slash and short and "/" not in short:
        # A workload that has left the mesh since.
        return Vertex(
            id=name,
            kind=Kind.WORKLOAD,
            name=short,
            namespace=namespace,
            identities=identities,
        )
    return Vertex(id=name, kind=Kind.UNKNOWN, name=name, identities=identities)


def _note(names: dict[str, None], name: str) -> None:
    """Keep `name`, in the order in which names came, of which a few are kept."""
    if name and len(names) < MAX_NAMED:
        names[name] = None
