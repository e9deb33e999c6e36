"""The plaintext report: who calls without an identity, and would STRICT lock anybody out?

This module owns the verdict. It promises that a caller is judged by the tunnel's own rules, with
the modes of now and with STRICT, exactly as `nodeagent policy diff` judges it; that "safe" is said
only where every caller of the whole time is known, those among them who are connected since before
the capture; and that what cannot be told never counts as safe. Pure.

STRICT here is the mode of the workload. A port that has a mode of its own keeps it, as it would
after the change of a namespace's or workload's mode.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Final, NamedTuple

from nodeagent import whatif
from nodeagent.admin.model import PodReport, PodState
from nodeagent.flows import Recorded, Recording
from nodeagent.observe.plaintext_model import (
    SCHEMA,
    Effect,
    Origin,
    OwnMode,
    PlaintextCaller,
    PlaintextNamespace,
    PlaintextReport,
    PlaintextWorkload,
    Verdict,
    worst,
)
from nodeagent.offline import Offline, pack
from ztunnel.protocol import Mode

__all__ = ["MAX_CALLERS", "build", "known_since"]

MAX_CALLERS: Final = 500
"""Of one workload in one report, those that would break first: more than anybody looks at."""

_CAPTURED: Final = frozenset({PodState.ENROLLED, PodState.DEGRADED, PodState.WAITING})
"""States in which nobody is let in unseen."""

_ORDER: Final = tuple(Effect)

_OLDER: Final = (
    "connected since before the capture, and cut by STRICT; end that connection to see whether it "
    "comes back with an identity"
)
"""Of a workload of the mesh: its next call may be a tunnel's."""

_DISABLED: Final = "not asked for its identity: the mode is DISABLE; make it PERMISSIVE first"


class _Judged(NamedTuple):
    effect: Effect
    reason: str
    policy: str = ""


class _Key(NamedTuple):
    kind: Origin
    workload: str
    source: str
    port: int
    judged: _Judged


def build(
    recording: Recording,
    pods: Sequence[PodReport],
    node_addresses: Collection[str],
    off: Offline,
) -> PlaintextReport:
    """Return the report of what `recording` holds. `off` is what is in force now."""
    strict = off.strictly(pod.workload for pod in pods)
    flows: dict[str, list[Recorded]] = {pod.workload: [] for pod in pods}
    for flow in recording.flows:
        if not flow.outbound:
            flows.setdefault(flow.destination, []).append(flow)
    known = {pod.workload: pod for pod in pods}
    judge = _Judge(off, strict, node_addresses)
    workloads = [
        _workload(uid, known.get(uid), found, recording, judge)
        for uid, found in sorted(flows.items())
        # Who is gone matters only if somebody without identity called it.
        if uid in known or any(_is_let_in(flow) for flow in found)
    ]
    return PlaintextReport(
        schema=SCHEMA,
        node=recording.node,
        time=recording.time,
        since=recording.since,
        complete=recording.complete,
        verdict=worst(each.verdict for each in workloads),
        namespaces=tuple(_namespaces(workloads)),
        workloads=tuple(workloads),
        gaps=recording.gaps,
        down=recording.down,
        truncated=recording.truncated,
        problem=recording.problem,
    )


def known_since(recording: Recording, workload: str) -> datetime | None:
    """Return from when on whoever called a workload is recorded; None: this is not so now."""
    watched = recording.watched.get(workload)
    if recording.problem or recording.complete is None or watched is None:
        return None
    return max(recording.complete, watched)


def _is_let_in(flow: Recorded) -> bool:
    return flow.allowed and not flow.identity and flow.arrival == "plaintext"


