"""From a judgement to a decision of the core, and back: is what was decided then allowed now?

This module owns the translation of routes and verdicts into decisions, with their peers, series
and labels, and the re-judging of decisions that connections still live under. It promises that a
decision is either made whole or leaves nothing behind, and that re-judging cuts only what is no
longer allowed: a route that merely changed serves new connections, and leaves open ones alone. It
may not wait, read a clock or answer upcalls.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from ztunnel import address
from ztunnel.authorize import Request, Verdict, authorize
from ztunnel.corelike import ARRIVALS
from ztunnel.decisions import Decisions, Key, Peers, Record
from ztunnel.observe import flow_keys
from ztunnel.observe import labels as label_sets
from ztunnel.observe.labels import DESTINATION, MUTUAL_TLS, PLAINTEXT, SOURCE, UNKNOWN, Labels
from ztunnel.observe.series import SeriesTable
from ztunnel.probe import is_probe
from ztunnel.protocol import Arrival, FlowKey, Service, Workload
from ztunnel.reasons import Reason
from ztunnel.route import Balance, HandOver, Passthrough, Plain, Refuse, Route, Tunnel, Way
from ztunnel.same_node import admit, is_direct

if TYPE_CHECKING:
    from ztunnel.corelike import CoreLike
    from ztunnel.identities import Proven
    from ztunnel.observe.counted import Counted
    from ztunnel.observe.flows import FlowTable, LiveFlow
    from ztunnel.pods import Held, Pods
    from ztunnel.state import State

__all__ = ["NUMBER_OF", "Cut", "Judge", "still_allowed"]

NUMBER_OF: Final = {reason: number for number, reason in enumerate(Reason)}
"""Reason to the core's number for it; `reasons.check` has made sure that the core agrees."""

_MAX_WEIGHT: Final = 2**32 - 1
"""The core keeps a weight in 32 bits."""


