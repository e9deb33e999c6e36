"""What became of connections: from the core's reports to access log lines and failure counts.

This module owns the joining of an ended connection or a failed handshake with the decision, the
identities and the workloads behind its numbers; for ends that are no failures it says beforehand
what their lines have in common. What was judged it tells the audit log as well. It promises one
line for each report, two for a connection that was handed over between two pods of this node, but
for failures of one kind that come in masses (`log_limit`), and that a connection that ended before
a decision was reached is counted too (the core counts by decision). It may not write the lines out,
nor change what it reads.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import msgspec

from ztunnel import address, reasons, verdict_words
from ztunnel.authorize import Verdict
from ztunnel.corelike import ARRIVALS, Kind
from ztunnel.decisions import Key
from ztunnel.observe import causes, labels
from ztunnel.observe.access_log import Line, Sink, certificate
from ztunnel.observe.labels import Labels
from ztunnel.observe.log_limit import FailureLines
from ztunnel.observe.tallies import Tally
from ztunnel.probe import is_probe
from ztunnel.reasons import Reason
from ztunnel.route import HandOver, Passthrough, Plain, Refuse, Tunnel
from ztunnel.state import HBONE_PORT

if TYPE_CHECKING:
    from ztunnel._core import Ended, Failed, Listed, Upcall
    from ztunnel.audit import AuditLog
    from ztunnel.corelike import CoreLike
    from ztunnel.decisions import Decisions, Peers, Record
    from ztunnel.identities import Identities, Proven
    from ztunnel.judge import Judge
    from ztunnel.observe.arrivals import Arrivals
    from ztunnel.observe.beginnings import Beginnings
    from ztunnel.observe.traces import Tracer
    from ztunnel.pods import Pods
    from ztunnel.protocol import Workload
    from ztunnel.state import State

__all__ = ["Events", "Side"]

MAX_EARLY: Final = 4000
"""Label sets of connections that failed before a decision; more are counted as unknown."""

MAX_EXPLAINED: Final = 1024
"""Refused certificates whose details wait for the core's report of the failed handshake."""

MAX_SPELLED: Final = 4096
"""Addresses whose text is kept: those that a node talks to, again and again."""

_REASONS: Final = tuple(Reason)
_FAILURE: Final = tuple(reasons.RESPONSE_FLAGS[each] != reasons.NO_FLAG for each in Reason)
# Plain numbers: comparing with a member of the enum takes ten times as long, for every line.
_OUTBOUND: Final = int(Kind.OUTBOUND)
_INBOUND_HBONE: Final = int(Kind.INBOUND_HBONE)

_CUTS: Final = frozenset({Reason.POLICY_CHANGED, Reason.TRUST_WITHDRAWN})
"""Ends by a judgement on connections that had been let in."""

_NO_CONNECTION: Final = reasons.BROKE_LATER | {Reason.PEER_LOST}
"""Ends of HBONE connections that are no failure of one that was to be carried. Who connects and
goes is a probe of the port (`nodeagent doctor` makes some); if not, his own node tells of it."""

Side = str
CLIENT: Final[Side] = "client"
SERVER: Final[Side] = "server"


class _Way(NamedTuple):
    """What kind of connection, to whom it asked to go, and whom the core dialled for it."""

    kind: int
    destination: bytes
    port: int
    upstream: bytes
    upstream_port: int


class _Owner(Protocol):
    """What of the tunnel is read here, but for `arrivals`, which is told."""

    arrivals: Arrivals
    decisions: Decisions
    identities: Identities
    peers: Peers
    pods: Pods