class _Judge:
    """Judges callers without identity."""

    def __init__(self, off: Offline, strict: Offline, node_addresses: Collection[str]) -> None:
        self._off = off
        self._strict = strict
        self._node = frozenset(node_addresses)

    def key(self, flow: Recorded) -> _Key:
        return _Key(self._kind(flow), flow.workload, flow.source, flow.port, self._judged(flow))

    def older(self, pod: PodReport, recording: Recording) -> Iterator[tuple[_Key, Recorded]]:
        """Yield who is connected since before the capture, as if it had called now."""
        for each in pod.older:
            there = self._off.workload_at(pack(each.source)) if each.source else None
            flow = Recorded(
                identity="",
                source=each.source,
                workload=there.uid if there is not None else "",
                arrival="plaintext",
                destination=pod.workload,
                address="",
                port=each.port,
                allowed=True,
                reason="",
                first=recording.since,
                last=recording.time,
                connections=each.connections,
                most_open=each.connections,
                received=0,
                sent=0,
            )
            key = self.key(flow)
            if key.judged.effect is Effect.BREAKS and self._off.judged(flow.workload):
                key = key._replace(judged=_Judged(Effect.NOT_KNOWN, _OLDER))
            yield key, flow

    def _kind(self, flow: Recorded) -> Origin:
        if flow.is_folded:
            return Origin.UNKNOWN
        if flow.workload:
            return Origin.POD
        return Origin.NODE if flow.source in self._node else Origin.OUTSIDE

    def _judged(self, flow: Recorded) -> _Judged:
        # What a policy refused may be let in by now, and STRICT would refuse it.
        if not flow.allowed and flow.reason not in whatif.POLICY_REASONS:
            return _Judged(Effect.REFUSED, flow.reason, flow.policy)
        if flow.destination not in self._off.workloads:
            return _Judged(Effect.NOT_KNOWN, "the workload that it called is gone")
        if flow.is_folded:
            policy = self._off.state.policies.get(flow.destination)
            if not flow.allowed and policy is not None and policy.mode is Mode.STRICT:
                return _Judged(Effect.REFUSED, flow.reason)
            return _Judged(Effect.NOT_KNOWN, "callers that were not recorded one by one")
        before, after = whatif.judge(self._off, self._strict, flow)
        if not before.allowed:
            return _Judged(Effect.REFUSED, before.reason, before.origin)
        if not after.allowed:
            return _Judged(Effect.BREAKS, after.reason, after.origin)
        mode = self._off.mode(flow.destination, flow.port)
        then = self._strict.mode(flow.destination, flow.port)
        if then is None:
            return _Judged(Effect.NOT_KNOWN, "nobody judges who calls it: it is not in the mesh")
        if then.mode is Mode.STRICT:
            if mode is not None and mode.mode is Mode.DISABLE and flow.workload:
                return _Judged(Effect.NOT_KNOWN, _DISABLED, mode.origin)
            return _Judged(Effect.STAYS, "let in under STRICT, too", after.origin)
        return _Judged(Effect.STAYS, f"port {flow.port} keeps {then.mode.value}", then.origin)


def _workload(
    uid: str,
    pod: PodReport | None,
    flows: Iterable[Recorded],
    recording: Recording,
    judge: _Judge,
) -> PlaintextWorkload:
    callers: dict[_Key, list[Recorded]] = {}
    with_identity = 0
    for flow in flows:
        if flow.identity or flow.arrival != "plaintext":
            with_identity += _connections(flow) if flow.allowed else 0
        else:
            callers.setdefault(judge.key(flow), []).append(flow)
    for key, flow in judge.older(pod, recording) if pod is not None else ():
        callers.setdefault(key, []).append(flow)
    entries = [_caller(key, found) for key, found in callers.items()]
    entries.sort(key=lambda each: (_ORDER.index(each.effect), -each.connections, each.source))
    since = known_since(recording, uid)
    counts = Counter(each.effect for each in entries)
    reasons = list(_reasons(pod, counts, since, recording, entries))
    let_in = [flow for found in callers.values() for flow in found if flow.allowed]
    return PlaintextWorkload(
        workload=uid,
        namespace=uid.partition("/")[0],
        state=pod.state.value if pod is not None else "",
        mode=pod.mode if pod is not None else "",
        mode_origin=pod.mode_origin if pod is not None else "",
        port_modes=tuple(
            OwnMode(port=each.port, mode=each.mode, origin=each.origin)
            for each in (pod.port_modes if pod is not None else ())
        ),
        verdict=worst(verdict for verdict, _ in reasons),
        reasons=tuple(text for _, text in reasons),
        since=since,
        without_identity=sum(map(_connections, let_in)),
        with_identity=with_identity,
        refused=sum(each.connections for each in entries if each.effect is Effect.REFUSED),
        last=max((flow.last for flow in let_in), default=None),
        callers=tuple(entries[:MAX_CALLERS]),
        left_out=max(0, len(entries) - MAX_CALLERS),
    )


