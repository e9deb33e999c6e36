"""From facts to the report: every finding, its cause in the place of its symptoms, one verdict.

This module owns the order, the hiding and the verdict. It promises that a finding is hidden only
while its cause is shown, and never lost: what is hidden is in the report too. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nodeagent.doctor import _node, _pods, _trust
from nodeagent.doctor._make import finding
from nodeagent.doctor.codes import CODES
from nodeagent.doctor.facts import Facts, Unexamined
from nodeagent.doctor.model import NODE, SCHEMA, Finding, Hidden, Report, Severity

__all__ = ["judge", "sort_out"]

_ORDER = {severity: number for number, severity in enumerate(Severity)}


def judge(facts: Facts) -> Report:
    found = [*_node.judge(facts), *_trust.judge(facts), *_pods.judge(facts)]
    found += [_unexamined(each) for each in facts.unexamined]
    shown, hidden = sort_out(found)
    healthy = all(each.severity is Severity.NOTE for each in shown)
    return Report(
        schema=SCHEMA,
        time=facts.now,
        node=facts.node,
        release=facts.release,
        healthy=healthy,
        verdict=_verdict(facts, shown, hidden),
        findings=tuple(shown),
        hidden=tuple(hidden),
        examined={
            "kernel features": len(facts.features),
            "pods": sum(not look.problem for look in facts.pods),
            "probes": sum(len(look.probes) for look in facts.pods),
            "peers": len(facts.peers),
            "certificates": _certificates(facts),
            "daemons": sum(each is not None for each in (facts.nodeagent, facts.ztunnel)),
        },
    )


def sort_out(found: Sequence[Finding]) -> tuple[list[Finding], list[Hidden]]:
    """Return what is to be shown, the worst first, and what its causes hide."""
    shown: list[Finding] = []
    hidden: list[Hidden] = []
    for each in found:
        cause = next(_causes(each, found), None)
        if cause is None:
            shown.append(each)
        else:
            hidden.append(Hidden(cause=_root_cause(cause, found).code, finding=each))
    shown.sort(key=lambda each: (_ORDER[each.severity], each.code, each.affects))
    return shown, hidden


def _causes(symptom: Finding, found: Sequence[Finding]) -> Iterator[Finding]:
    known = CODES[symptom.code].hidden_by
    for each in found:
        if each.code in known and _concerns(each, symptom):
            yield each


def _root_cause(cause: Finding, found: Sequence[Finding]) -> Finding:
    """Return the cause that is itself shown. Ends: the catalogue's causes form no circle."""
    deeper = next(_causes(cause, found), None)
    return cause if deeper is None else _root_cause(deeper, found)


def _concerns(cause: Finding, symptom: Finding) -> bool:
    """Whether one may be due to the other: a cause on the whole node concerns everything, and what
    is nobody's in particular may be due to anything.
    """
    if NODE in cause.affects or symptom.affects == (NODE,):
        return True
    return not {*cause.affects}.isdisjoint(symptom.affects)


def _unexamined(each: Unexamined) -> Finding:
    return finding(
        "NA9001",
        f"{each.what}: {each.why}",
        "what could be wrong there is not known",
        *([each.command] if each.command else []),
    )


def _certificates(facts: Facts) -> int:
    status = facts.agent.status
    own = len(facts.authority.certificates) if facts.authority is not None else 0
    return own + (len(status.certificates) if status is not None else 0)


def _verdict(facts: Facts, shown: Sequence[Finding], hidden: Sequence[Hidden]) -> str:
    counts = {severity: sum(each.severity is severity for each in shown) for severity in Severity}
    parts = [
        f"{count} {severity}{'s' if count != 1 else ''}"
        for severity, count in counts.items()
        if count
    ]
    if hidden:
        parts.append(f"{len(hidden)} more that these explain")
    pods = sum(not look.problem for look in facts.pods)
    looked = f"{pods} pod{'s' if pods != 1 else ''} examined"
    if not counts[Severity.ERROR] and not counts[Severity.WARNING]:
        return f"{facts.node}: nothing is wrong, {', '.join([looked, *parts])}"
    return f"{facts.node}: {', '.join(parts)}; {looked}"