class Judge:
    """Makes decisions. Everything it is given is shared with the tunnel that asks."""

    def __init__(
        self,
        core: CoreLike,
        numbers: Iterator[int],
        decisions: Decisions,
        series: SeriesTable,
        flows: FlowTable,
        peers: Peers,
        counted: Counted,
    ) -> None:
        self._core = core
        self._numbers = numbers
        self._decisions = decisions
        self._series = series
        self._flows = flows
        self._peers = peers
        self._counted = counted
        self._services_of: Mapping[str, Service] | None = None
        self._pods_of: Mapping[str, object] | None = None
        self._inbound: dict[tuple[str, int], Service] = {}

    def outbound(self, state: State, held: Held, key: Key, route: Route, now: float) -> Record:
        """Make the decision for `route`. `now` is monotonic, seconds."""
        if not isinstance(route, Balance):
            return self._outbound_single(state, held, key, route, now)
        made: list[tuple[Record, int]] = []
        try:
            for choice, weight in route.choices:
                record = self._outbound_single(state, held, key, choice, now)
                made.append((record, min(weight, _MAX_WEIGHT)))
            number = next(self._numbers)
            pairs = tuple((record.number, weight) for record, weight in made)
            self._core.decide_balance(number, pairs)
        finally:
            # The balance holds its choices by itself.
            for record, _ in made:
                self._decisions.release(record)
        balance = Record(number, key, held.pod.uid, route, _nothing(SOURCE))
        balance.choices = tuple(record.number for record, _ in made)
        self._decisions.add(balance)
        return balance

    def _outbound_single(
        self, state: State, held: Held, key: Key, route: Refuse | Passthrough | Way, now: float
    ) -> Record:
        record = Record(
            next(self._numbers),
            key,
            held.pod.uid,
            route,
            self.outbound_labels(state, held, key, route),
        )
        try:
            if not is_probe(key.destination, key.port):
                record.series = self._series.acquire(record.labels)
            if isinstance(route, Tunnel):
                record.peer = self._peers.acquire(
                    held.number,
                    held.credential,
                    route.expected,
                    route.target,
                    route.hbone_port,
                    now,
                )
            if isinstance(route, HandOver):
                record.proofs = route.proofs
                record.mirror_labels = self.handed_labels(state, held, route)
                record.mirror = self._series.acquire(record.mirror_labels)
                record.flow = self._flows.acquire(_handed_flow(state, held, route), record.mirror)
            elif record.series is not None:
                called = flow_keys.outbound(state, held.pod.workload, key, route)
                if called is not None:
                    record.flow = self._flows.acquire(called, record.series)
            self._tell(record, route)
        except BaseException:
            if record.flow is not None:
                self._flows.release(record.flow)
            for series in (record.series, record.mirror):
                if series is not None:
                    self._series.release(series)
            if record.peer is not None:
                self._peers.release(record.peer, now)
            raise
        self._decisions.add(record)
        if isinstance(route, HandOver):
            self._counted.verdict(route.verdict)
        return record

    def _tell(self, record: Record, route: Refuse | Passthrough | Way) -> None:
        """Make the core's decision, whose series and peer `record` holds."""
        number = record.number
        counted = record.series if record.flow is None or record.mirror else record.flow
        series = counted.number if counted is not None else 0
        match route:
            case Refuse():
                self._core.decide_refuse(number, series, NUMBER_OF[route.reason])
            case Passthrough():
                self._core.decide_forward(number, series, b"", 0)
            case Plain():
                self._core.decide_forward(number, series, route.target, route.port)
            case Tunnel():
                peer = record.peer.number if record.peer is not None else 0
                self._core.decide_tunnel(
                    number, series, peer, route.authority, route.baggage, route.host
                )
            case HandOver(way=way):
                flow = record.flow.number if record.flow is not None else 0
                self._core.decide_hand_over(number, series, flow, route.pod, way.target, way.port)

    def inbound(
        self, state: State, held: Held | None, key: Key, proven: Proven | None, verdict: Verdict
    ) -> Record:
        """Make the decision for `verdict`; without a pod only a refusal can be made."""
        labels = self.inbound_labels(state, held, key, proven)
        number = next(self._numbers)
        series = self._series.acquire(labels)
        flow: LiveFlow | None = None
        try:
            if held is not None and key.kind in ARRIVALS:
                flow = self._flows.acquire(_inbound_flow(state, held, key, proven, verdict), series)
            counted = flow.number if flow is not None else series.number
            if verdict.allow and held is not None:
                self._core.decide_deliver(number, counted)
            else:
                self._core.decide_refuse(number, counted, NUMBER_OF[verdict.reason])
        except BaseException:
            if flow is not None:
                self._flows.release(flow)
            self._series.release(series)
            raise
        record = Record(number, key, held.pod.uid if held is not None else "", verdict, labels)
        record.series = series
        record.flow = flow
        record.proven = proven
        record.proofs = (proven,) if proven is not None else ()
        self._decisions.add(record)
        self._counted.verdict(verdict)
        return record

    def outbound_labels(
        self, state: State, held: Held, key: Key, route: Refuse | Passthrough | Way
    ) -> Labels:
        source = state.workload_of(held.pod)
        destination: Workload | None
        service: Service | None = None
        security = UNKNOWN
        principal = ""
        match route:
            case Tunnel():
                destination = state.workloads.get(route.workload)
                service = state.services.get(route.service)
                security = MUTUAL_TLS
                principal = destination.identity if destination is not None else ""
            case HandOver(way=way):
                destination = state.workloads.get(way.workload)
                service = state.services.get(way.service)
                security = PLAINTEXT
                principal = str(route.proofs[1].id)
            case Plain():
                destination = state.workloads.get(route.workload)
                service = state.services.get(route.service)
                security = PLAINTEXT if destination is not None else UNKNOWN
            case Refuse():
                destination = state.workload_at(key.destination)
                service = state.services.get(route.service)
            case Passthrough():
                destination = None
        return label_sets.make(
            SOURCE,
            security,
            source,
            destination,
            service,
            source_principal=source.identity if source is not None and principal else "",
            destination_principal=principal,
        )

    def handed_labels(self, state: State, held: Held, route: HandOver) -> Labels:
        """Return what the destination's side reports of a hand-over from `held`."""
        destination = state.workloads.get(route.way.workload)
        return label_sets.make(
            DESTINATION,
            PLAINTEXT,
            state.workload_of(held.pod),
            destination,
            self._inbound_service(state, destination, route.way.port),
            source_principal=str(route.proofs[0].id),
            destination_principal=str(route.proofs[1].id),
        )

    def inbound_labels(
        self, state: State, held: Held | None, key: Key, proven: Proven | None
    ) -> Labels:
        destination = state.workload_of(held.pod) if held is not None else None
        source = state.workload_at(key.source)
        if proven is None:
            service = self._inbound_service(state, destination, key.port)
            return label_sets.make(DESTINATION, PLAINTEXT, source, destination, service)
        identity = str(proven.id)
        if source is not None and source.identity != identity:
            # The address is another workload's: believe the proof, not the address.
            source = None
        return label_sets.make(
            DESTINATION,
            MUTUAL_TLS,
            source,
            destination,
            self._inbound_service(state, destination, key.port),
            source_principal=identity,
            destination_principal=destination.identity if destination is not None else "",
        )

    def _inbound_service(
        self, state: State, destination: Workload | None, port: int
    ) -> Service | None:
        if destination is None:
            return None
        if self._services_of is not state.services or self._pods_of is not state.pods:
            workloads = [pod.workload for pod in state.pods.values()]
            self._inbound = label_sets.inbound_services(state.services, workloads)
            self._services_of = state.services
            self._pods_of = state.pods
        return self._inbound.get((destination.uid, port))