def _connections(flow: Recorded) -> int:
    return flow.connections + flow.carried


def _caller(key: _Key, flows: Sequence[Recorded]) -> PlaintextCaller:
    return PlaintextCaller(
        kind=key.kind,
        workload=key.workload,
        source=key.source,
        port=key.port,
        connections=sum(map(_connections, flows)),
        first=min(flow.first for flow in flows),
        last=max(flow.last for flow in flows),
        effect=key.judged.effect,
        reason=key.judged.reason,
        policy=key.judged.policy,
    )


def _reasons(
    pod: PodReport | None,
    counts: Counter[Effect],
    since: datetime | None,
    recording: Recording,
    entries: Iterable[PlaintextCaller],
) -> Iterable[tuple[Verdict, str]]:
    """Yield what speaks for a verdict, the heaviest first; what is STRICT already is safe."""
    if pod is None:
        yield Verdict.NOT_KNOWN, "it is gone, and callers without identity may call its successor"
        return
    if counts[Effect.BREAKS]:
        breaking = [each for each in entries if each.effect is Effect.BREAKS]
        total = sum(each.connections for each in breaking)
        places = len({(each.source, each.workload) for each in breaking})
        yield (
            Verdict.NOT_SAFE,
            f"callers without identity would be refused: {places}, connections: {total}",
        )
    unknown = {each.reason for each in entries if each.effect is Effect.NOT_KNOWN}
    for reason in sorted(unknown):
        yield Verdict.NOT_KNOWN, reason
    if pod.state not in _CAPTURED:
        yield Verdict.NOT_KNOWN, f"its pod is {pod.state.value}: not captured for certain"
        return
    if pod.mode == Mode.STRICT.value:
        yield Verdict.SAFE, "it is STRICT already"
        return
    if recording.truncated:
        yield Verdict.NOT_KNOWN, "more was recorded than was looked at: ask for less time"
    if since is None:
        why = "connections from before its capture are open, and were never judged"
        if not pod.older:
            why = recording.problem or "its callers are not recorded without a gap now"
        yield Verdict.NOT_KNOWN, why
    elif since > recording.since:
        yield (
            Verdict.NOT_KNOWN,
            "its callers are recorded without a gap for a part of the time",
        )
    elif not counts:
        yield Verdict.SAFE, "nobody has called without identity"
    elif not counts[Effect.BREAKS] and not unknown:
        yield Verdict.SAFE, "nobody who called without identity is let in by its mode alone"


def _namespaces(workloads: Iterable[PlaintextWorkload]) -> Iterable[PlaintextNamespace]:
    found: dict[str, Counter[Verdict]] = {}
    for each in workloads:
        found.setdefault(each.namespace, Counter())[each.verdict] += 1
    for namespace, counts in sorted(found.items()):
        yield PlaintextNamespace(
            namespace=namespace,
            verdict=worst(counts),
            safe=counts[Verdict.SAFE],
            not_safe=counts[Verdict.NOT_SAFE],
            not_known=counts[Verdict.NOT_KNOWN],
        )
