"""Why a connection is allowed or refused, as one report.

This module owns the shape of the report, which `policy explain -o json` publishes. It promises that
every verdict in it is ztunnel's own; that questions with one answer are answered once; and that
within one `EXPLAIN_SCHEMA` fields are only added. It is pure, and words no sentence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from nodeagent.offline._ask import PLAINTEXT, Caller, Target, as_seen, is_itself, judge, sources
from nodeagent.offline._offline import ModeInForce, Offline, PassedOver
from ztunnel import address
from ztunnel.authorize import Verdict
from ztunnel.policy import DEFAULT_DENY, Match
from ztunnel.policy.explain import Considered, Miss
from ztunnel.protocol import Authorization
from ztunnel.reasons import CAUSES, Reason

__all__ = [
    "EXPLAIN_SCHEMA",
    "Answer",
    "Destination",
    "DryRunReport",
    "Explanation",
    "LackReport",
    "LeftOutReport",
    "MissReport",
    "ModeReport",
    "PassedOverReport",
    "Place",
    "PolicyReport",
    "RuleReport",
    "UnreadReport",
    "explain",
]

EXPLAIN_SCHEMA: Final = 1

HBONE: Final = "hbone"

ITSELF: Final = "within its own pod, whose calls to itself nobody judges"
OUTSIDE: Final = (
    "outside the mesh, where no agent judges who calls; a WorkloadEntry enters it by its "
    "annotation nodeagent.io/netns"
)

PASSED_OVER: Final = 20
"""Policies that do not count and are told: enough to find the one with a misspelt label."""

_PLACE: Final = re.compile(r"(.+) \((.+):([0-9]+)\)", re.DOTALL)


class Place(msgspec.Struct, frozen=True):
    """What said so: a rule, a policy or a setting, where it is written, and both as the log has it.

    `file` is empty and `line` 0 for what stands in no file.
    """

    name: str
    file: str
    line: int
    text: str

    @classmethod
    def of(cls, origin: str) -> Place:
        found = _PLACE.fullmatch(origin)
        # A default deny names several policies, each with its own place.
        if found is None or origin.startswith(DEFAULT_DENY):
            return cls(origin, "", 0, origin)
        return cls(found[1], found[2], int(found[3]), origin)


class Destination(msgspec.Struct, frozen=True):
    """`workload` is empty for an address that is no workload's."""

    workload: str
    address: str
    port: int


class ModeReport(msgspec.Struct, frozen=True):
    mode: str
    level: str
    by: Place


class UnreadReport(msgspec.Struct, frozen=True):
    """A rule that marks the connection; `unread` are its fields of layer 7."""

    rule: Place
    unread: tuple[str, ...]


class DryRunReport(msgspec.Struct, frozen=True):
    """What would become of the connection if the policies of a dry run were enforced."""

    allowed: bool
    by: Place
    audits: tuple[UnreadReport, ...]


class PolicyReport(msgspec.Struct, frozen=True):
    """A policy that counts for the destination, with so many rules."""

    policy: str
    action: str
    dry_run: bool
    rules: int
    place: Place


class MissReport(msgspec.Struct, frozen=True):
    """A condition that does not hold. `part` is from, to or when; `seen` is empty for "none"."""

    part: str
    attribute: str
    seen: str
    wanted: tuple[str, ...]
    excluded: tuple[str, ...]


class RuleReport(msgspec.Struct, frozen=True):
    """A rule that was considered. It matches when nothing is `missing`.

    `unread` are fields of layer 7 in its document that were left out.
    """

    rule: Place
    policy: str
    action: str
    dry_run: bool
    matches: bool
    decided: bool
    missing: tuple[MissReport, ...]
    unread: tuple[str, ...]


class LeftOutReport(msgspec.Struct, frozen=True):
    """A rule of a policy that counts, which can match nobody, and why."""

    rule: Place
    reason: str


class LackReport(msgspec.Struct, frozen=True):
    """A label that a selector wants, and what the workload has: empty if it has none."""

    label: str
    wanted: str
    seen: str