class Events:
    """Turns reports into lines for `sink`. `clock` is monotonic, `wall` since the epoch."""

    def __init__(
        self,
        owner: _Owner,
        judge: Judge,
        sink: Sink,
        audit: AuditLog,
        traces: Tracer,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._owner = owner
        self._judge = judge
        self._sink = sink
        self._audit = audit
        self._traces = traces
        self._clock = clock
        self._wall = wall
        self._details: OrderedDict[tuple[int, int, bytes], str] = OrderedDict()
        self.early: Tally[tuple[Labels, str]] = Tally(clock, MAX_EARLY, _overflow)
        """Connections that ended without a decision, by labels and response flag."""
        self.handshake_failures: Counter[tuple[Side, Reason]] = Counter()
        self.failed: Counter[Reason] = Counter()
        """Connections that did not end as they should, those without a line among them."""
        self.probes = 0
        """Probes of the capture that were answered: no connections, in lines as in counts."""
        self.failure_lines = FailureLines(clock)
        self.beginnings: Beginnings | None = None
        """Who has their lines, too; None if nobody asked for them."""

    def explain(self, upcall: Upcall, detail: str) -> None:
        """Keep what a refused certificate's line will say beyond its reason."""
        if not detail:
            return
        remote = upcall.source if upcall.kind == Kind.PEER_CERTIFICATE else upcall.destination
        self._details[upcall.kind, upcall.pod, remote] = detail
        while len(self._details) > MAX_EXPLAINED:
            self._details.popitem(last=False)

    def take(self, state: State, ended: Iterable[Ended], failed: Iterable[Failed]) -> None:
        """Count and log what the core reports of one turn."""
        lines: list[Line] = []
        try:
            for connection in ended:
                lines += self._ended(state, connection)
            for handshake in failed:
                lines += self._failed(state, handshake)
        finally:
            self._sink.write(lines)

    def tick(self, *, last: bool = False) -> None:
        """Say what was left out; call about every second, and once at the end."""
        self._audit.tick(last=last)
        lines = self.failure_lines.due(all_of_them=last)
        if lines:
            self._sink.write(lines)

    def _ended(self, state: State, event: Ended) -> list[Line]:
        if event.kind == _OUTBOUND and is_probe(event.destination, event.destination_port):
            self.probes += 1
            return []
        reason = _REASONS[event.reason]
        if _FAILURE[event.reason]:
            self.failed[reason] += 1
        record = self._owner.decisions.get(event.decision) if event.decision else None
        outbound = event.kind == _OUTBOUND
        hbone = outbound and event.upstream_port == HBONE_PORT
        if record is None:
            arrival = ARRIVALS.get(event.kind)
            if arrival is not None:
                workload = self._owner.pods.workload(event.pod)
                self._owner.arrivals.undecided(workload, arrival, reason)
            found = self._early_labels(state, event, reason)
            if found is None:
                return []
            self._count_early(found, reasons.flag(reason, hbone=hbone))
        else:
            found = record.labels
            verdict = _last_verdict(record, reason)
            if verdict is not None:
                lines = functools.partial(self._lines, event, record, found)
                self._audit.ended(verdict, event.source, lambda: lines()[-1])
        spell: Callable[[], list[Line]] = functools.partial(self._lines, event, record, found)
        if event.trace_id:
            traced = self._traces.ended(event, spell())
            spell = functools.partial(list, traced)
        if self.beginnings is not None:
            spell = self.beginnings.before(event, spell)
        if _FAILURE[event.reason]:
            kind = (event.pod, event.kind, event.reason)
            return self.failure_lines.admit(kind, spell)
        return spell()

    def decided(self, core: CoreLike, record: Record) -> None:
        """Tell the audit log of a new decision, and the core what its connections' lines say."""
        for number in record.choices or (record.number,):
            decided = self._owner.decisions.get(number)
            lines = self._forms(decided) if decided is not None else []
            if decided is None or not lines:
                continue
            verdict = _verdict(decided)
            if verdict is not None:
                source = _host(decided.key.source)
                said = msgspec.structs.replace(lines[-1], source=source)
                self._audit.begun(verdict, decided.key.source, said)
            if self.beginnings or (verdict is not None and self._audit.every_end(verdict)):
                continue  # each end is reported by itself
            with contextlib.suppress(ValueError):  # too long: likewise
                core.describe(number, self._sink.form(lines))

    def _forms(self, record: Record) -> list[Line]:
        """Return the lines of connections under `record` that end as they should.

        Without what differs between them; none where there are no such connections.
        """
        match record.outcome:
            case Passthrough() | Plain() | Tunnel() | HandOver() | Verdict(allow=True):
                pass
            case _:
                return []
        key = record.key
        upstream, port = _upstream(record)
        way = _Way(key.kind, key.destination, key.port, upstream, port)
        return self._constant(way, Reason.CLOSED, record, record.labels, record.proven)

    def opened(self, each: Listed | Ended) -> list[Line]:
        """Return the lines of a connection's beginning, with its bytes and age of now."""
        record = self._owner.decisions.get(each.decision)
        if record is None:
            return []
        age_us = int(self._clock() * 1e6) - each.started_us
        lines = self._told(each, record, record.labels, Reason.CLOSED, age_us)
        return [msgspec.structs.replace(line, opened=True) for line in lines]

    def _lines(self, event: Ended, record: Record | None, found: Labels) -> list[Line]:
        return self._told(event, record, found, _REASONS[event.reason], event.duration_us)

    def _told(
        self,
        event: Ended | Listed,
        record: Record | None,
        found: Labels,
        reason: Reason,
        duration_us: int,
    ) -> list[Line]:
        started = self._wall() - (self._clock() - event.started_us / 1e6)
        way = _Way(
            event.kind,
            event.destination,
            event.destination_port,
            event.upstream,
            event.upstream_port,
        )
        if record is not None:
            proven = record.proven
        else:
            proven = self._owner.identities.get(event.identity) if event.identity else None
        return [
            msgspec.structs.replace(
                line,
                start=started,
                duration_us=duration_us,
                source=f"{_host(event.source)}:{event.source_port}",
                received=event.received,
                sent=event.sent,
            )
            for line in self._constant(way, reason, record, found, proven)
        ]

    def _constant(
        self,
        way: _Way,
        reason: Reason,
        record: Record | None,
        found: Labels,
        proven: Proven | None,
    ) -> list[Line]:
        """Return the lines of a connection, without what differs between those of its decision."""
        outbound = way.kind == _OUTBOUND
        hbone = outbound and way.upstream_port == HBONE_PORT
        destination, hbone_address = _addresses(way, record)
        line = Line(
            start=0,
            duration_us=0,
            direction="outbound" if outbound else "inbound",
            source="",
            destination=destination,
            hbone_destination=hbone_address,
            labels=found,
            received=0,
            sent=0,
            reason=reason,
            error=reasons.explain(reason, hbone=hbone),
            policy=_policy(record),
            flags=reasons.flag(reason, hbone=hbone),
            cert=_certificate(proven, found),
        )
        if record is not None and isinstance(record.outcome, Verdict):
            line = _judged(line, record.outcome)
        if record is None or not isinstance(record.outcome, HandOver):
            return [line]
        # One connection, but two pods of this node: each side says what it would across nodes.
        over = record.outcome.way
        there = msgspec.structs.replace(
            line,
            direction="inbound",
            destination=f"{_host(over.target)}:{over.port}",
            labels=record.mirror_labels,
            policy=_policy(record) or record.outcome.verdict.origin,
        )
        return [line, _judged(there, record.outcome.verdict)]

    def _failed(self, state: State, event: Failed) -> list[Line]:
        """A handshake that failed: its line has no bytes and no duration.

        One that a caller began stands for a connection that failed: nothing else here tells of
        it. The callers' side counts the connections that waited for one.
        """
        inbound = event.kind == Kind.PEER_CERTIFICATE
        reason = _REASONS[event.reason]
        self.handshake_failures[SERVER if inbound else CLIENT, reason] += 1
        detail = self._details.pop((event.kind, event.pod, event.address), "") or event.detail
        if inbound:
            workload = self._owner.pods.workload(event.pod)
            self._owner.arrivals.handshake_failed(workload, reason)
            if reason not in _NO_CONNECTION:
                found = self._handshake_labels(state, event)
                self._count_early(found, reasons.flag(reason, hbone=False))
            self._audit.failed(
                reason,
                event.address,
                lambda: self._handshake_line(state, event, detail),
            )
        kind = (event.pod, event.kind, event.reason)
        return self.failure_lines.admit(kind, lambda: [self._handshake_line(state, event, detail)])

    def _handshake_line(self, state: State, event: Failed, detail: str) -> Line:
        reason = _REASONS[event.reason]
        inbound = event.kind == Kind.PEER_CERTIFICATE
        held = self._owner.pods.by_number(event.pod)
        remote = state.workload_at(event.address)
        pod = next(iter(sorted(held.pod.addresses)), b"") if held is not None else b""
        there = address.authority(event.address, event.port)
        here = address.text(pod)
        cause = reasons.explain(reason, hbone=not inbound, handshake=True)
        now = self._wall()
        known = causes.facts(
            causes.Refused(
                reason,
                detail,
                now,
                state.identities.get(held.identity) if held is not None else None,
                remote.identity if remote is not None else "",
                self._last_end(reason, remote, now),
            )
        )
        return Line(
            start=now,
            duration_us=0,
            direction="inbound" if inbound else "outbound",
            source=there if inbound else here,
            destination=f"{_host(pod) if pod else ''}:{HBONE_PORT}" if inbound else there,
            hbone_destination="",
            labels=self._handshake_labels(state, event),
            received=0,
            sent=0,
            reason=reason,
            error=f"{cause} ({known})" if known else cause,
            policy="",
            handshake=True,
            flags=reasons.flag(reason, hbone=not inbound),
        )

    def _handshake_labels(self, state: State, event: Failed) -> Labels:
        held = self._owner.pods.by_number(event.pod)
        local = state.workload_of(held.pod) if held is not None else None
        # By its address, for nothing was proved.
        remote = state.workload_at(event.address)
        if event.kind == Kind.PEER_CERTIFICATE:
            return labels.make(labels.DESTINATION, labels.UNKNOWN, remote, local, None)
        return labels.make(labels.SOURCE, labels.UNKNOWN, local, remote, None)

    def _last_end(self, reason: Reason, remote: Workload | None, now: float) -> float | None:
        if remote is None or reason is not Reason.CERT_EXPIRED:
            return None
        return self._owner.identities.last_end(remote.identity, now)

    def _early_labels(self, state: State, event: Ended, reason: Reason) -> Labels | None:
        """Return the labels of a connection without a decision; None when nothing is to be told."""
        held = self._owner.pods.by_number(event.pod)
        key = Key(
            event.kind,
            event.pod,
            event.source,
            event.destination,
            event.destination_port,
            event.identity,
        )
        if event.kind != Kind.OUTBOUND:
            proven = self._owner.identities.get(event.identity) if event.identity else None
            return self._judge.inbound_labels(state, held, key, proven)
        if held is None:
            return labels.make(labels.SOURCE, labels.UNKNOWN, None, None, None)
        return self._judge.outbound_labels(state, held, key, Refuse(reason))

    def _count_early(self, found: Labels, flag: str) -> None:
        if flag != reasons.NO_FLAG:
            self.early.add((found, flag))


def _overflow(key: tuple[Labels, str]) -> tuple[Labels, str]:
    return labels.overflow(key[0]), key[1]


def _policy(record: Record | None) -> str:
    """Return the policy that let the connection in, kept it out, cut it, or had it in plaintext."""
    if record is None:
        return ""
    if record.killed:
        return record.cut_by
    return record.outcome.origin if isinstance(record.outcome, Verdict | Plain) else ""


def _certificate(proven: Proven | None, found: Labels) -> str:
    """Return what the client of an HBONE connection that came in has shown, else nothing.

    It is its very certificate: a decision is on one verified chain, and another one has another.
    """
    if proven is None:
        return ""
    by = labels.value(found, "destination_principal")
    return certificate(by, proven.fingerprint, proven.subject, str(proven.id))


def _verdict(record: Record) -> Verdict | None:
    """Return the verdict on who wants in; of a hand-over that of the called pod's side."""
    match record.outcome:
        case Verdict() as verdict if record.key.kind != _OUTBOUND:
            return verdict
        case HandOver(verdict=verdict):
            return verdict
        case _:
            return None


def _last_verdict(record: Record, reason: Reason) -> Verdict | None:
    """Return the verdict that a connection ended under: one of its own if it was cut."""
    verdict = _verdict(record)
    if verdict is None or reason not in _CUTS:
        return verdict
    return msgspec.structs.replace(verdict, allow=False, reason=reason, origin=record.cut_by)


def _judged(line: Line, verdict: Verdict) -> Line:
    """Return `line` with what `verdict` says beyond the policy that decided."""
    return msgspec.structs.replace(
        line,
        client=verdict.client.value if verdict.client is not None else "",
        audit_rules=verdict_words.matches(verdict.audits),
        dry_run=verdict_words.dry_run(verdict.dry_run) if verdict.dry_run is not None else "",
    )


@functools.lru_cache(maxsize=MAX_SPELLED)
def _host(packed: bytes) -> str:
    spelling = address.text(packed)
    return f"[{spelling}]" if ":" in spelling else spelling


def _upstream(record: Record) -> tuple[bytes, int]:
    """Return whom the core dials for a connection of the mesh that goes out under `record`."""
    match record.outcome:
        case Tunnel(target=target, hbone_port=port):
            return target, port
        case Plain(target=target, port=port) | HandOver(way=Tunnel(target=target, port=port)):
            return target, port
        case _:
            return record.key.destination, record.key.port


def _addresses(way: _Way, record: Record | None) -> tuple[str, str]:
    """Return whom the bytes went to, and the address inside HBONE if there was one."""
    there = _host(way.destination)
    asked = f"{there}:{way.port}"
    if way.kind == _INBOUND_HBONE:
        return f"{there}:{HBONE_PORT}", asked
    if not way.upstream:
        return asked, ""
    if way.kind != _OUTBOUND:
        return asked, ""
    dialled = f"{_host(way.upstream)}:{way.upstream_port}"
    if record is not None and isinstance(record.outcome, Tunnel):
        return dialled, record.outcome.authority
    return dialled, ""
