"""Recorded flows judged again, by an old configuration and by a new one.

This module owns the replay. It promises that a flow is judged by both as it came: with the identity
that the caller proved, from its address, to the address and port that it called; that a caller or a
called workload that changes with the configuration is taken as it would be then; and that what
cannot be told is counted, and never counts as unharmed. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from nodeagent.flows import Recorded, Recording
from nodeagent.offline import Offline, pack
from nodeagent.whatif._compare import NOT_JUDGED, side
from nodeagent.whatif._model import FlowChange, Replay, Side
from nodeagent.whatif._places import places
from ztunnel.spiffe import SpiffeId, SpiffeIdError

__all__ = ["POLICY_REASONS", "domains", "judge", "replay"]

MAX_LISTED: Final = 2_000
"""Entries of each list, those with the most connections: a megabyte of JSON or two."""

MAX_SOURCES: Final = 5
"""Addresses named in one entry."""

POLICY_REASONS: Final = frozenset(
    {
        "policy_denied",
        "policy_missing",
        "strict_requires_mtls",
        "trust_domain_mismatch",
    }
)
"""Why a caller is refused by what a configuration says, and not by what it did wrong."""


class _Caller(NamedTuple):
    """Who called whom, and what becomes of it: of these many flows are one entry."""

    identity: str
    workload: str
    arrival: str
    destination: str
    port: int
    old: Side
    new: Side


def domains(recording: Recording) -> frozenset[str]:
    """Return the trust domains that were trusted: those of identities that got in."""
    found = (_identity(flow.identity) for flow in recording.flows if flow.allowed)
    return frozenset(identity.trust_domain for identity in found if identity is not None)


def replay(old: Offline, new: Offline, recording: Recording, source: str) -> Replay:
    """Return what `new` would change for the flows of `recording`, which is called `source`."""
    changed: dict[_Caller, list[Recorded]] = {}
    unknown = otherwise = elsewhere = removed = unjudged = 0
    moved = _judged_otherwise(old, new)
    known = old.workloads.keys() | new.workloads.keys()
    for flow in recording.flows:
        if flow.destination not in known:
            elsewhere += 1
            continue
        removed += flow.destination not in new.workloads
        if not flow.allowed and flow.reason not in POLICY_REASONS:
            unjudged += 1
            continue
        if flow.is_folded:
            if flow.destination in moved:
                unknown += max(flow.connections, flow.most_open)
            continue
        before, after = judge(old, new, flow)
        otherwise += before.allowed != flow.allowed
        if before.allowed != after.allowed:
            key = _Caller(
                flow.identity,
                flow.workload,
                flow.arrival,
                flow.destination,
                flow.port,
                before,
                after,
            )
            changed.setdefault(key, []).append(flow)
    entries = [_entry(key, flows) for key, flows in changed.items()]
    entries.sort(key=lambda each: (-max(each.connections, each.most_open), each.destination))
    breaks = [each for each in entries if each.old.allowed]
    admits = [each for each in entries if not each.old.allowed]
    return Replay(
        source=source,
        since=recording.since,
        oldest=recording.oldest,
        flows=len(recording.flows),
        connections=sum(flow.connections for flow in recording.flows),
        breaks=tuple(breaks[:MAX_LISTED]),
        admits=tuple(admits[:MAX_LISTED]),
        unknown=unknown,
        otherwise=otherwise,
        elsewhere=elsewhere,
        removed=removed,
        unjudged=unjudged,
        left_out=sum(max(0, len(each) - MAX_LISTED) for each in (breaks, admits)),
        truncated=recording.truncated,
        problem=recording.problem,
    )


def _judged_otherwise(old: Offline, new: Offline) -> set[str]:
    """Return the workloads where a caller of whom nothing is known may meet another verdict."""
    both = old.workloads.keys() & new.workloads.keys()
    if any(old.workloads[uid].identity != new.workloads[uid].identity for uid in both):
        # He may be one whose identity changes.
        return both
    return {uid for place in places(old, new) if place.changes for uid in place.workloads}


def judge(old: Offline, new: Offline, flow: Recorded) -> tuple[Side, Side]:
    """Return both verdicts on a flow that is not folded, and whose destination one of them knows.

    Where the old one knows nothing of it, what was is what was recorded.

    Who leaves the configuration is no longer judged.
    """
    identity = _held(old, flow)
    if flow.destination in old.workloads:
        before = _asked(old, flow, identity, _address(flow.source))
    else:
        before = Side(allowed=flow.allowed, reason=flow.reason, origin="as it was recorded")
    if flow.destination not in new.workloads:
        return before, NOT_JUDGED
    return before, _asked(new, flow, *_then(old, new, flow, identity))


def _asked(off: Offline, flow: Recorded, identity: SpiffeId | None, source: bytes) -> Side:
    """Judge a flow; at an address that its workload no longer has, at the one that it has."""
    caller = off.workloads.get(flow.workload)
    if caller is not None and identity is not None and caller.identity == str(identity):
        identity = off.shown(flow.destination, flow.port, identity)
    called = _address(flow.address)
    own = set(map(pack, off.workloads[flow.destination].addresses))
    verdict = off.judge(
        flow.destination, flow.port, identity, source, called if called in own else None
    )
    return side(verdict)


def _then(
    old: Offline, new: Offline, flow: Recorded, identity: SpiffeId | None
) -> tuple[SpiffeId | None, bytes]:
    """Return what the caller would show: another identity or address, if its workload gets one."""
    source = _address(flow.source)
    before, after = old.workloads.get(flow.workload), new.workloads.get(flow.workload)
    if before is None or after is None or before.identity != (str(identity) if identity else ""):
        return identity, source
    if after.identity != before.identity:
        identity = _identity(after.identity)
    if flow.source in before.addresses and flow.source not in after.addresses and after.addresses:
        source = pack(after.addresses[0])
    return identity, source


def _held(old: Offline, flow: Recorded) -> SpiffeId | None:
    """Return the identity that the caller has, also where DISABLE kept it from showing it."""
    caller = old.workloads.get(flow.workload)
    if not flow.identity and caller is not None and caller.identity:
        mine = _identity(caller.identity)
        if old.shown(flow.destination, flow.port, mine) is None:
            return mine
    return _identity(flow.identity)


def _identity(text: str) -> SpiffeId | None:
    try:
        return SpiffeId.parse(text) if text else None
    except SpiffeIdError:
        return None


def _address(text: str) -> bytes:
    try:
        return pack(text)
    except ValueError:
        return b""


def _entry(key: _Caller, flows: Iterable[Recorded]) -> FlowChange:
    known = list(flows)
    sources = dict.fromkeys(flow.source for flow in known)
    return FlowChange(
        identity=key.identity,
        workload=key.workload,
        sources=tuple(sources)[:MAX_SOURCES],
        source_count=len(sources),
        arrival=key.arrival,
        destination=key.destination,
        port=key.port,
        connections=sum(flow.connections for flow in known),
        most_open=sum(flow.most_open for flow in known),
        first=min(flow.first for flow in known),
        last=max(flow.last for flow in known),
        old=key.old,
        new=key.new,
    )