def _inbound_flow(
    state: State, held: Held, key: Key, proven: Proven | None, verdict: Verdict
) -> FlowKey:
    identity = str(proven.id) if proven is not None else ""
    source = state.workload_at(key.source)
    if source is not None and identity and source.identity != identity:
        # As of the labels: the address is another workload's.
        source = None
    return FlowKey(
        identity=identity,
        source=address.text(key.source),
        workload=source.uid if source is not None else "",
        arrival=ARRIVALS[key.kind],
        destination=held.pod.workload,
        address=address.text(key.destination),
        port=key.port,
        allowed=verdict.allow,
        reason="" if verdict.allow else verdict.reason.value,
        policy=flow_keys.policy(verdict.origin),
    )


def _handed_flow(state: State, held: Held, over: HandOver) -> FlowKey:
    """Of the client's addresses one of the family that was called: all were judged alike."""
    family = address.is_ipv4(over.way.target)
    sources = sorted(own for own in held.pod.addresses if address.is_ipv4(own) is family)
    source = state.workload_of(held.pod)
    return FlowKey(
        identity=str(over.proofs[0].id),
        source=address.text(sources[0]) if sources else "",
        workload=source.uid if source is not None else "",
        arrival=Arrival.DIRECT,
        destination=over.way.workload,
        address=address.text(over.way.target),
        port=over.way.port,
        allowed=True,
        policy=flow_keys.policy(over.verdict.origin),
    )


def _nothing(reporter: str) -> Labels:
    return label_sets.make(reporter, UNKNOWN, None, None, None)


class Cut(NamedTuple):
    """Why live connections end, and the policy that says so ("" if none does)."""

    reason: Reason
    origin: str = ""


def still_allowed(state: State, pods: Pods, record: Record) -> Cut | None:
    """Return why connections under `record` must be cut, or None while they may live.

    Inbound is judged as if asked anew, and so is a hand-over, which is both. Outbound is cut only
    when the destination's address now belongs to another identity than the one that was proved:
    whether plaintext may enter a workload is its own node's judgement, and that node cuts it there.
    """
    held = pods.get(record.pod)
    if held is None or record.pod != held.pod.uid or record.key.pod != held.number:
        # Taken out of the core, and its connections with it.
        return None
    match record.outcome:
        case Verdict(allow=True):
            verdict = authorize(
                state,
                Request(
                    held.pod,
                    record.proven.id if record.proven is not None else None,
                    record.key.source,
                    record.key.destination,
                    record.key.port,
                ),
            )
            if not verdict.allow:
                return Cut(_cut_reason(verdict.reason), verdict.origin)
        case Tunnel() as tunnel:
            return _still_expected(state, tunnel)
        case HandOver() as over:
            server = pods.by_number(over.pod)
            if server is not None:
                return _still_joined(state, held, server, over)
    return None


def _still_expected(state: State, way: Tunnel) -> Cut | None:
    workload = state.workload_at(way.target)
    if workload is not None and workload.identity not in way.expected:
        return Cut(Reason.IDENTITY_MISMATCH)
    return None


def _still_joined(state: State, client: Held, server: Held, over: HandOver) -> Cut | None:
    if not is_direct(state):
        # What was in clear by the settings of then is not by those of now.
        return Cut(Reason.POLICY_CHANGED)
    if any(proven.withdrawn for proven in over.proofs):
        return Cut(Reason.TRUST_WITHDRAWN)
    verdict = admit(state, client, over.proofs[0].id, server, over.way)
    if not verdict.allow:
        return Cut(_cut_reason(verdict.reason), verdict.origin)
    return _still_expected(state, over.way)


def _cut_reason(reason: Reason) -> Reason:
    """A live connection ends by the change, not by the rule that it would now meet first."""
    return Reason.TRUST_WITHDRAWN if reason is Reason.TRUST_DOMAIN else Reason.POLICY_CHANGED
