"""What `nodeagent policy explain` says: lines from an explanation, as values.

This module owns the words that an operator reads. It promises lines of at most `WIDTH` columns as
far as names allow, the verdict in the first of them, and that what is left out is counted. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from nodeagent.cli.text import many, wrapped
from nodeagent.offline import (
    Answer,
    Explanation,
    MissReport,
    PassedOverReport,
    RuleReport,
    UnreadReport,
)

__all__ = ["lines", "summary"]

_NEAREST: Final = 5
"""Rules of one action that are shown; an operator looks for the one that was meant to match."""

_WHOLE: Final = 3
"""Answers that are told whole: a service may have one for each of its endpoints."""

_VALUES: Final = 4
"""Values of a condition that are shown; lists may have thousands."""

_NAMED: Final = 8
"""Destinations or policies that are named in one answer."""

_PASSED_OVER: Final = 3
"""Policies for other workloads that are shown: the one that was meant for this one, perhaps."""

_LABEL: Final = 11
"""Columns of the label in front of each fact."""

_CLIENTS: Final = {
    "without_identity": "plaintext",
    "identity_not_allowed": "with identity, but not an allowed one",
    "identity_allowed": "with identity, and allowed",
}

_LEVELS: Final = {
    "port": "set for this port by",
    "workload": "set for the workload by",
    "namespace": "set for the namespace by",
    "mesh": "set for the mesh by",
    "default": "no PeerAuthentication sets it",
}

_ORDER: Final = ("DENY", "ALLOW", "AUDIT")


def lines(explanation: Explanation, *, everything: bool) -> Iterator[str]:
    """Yield the lines. With `everything` no rule and no value is left out."""
    answers = explanation.answers
    whole = len(answers) if everything else _WHOLE
    for number, answer in enumerate(answers[:whole]):
        if number:
            yield ""
        yield from _answer(explanation, answer, everything=everything)
    yield from _short(answers[whole:], "", everything=everything)
    several = len(answers) > 1 or len(explanation.without_identity) > 1
    without = "Without its identity (plaintext): "
    if several:
        yield from _short(explanation.without_identity, without, everything=everything)
    else:
        for answer in explanation.without_identity:
            yield ""
            yield from wrapped(without + summary(answer))


def _short(answers: Sequence[Answer], prefix: str, *, everything: bool) -> Iterator[str]:
    """Yield verdicts and grounds only."""
    shown = answers if everything else answers[:_NAMED]
    for answer in shown:
        yield ""
        yield from wrapped(f"To {_destinations(answer)}")
        yield from wrapped(prefix + summary(answer), 2)
    if len(answers) > len(shown):
        yield ""
        yield f"And {len(answers) - len(shown)} more answers: --all shows them"


def summary(answer: Answer) -> str:
    """Return verdict and grounds in one line."""
    return f"{_verdict(answer)}: {_grounds(answer)}"


def _verdict(answer: Answer) -> str:
    if not answer.judged:
        return "NOT JUDGED"
    return "ALLOWED" if answer.allowed else "REFUSED"


def _grounds(answer: Answer) -> str:
    """Return what the verdict rests on."""
    if not answer.judged:
        return answer.cause
    if answer.default_deny:
        count = len(answer.default_deny)
        policies = "ALLOW policy" if count == 1 else f"{count} ALLOW policies"
        return f"default deny, no rule of the {policies} for it matches"
    decided = next((rule for rule in answer.rules if rule.decided), None)
    if decided is not None:
        return f"{decided.action} {decided.rule.text}{_unread(decided.unread)}"
    by = answer.by
    if not answer.allowed:
        return f"{answer.reason}{f', {by.text}' if by is not None else ''}: {answer.cause}"
    if by is not None and not by.line and by.name != "default":
        return by.name
    trial = any(policy.action == "ALLOW" for policy in answer.policies)
    enforced = " that is enforced" if trial else ""
    return f"no DENY rule matches, and no ALLOW policy{enforced} is for this workload"


def _answer(explanation: Explanation, answer: Answer, *, everything: bool) -> Iterator[str]:
    yield from wrapped(f"{explanation.source} -> {explanation.destination}: {_verdict(answer)}")
    yield from _fact("by", _grounds(answer))
    for place in answer.default_deny[:_NAMED]:
        yield from _fact("", f"- {place.text}")
    if len(answer.default_deny) > _NAMED:
        yield from _fact("", f"- and {len(answer.default_deny) - _NAMED} more")
    yield from _fact("caller", _caller(answer))
    yield from _fact("to", _destinations(answer))
    if not answer.judged:
        return
    yield from _fact("class", f"{answer.client}: {_CLIENTS[answer.client]}")
    if answer.mtls is not None:
        level = _LEVELS[answer.mtls.level]
        by = "" if answer.mtls.level == "default" else f" {answer.mtls.by.text}"
        left = "; callers leave their identity out" if answer.mtls.mode == "DISABLE" else ""
        yield from _fact("mTLS", f"{answer.mtls.mode}, {level}{by}{left}")
    for audit in answer.audits:
        yield from _fact("audit", f"marked by {_marked(audit)}")
    if answer.dry_run is not None:
        would = "ALLOWED" if answer.dry_run.allowed else "REFUSED"
        by = f" by {answer.dry_run.by.text}" if answer.dry_run.by.text else ""
        yield from _fact("dry run", f"would be {would}{by}, if it were enforced")
        for audit in answer.dry_run.audits:
            yield from _fact("", f"would be marked by {_marked(audit)}")
    yield from _fact("config", explanation.configuration)
    yield from _rules(answer, everything=everything)
    shown = answer.passed_over if everything else answer.passed_over[:_PASSED_OVER]
    if shown and answer.asked_policy:
        yield ""
        yield "Not for this workload, by their selectors, the nearest first:"
        for passed in shown:
            yield from wrapped(f"{passed.action} {passed.policy.text}: {_lacks(passed)}", 2)


def _caller(answer: Answer) -> str:
    where = f" from {_some(answer.sources)}" if answer.sources else ""
    way = ", HBONE" if answer.way == "hbone" else ", plaintext"
    return f"{answer.identity or 'no identity'}{where}{way}"


def _destinations(answer: Answer) -> str:
    return _some(
        [
            f"{each.workload or 'no workload'} at {_authority(each.address, each.port)}"
            for each in answer.destinations
        ]
    )


def _some(names: Sequence[str]) -> str:
    left = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {left} more" if left > 0 else "")


def _authority(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _marked(audit: UnreadReport) -> str:
    return audit.rule.text + _unread(audit.unread)


def _unread(fields: Sequence[str]) -> str:
    return f", without {', '.join(fields)} (not read at layer 4)" if fields else ""


def _rules(answer: Answer, *, everything: bool) -> Iterator[str]:
    if not answer.policies:
        yield ""
        yield "No AuthorizationPolicy is for this workload."
        return
    if not answer.asked_policy:
        yield ""
        count = len(answer.policies)
        yield from wrapped(
            f"AuthorizationPolicy was not asked: {count} would come next. Mend the above first."
        )
        return
    decided = next((rule.action for rule in answer.rules if rule.decided), "")
    first = "ALLOW" if answer.default_deny else decided
    for action in sorted(_ORDER, key=lambda each: (each != first, _ORDER.index(each))):
        yield from _of_action(answer, action, everything=everything)
    if answer.left_out:
        yield ""
        yield "Left out:"
        for rule in answer.left_out:
            yield from wrapped(f"{rule.rule.text}: {rule.reason}", 2)


def _of_action(answer: Answer, action: str, *, everything: bool) -> Iterator[str]:
    policies = [each for each in answer.policies if each.action == action]
    if not policies:
        return
    rules = [each for each in answer.rules if each.action == action]
    shown = rules if everything else rules[:_NEAREST]
    yield ""
    yield f"{action}, {many(len(policies), 'policy', 'policies')}, the nearest rule first:"
    # What a caller without an identity, or with one of another form, does not have.
    none = "none, for its identity is of another form" if answer.identity else "none (no identity)"
    for rule in shown:
        yield from wrapped(f"{rule.rule.text}: {_match(rule)}{_unread(rule.unread)}", 2)
        for miss in rule.missing:
            yield from wrapped(_miss(miss, miss.seen or none, everything=everything), 4)
    empty = [each for each in policies if not each.rules]
    for policy in empty if everything else empty[:_NEAREST]:
        note = " (dry run)" if policy.dry_run else ""
        yield from wrapped(f"{policy.place.text}: has no rule that could match{note}", 2)
    left = len(rules) - len(shown)
    if not everything:
        left += max(0, len(empty) - _NEAREST)
    if left:
        yield f"  and {left} more, none of them nearer: --all shows them"


def _match(rule: RuleReport) -> str:
    note = " (dry run)" if rule.dry_run else ""
    if rule.decided:
        return "matches, and decides"
    if rule.matches:
        return f"matches{note}"
    return f"{many(len(rule.missing), 'condition')} short{note}"


def _miss(miss: MissReport, seen: str, *, everything: bool) -> str:
    parts = []
    if miss.wanted:
        parts.append(f"wants {_values(miss.wanted, everything=everything)}")
    if miss.excluded:
        parts.append(f"excludes {_values(miss.excluded, everything=everything)}")
    return f"{miss.part} {miss.attribute}: {' and '.join(parts)}; is {seen}"


def _values(values: Sequence[str], *, everything: bool) -> str:
    shown = values if everything else values[:_VALUES]
    left = len(values) - len(shown)
    return " or ".join(shown) + (f" or {left} more" if left else "")


def _lacks(passed: PassedOverReport) -> str:
    return " and ".join(
        f"wants {each.label}={each.wanted}; " + (f"is {each.seen}" if each.seen else "has none")
        for each in passed.lacks
    )


def _fact(label: str, text: str) -> Iterable[str]:
    return wrapped(text, _LABEL, f"  {label:<{_LABEL - 2}}")
