"""ASDEX, the application security index: what part of the connections is well protected?

This module owns the formula. It promises a number from 0.00 to 1.00 that is 1.00 only if no
connection has lost a point, and that every point lost is explained by who lost it and what it is
due to: the costs and the score add up to 1. Traffic counts, and of configuration only what let that
traffic in. Pure.

A connection that was let in has 100 points, by `WEIGHTS`: it has an attested identity, a policy
that names who may call let it in, and the further checks. Without identity it has none, for
everything else rests on that. A score is the mean over connections, so a caller of a thousand
connections weighs as much as a thousand of one. Who was refused does not count: that is defence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Final, NamedTuple

from nodeagent.admin.model import PodReport
from nodeagent.flows import Recorded, Recording
from nodeagent.observe.asdex_model import (
    SCHEMA,
    WEIGHTS,
    AsdexNamespace,
    AsdexReport,
    AsdexWorkload,
    Check,
    Loss,
)
from nodeagent.offline import Offline, pack
from ztunnel.protocol import Action, Attribute, Condition, Mode, Rule
from ztunnel.spiffe import SpiffeId, SpiffeIdError

__all__ = ["MAX_LOSSES", "build", "score", "scores"]

MAX_LOSSES: Final = 50
"""Of one workload that are named, the greatest: more than anybody looks at."""

LONGEST_CERTIFICATE: Final = timedelta(days=1)
"""That counts as short-lived: a stolen key is worth little tomorrow."""

FULL: Final = 100
"""Points of a connection that lacks nothing."""

_NAMING: Final = frozenset({Attribute.PRINCIPAL, Attribute.NAMESPACE, Attribute.SERVICE_ACCOUNT})
_STAR: Final = "*"


class _Lost(NamedTuple):
    """Why a connection lost the points of a check. Of these many flows are one loss."""

    check: Check
    reason: str
    caller: str = ""
    policy: str = ""


def score(points: int, connections: int) -> float | None:
    """Return the mean in hundredths, rounded down: 1.0 stands for nothing less."""
    return points // connections / FULL if connections else None


def scores(report: AsdexReport) -> dict[str, float]:
    """Return the score of each workload that has one."""
    return {each.workload: each.score for each in report.workloads if each.score is not None}


def build(recording: Recording, pods: Sequence[PodReport], off: Offline) -> AsdexReport:
    """Return the report of what `recording` holds. `off` is what is in force now."""
    flows: dict[str, list[Recorded]] = {pod.workload: [] for pod in pods}
    for flow in recording.flows:
        if not flow.outbound and flow.allowed and flow.destination in flows:
            flows[flow.destination].append(flow)
    rules = _rules(off)
    workloads = [_workload(pod, flows[pod.workload], off, rules) for pod in pods]
    workloads.sort(key=lambda each: each.workload)
    points = sum(each.points for each in workloads)
    connections = sum(each.connections for each in workloads)
    complete = recording.complete
    return AsdexReport(
        schema=SCHEMA,
        node=recording.node,
        time=recording.time,
        since=recording.since,
        complete=not (recording.problem or recording.truncated)
        and complete is not None
        and complete <= recording.since,
        score=score(points, connections),
        points=points,
        connections=connections,
        namespaces=tuple(_namespaces(workloads)),
        workloads=tuple(workloads),
        problem=recording.problem,
    )


def _rules(off: Offline) -> dict[str, Rule]:
    return {
        rule.origin: rule
        for policy in off.state.authorizations.values()
        if policy.action is Action.ALLOW and not policy.dry_run
        for rule in policy.rules
    }


def _workload(
    pod: PodReport, flows: Iterable[Recorded], off: Offline, rules: dict[str, Rule]
) -> AsdexWorkload:
    lost: dict[_Lost, int] = {}
    connections = points = 0
    for flow in flows:
        count = flow.connections + flow.carried
        connections += count
        points += FULL * count
        for each in _losses(flow, pod, off, rules):
            points -= _weight(each.check) * count
            lost[each] = lost.get(each, 0) + count
    losses = [
        Loss(
            check=each.check,
            cost=_weight(each.check) * count / (FULL * connections),
            connections=count,
            reason=each.reason,
            caller=each.caller,
            policy=each.policy,
        )
        for each, count in lost.items()
        if count
    ]
    losses.sort(key=lambda each: (-each.cost, each.check, each.caller, each.reason))
    return AsdexWorkload(
        workload=pod.workload,
        namespace=pod.workload.partition("/")[0],
        score=score(points, connections),
        points=points,
        connections=connections,
        losses=tuple(losses[:MAX_LOSSES]),
        left_out=sum(each.cost for each in losses[MAX_LOSSES:]),
    )


def _weight(check: Check) -> int:
    return FULL if check is Check.IDENTITY else WEIGHTS[check]


def _losses(
    flow: Recorded, pod: PodReport, off: Offline, rules: dict[str, Rule]
) -> Iterator[_Lost]:
    if flow.arrival == "plaintext":
        who = flow.workload or flow.source
        mode = off.mode(flow.destination, flow.port)
        origin = mode.origin if mode is not None else ""
        yield _Lost(Check.IDENTITY, "no identity", who or "not known one by one", origin)
        return
    yield from _of_policy(flow, off, rules)
    if flow.arrival != "hbone":
        yield _Lost(Check.ENCRYPTED, "not encrypted within the node: same_node is direct")
    mode = off.mode(flow.destination, flow.port)
    if mode is None or mode.mode is not Mode.STRICT:
        name = mode.mode.value if mode is not None else "not known"
        port = f"port {flow.port}" if flow.port else "its mode"
        yield _Lost(Check.STRICT, f"{port} is {name}", policy=mode.origin if mode else "")
    certificate = pod.certificate
    if certificate is None or certificate.not_before is None or certificate.not_after is None:
        yield _Lost(Check.SHORT_LIVED, "it has no certificate now")
    elif certificate.not_after - certificate.not_before > LONGEST_CERTIFICATE:
        hours = (certificate.not_after - certificate.not_before) // timedelta(hours=1)
        yield _Lost(Check.SHORT_LIVED, f"its certificate is valid for {hours} hours")


def _of_policy(flow: Recorded, off: Offline, rules: dict[str, Rule]) -> Iterator[_Lost]:
    """Yield what the policy lacks that lets this caller in, by what is in force now."""
    who, reason, origin = flow.identity, "", ""
    rule: Rule | None = None
    if flow.is_folded:
        who, reason = "not known one by one", "who it was is not known"
    else:
        verdict = off.judge(
            flow.destination, flow.port, _identity(flow.identity), _packed(flow.source)
        )
        if verdict is None or not verdict.allow:
            reason = "it would not be let in by what is in force now"
        elif (rule := rules.get(verdict.origin)) is None:
            reason = "no policy says who may call"
        elif not _names_callers(rule):
            reason, origin = "the rule that lets it in names no caller", rule.origin
    if reason:
        yield _Lost(Check.POLICY, reason, who, origin)
        yield _Lost(Check.EXACT, reason, who, origin)
    elif rule is not None and _has_patterns(rule):
        yield _Lost(Check.EXACT, "the rule that lets it in has patterns", who, rule.origin)


def _names_callers(rule: Rule) -> bool:
    """True where whoever the rule lets in is one that it names, more narrowly than "anybody"."""
    if any(map(_names, rule.conditions)):
        return True
    return bool(rule.sources) and all(any(map(_names, each)) for each in rule.sources)


def _names(condition: Condition) -> bool:
    named = condition.attribute in _NAMING and bool(condition.values)
    return named and _STAR not in condition.values


def _has_patterns(rule: Rule) -> bool:
    conditions = (*rule.conditions, *(each for source in rule.sources for each in source))
    return any(
        _STAR in value for each in conditions if each.attribute in _NAMING for value in each.values
    )


def _identity(text: str) -> SpiffeId | None:
    try:
        return SpiffeId.parse(text) if text else None
    except SpiffeIdError:
        return None


def _packed(text: str) -> bytes:
    try:
        return pack(text)
    except ValueError:
        return b""


def _namespaces(workloads: Iterable[AsdexWorkload]) -> Iterator[AsdexNamespace]:
    found: dict[str, tuple[int, int]] = {}
    for each in workloads:
        points, connections = found.get(each.namespace, (0, 0))
        found[each.namespace] = (points + each.points, connections + each.connections)
    for namespace, (points, connections) in sorted(found.items()):
        yield AsdexNamespace(
            namespace=namespace,
            score=score(points, connections),
            points=points,
            connections=connections,
        )