class PassedOverReport(msgspec.Struct, frozen=True):
    """A policy of the namespace, or of the mesh, that is not for the workload by its selector."""

    policy: Place
    action: str
    lacks: tuple[LackReport, ...]


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One verdict, and all that it is given on. `judged` is false where no agent judges.

    `cause` says in words why it was refused, or not judged. `identity` is empty for plaintext,
    `sources` if no address is known. `asked_policy` is false if the caller was refused before: then
    `rules` are what would have been asked next. `default_deny` are the ALLOW policies none of whose
    rules match, where that decided. `rules` come nearest first: by the number of conditions that
    would have to hold for them to match. `passed_over` are the nearest of the policies that other
    workloads are selected by.
    """

    identity: str
    sources: tuple[str, ...]
    way: str
    destinations: tuple[Destination, ...]
    judged: bool
    allowed: bool
    reason: str = ""
    cause: str = ""
    client: str = ""
    by: Place | None = None
    default_deny: tuple[Place, ...] = ()
    mtls: ModeReport | None = None
    audits: tuple[UnreadReport, ...] = ()
    dry_run: DryRunReport | None = None
    asked_policy: bool = False
    policies: tuple[PolicyReport, ...] = ()
    rules: tuple[RuleReport, ...] = ()
    left_out: tuple[LeftOutReport, ...] = ()
    passed_over: tuple[PassedOverReport, ...] = ()


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """The whole report. `source`, `destination` are as they were asked, `configuration` is by what.

    `allowed`: every answer is. `without_identity` are the answers if a caller that has an identity
    should come without; they are no part of `allowed`.
    """

    schema: int = EXPLAIN_SCHEMA
    configuration: str
    source: str
    destination: str
    allowed: bool
    answers: tuple[Answer, ...]
    without_identity: tuple[Answer, ...] = ()


def explain(off: Offline, caller: Caller, targets: Sequence[Target]) -> tuple[Answer, ...]:
    """Return the answers for all targets, those alike together, refusals first.

    Raises QuestionError.
    """
    alike: dict[tuple[Verdict | None, ModeInForce | None], list[tuple[bytes, Target]]] = {}
    for target in targets:
        mode = off.mode(target.workload, target.port)
        seen = as_seen(off, caller, target)
        for source in sources(off, seen, target):
            verdict = judge(off, caller, source, target)
            alike.setdefault((verdict, mode), []).append((source, target))
    answers = [
        _answer(off, as_seen(off, caller, found[0][1]), verdict, mode, found)
        for (verdict, mode), found in alike.items()
    ]
    return tuple(sorted(answers, key=lambda answer: answer.allowed))


def _answer(
    off: Offline,
    caller: Caller,
    verdict: Verdict | None,
    mode: ModeInForce | None,
    found: Sequence[tuple[bytes, Target]],
) -> Answer:
    identity = str(caller.identity) if caller.identity is not None else ""
    callers = tuple(dict.fromkeys(address.text(source) for source, _ in found if source))
    called = dict.fromkeys(target for _, target in found)
    destinations = tuple(
        Destination(each.workload, address.text(each.address), each.port) for each in called
    )
    way = HBONE if identity else PLAINTEXT
    source, first = found[0]
    if verdict is None:
        return Answer(
            identity=identity,
            sources=callers,
            # Nobody who judges is nobody who could be shown an identity.
            way=PLAINTEXT,
            destinations=destinations,
            judged=False,
            allowed=True,
            cause=ITSELF if is_itself(off, caller, source, first) else OUTSIDE,
        )
    trace = off.trace(first.workload, first.port, caller.identity, source, first.address)
    default_deny = verdict.origin.startswith(DEFAULT_DENY)
    asked = verdict.allow or verdict.reason is Reason.POLICY_DENIED
    return Answer(
        identity=identity,
        sources=callers,
        way=way,
        destinations=destinations,
        judged=True,
        allowed=verdict.allow,
        reason="" if verdict.allow else verdict.reason.value,
        cause="" if verdict.allow else CAUSES[verdict.reason],
        client=verdict.client.value if verdict.client is not None else "",
        by=Place.of(verdict.origin) if verdict.origin and not default_deny else None,
        default_deny=tuple(Place.of(each.origin) for each in off.closing(first.workload))
        if default_deny
        else (),
        mtls=_mode(mode),
        audits=_audits(verdict.audits),
        dry_run=_dry_run(verdict),
        asked_policy=asked,
        policies=tuple(map(_policy, trace.policies)),
        rules=tuple(_rule(each, asked=asked) for each in trace.rules),
        left_out=_left_out(off, trace.policies),
        passed_over=tuple(map(_passed_over, off.passed_over(first.workload)[:PASSED_OVER])),
    )


def _mode(mode: ModeInForce | None) -> ModeReport | None:
    if mode is None:
        return None
    return ModeReport(mode.mode.value, mode.level.value, Place.of(mode.origin))


def _audits(found: Iterable[Match]) -> tuple[UnreadReport, ...]:
    return tuple(UnreadReport(Place.of(each.origin), each.unread) for each in found)


def _dry_run(verdict: Verdict) -> DryRunReport | None:
    would = verdict.dry_run
    if would is None:
        return None
    return DryRunReport(would.allow, Place.of(would.origin), _audits(would.audits))


def _policy(policy: Authorization) -> PolicyReport:
    return PolicyReport(
        policy.uid, policy.action.value, policy.dry_run, len(policy.rules), Place.of(policy.origin)
    )


def _rule(considered: Considered, *, asked: bool) -> RuleReport:
    policy = considered.policy
    return RuleReport(
        rule=Place.of(considered.rule.origin),
        policy=policy.uid,
        action=policy.action.value,
        dry_run=policy.dry_run,
        matches=considered.matches,
        decided=considered.decided and asked,
        missing=tuple(map(_miss, considered.misses)),
        unread=considered.rule.unread,
    )


def _miss(miss: Miss) -> MissReport:
    return MissReport(miss.part.value, miss.attribute.value, miss.seen, miss.wanted, miss.excluded)


def _left_out(off: Offline, policies: Iterable[Authorization]) -> tuple[LeftOutReport, ...]:
    return tuple(
        LeftOutReport(Place.of(rule.origin), rule.reason)
        for policy in policies
        for rule in off.mesh.left_out.get(policy.uid, ())
    )


def _passed_over(passed: PassedOver) -> PassedOverReport:
    policy = passed.policy
    return PassedOverReport(
        Place.of(f"{policy.uid} ({policy.origin})"),
        policy.spec.action.value,
        tuple(LackReport(*each) for each in passed.lacks),
    )
