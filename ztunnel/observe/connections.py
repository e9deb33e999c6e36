"""What the core lists of its connections, joined with what is behind its numbers. Pure.

This module owns the join of a listed connection with its decision, and so with workloads, services,
identities, policy and mode, and the pages that the seam takes. It promises that an identity was
proved or decided by, and never guessed from an address; and that everything in a page is a value.
It may not ask the core, read a clock or wait.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import msgspec

from ztunnel import address
from ztunnel.audit.entry import policy_of
from ztunnel.authorize import Verdict
from ztunnel.connection_messages import Connection, Direction, Security
from ztunnel.corelike import Kind
from ztunnel.observe import labels
from ztunnel.route import HandOver, Passthrough, Plain, Tunnel
from ztunnel.state import HBONE_PORT

if TYPE_CHECKING:
    from ztunnel._core import Listed
    from ztunnel.decisions import Decisions, Record
    from ztunnel.identities import Identities
    from ztunnel.pods import Pods
    from ztunnel.state import State

__all__ = ["PAGE_BYTES", "Joiner", "paged"]

PAGE_BYTES: Final = 2 * 1024 * 1024
"""JSON of one page: half of what a frame of the seam may have."""

MAX_SPELLED: Final = 4096
"""Addresses whose text is kept: those that a node talks to, again and again."""

_OUTBOUND: Final = int(Kind.OUTBOUND)
_INBOUND_HBONE: Final = int(Kind.INBOUND_HBONE)


class _Behind(Protocol):
    """What of the tunnel is read here."""

    state: State
    decisions: Decisions
    identities: Identities
    pods: Pods


class _Known(NamedTuple):
    """What all connections of one decision have in common."""

    security: Security = Security.UNDECIDED
    source_workload: str = ""
    source_identity: str = ""
    destination_workload: str = ""
    destination_identity: str = ""
    service: str = ""
    policy: str = ""
    rule: str = ""


class Joiner:
    """Joins the connections of one snapshot.

    `process` tells this process' connections from another's. `offset` is what makes the core's
    monotonic seconds seconds since the epoch.
    """

    def __init__(self, behind: _Behind, process: int, states: Sequence[str], offset: float) -> None:
        self._behind = behind
        self._process = process
        self._states = states
        self._offset = offset
        self._known: dict[int, _Known] = {}

    def join(self, listed: Listed) -> Connection:
        outbound = listed.kind == _OUTBOUND
        known = self._of(listed)
        proven = self._behind.identities.get(listed.identity) if listed.identity else None
        # Of the other side of HBONE: what it has proved on this very connection.
        identity = str(proven.id) if proven is not None else ""
        held = self._behind.pods.by_number(listed.pod)
        destination = _place(listed.destination, listed.destination_port)
        hbone = ""
        if listed.kind == _INBOUND_HBONE:
            hbone = _place(listed.destination, HBONE_PORT)
        elif listed.upstream:
            upstream = _place(listed.upstream, listed.upstream_port)
            if known.security is Security.MUTUAL_TLS:
                hbone = upstream
            elif outbound:
                destination = upstream
        if outbound and known.security is Security.MUTUAL_TLS:
            destination = self._authority(listed) or destination
        return Connection(
            id=f"{self._process}.{listed.number}",
            pod=held.pod.workload if held is not None else "",
            direction=Direction.OUTBOUND if outbound else Direction.INBOUND,
            state=self._states[listed.state],
            security=known.security,
            source=_place(listed.source, listed.source_port),
            source_workload=known.source_workload,
            source_identity=known.source_identity if outbound else identity,
            destination=destination,
            destination_workload=known.destination_workload,
            destination_identity=(identity if outbound else "") or known.destination_identity,
            service=known.service,
            hbone=hbone,
            tls_version=listed.tls_version,
            cipher=listed.cipher,
            key_exchange=listed.group,
            policy=known.policy,
            rule=known.rule,
            started=self._moment(listed.started_us),
            moved=self._moment(listed.moved_us) if listed.moved_us else None,
            received=listed.received,
            sent=listed.sent,
        )

    def _of(self, listed: Listed) -> _Known:
        record = self._behind.decisions.get(listed.decision) if listed.decision else None
        if record is None:
            return self._undecided(listed)
        known = self._known.get(listed.decision)
        if known is None:
            known = self._known[listed.decision] = _known(record)
        return known

    def _undecided(self, listed: Listed) -> _Known:
        """Return what the addresses say of a connection that waits for its decision."""
        state = self._behind.state
        source = state.workload_at(listed.source)
        destination = state.workload_at(listed.destination)
        return _Known(
            source_workload=source.uid if source is not None else "",
            destination_workload=destination.uid if destination is not None else "",
        )

    def _authority(self, listed: Listed) -> str:
        record = self._behind.decisions.get(listed.decision)
        outcome = record.outcome if record is not None else None
        return outcome.authority if isinstance(outcome, Tunnel) else ""

    def _moment(self, microseconds: int) -> datetime:
        return datetime.fromtimestamp(microseconds / 1e6 + self._offset, UTC)


def _known(record: Record) -> _Known:
    said = record.labels
    outcome = record.outcome
    verdict: Verdict | None = None
    security = Security.UNDECIDED
    match outcome:
        case Tunnel():
            security = Security.MUTUAL_TLS
        case HandOver(verdict=verdict):
            security = Security.DIRECT
        case Plain():
            security = Security.PLAINTEXT
        case Passthrough():
            security = Security.PASSTHROUGH
        case Verdict():
            verdict = outcome
            inside = record.key.kind == _INBOUND_HBONE
            security = Security.MUTUAL_TLS if inside else Security.PLAINTEXT
        case _:
            pass
    policy = rule = ""
    if verdict is not None:
        decided = policy_of(verdict.origin, None if verdict.allow else verdict.reason)
        policy = f"{decided.namespace}/{decided.name}" if decided.namespace else decided.name
        rule = decided.origin
    elif isinstance(outcome, Plain) and outcome.origin:
        decided = policy_of(outcome.origin)
        policy, rule = f"{decided.namespace}/{decided.name}", decided.origin
    return _Known(
        security,
        _workload(said, "source"),
        labels.value(said, "source_principal"),
        _workload(said, "destination"),
        labels.value(said, "destination_principal"),
        labels.value(said, "destination_service"),
        policy,
        rule,
    )


def _workload(said: labels.Labels, side: str) -> str:
    name = labels.value(said, f"{side}_workload")
    return f"{labels.value(said, f'{side}_workload_namespace')}/{name}" if name else ""


@functools.lru_cache(maxsize=MAX_SPELLED)
def _host(packed: bytes) -> str:
    spelling = address.text(packed)
    return f"[{spelling}]" if ":" in spelling else spelling


def _place(packed: bytes, port: int) -> str:
    return f"{_host(packed)}:{port}"


def paged(connections: Iterable[Connection], limit: int) -> list[list[msgspec.Raw]]:
    """Return the newest `limit` connections (0: all), as JSON, in pages of PAGE_BYTES at most.

    At least one page, which may be empty.
    """
    newest = sorted(connections, key=lambda each: (each.started, each.id), reverse=True)
    pages: list[list[msgspec.Raw]] = [[]]
    room = PAGE_BYTES
    for connection in newest[:limit] if limit else newest:
        text = msgspec.json.encode(connection)
        if len(text) > room:
            pages.append([])
            room = PAGE_BYTES
        room -= len(text) + 1
        pages[-1].append(msgspec.Raw(text))
    return pages
