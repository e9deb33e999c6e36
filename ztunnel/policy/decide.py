"""The decision: may this connection in, which rule says so, and what else was to be recorded.

This module owns the order of evaluation. It promises DENY before ALLOW; that a workload which an
ALLOW policy selects is closed to whatever no ALLOW rule matches; that AUDIT and policies of a dry
run never change the verdict; and that of several rules that match the first by policy and number
is named, so that every node names the same. It is pure, and reads no policy that does not count
for the workload.

Source: Istio's reference of AuthorizationPolicy (order of evaluation; `istio.io/dry-run`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec

from ztunnel.policy.conditions import Facts
from ztunnel.policy.index import NAMED, Owner
from ztunnel.policy.scopes import Group, Kind
from ztunnel.protocol import Action

__all__ = ["DEFAULT_DENY", "MAX_AUDITS", "Decision", "DryRun", "Match", "decide"]

MAX_AUDITS: Final = NAMED
"""AUDIT rules that a decision names; of more, the first."""

DEFAULT_DENY: Final = "default deny: no rule matches of "


class Match(msgspec.Struct, frozen=True):
    """A rule that matched: its origin, and the fields of its document that were left out."""

    origin: str
    unread: tuple[str, ...] = ()


class DryRun(msgspec.Struct, frozen=True):
    """What the decision were if the policies of the dry run counted too. As `Decision`."""

    allow: bool
    origin: str
    audits: tuple[Match, ...] = ()


class Decision(msgspec.Struct, frozen=True):
    """`origin` names the rule that decided, or the policies whose rules do not match.

    It is empty where no policy had a say. `audits` are the AUDIT rules that match, MAX_AUDITS at
    most. `dry_run` is None where the workload has no policy of a dry run.
    """

    allow: bool
    origin: str = ""
    audits: tuple[Match, ...] = ()
    dry_run: DryRun | None = None


class _Outcome(NamedTuple):
    allow: bool
    origin: str
    audits: tuple[Match, ...]


def decide(groups: Sequence[Group], seen: Facts) -> Decision:
    """Return the decision on what is `seen` of a connection; `groups` are `Scopes.of`."""
    allow, origin, audits = _outcome(groups, seen, (False,))
    dry_run = None
    if any(kind.dry_run for group in groups for kind in group.indexes):
        would = _outcome(groups, seen, (False, True))
        further = tuple(audit for audit in would.audits if audit not in audits)
        dry_run = DryRun(would.allow, would.origin, further)
    return Decision(allow, origin, audits, dry_run)


def _outcome(groups: Sequence[Group], seen: Facts, modes: Sequence[bool]) -> _Outcome:
    """Decide by the policies of all `modes`: enforced ones (False), those of a dry run (True)."""
    audits = tuple(
        Match(owner.rule.origin, owner.rule.unread)
        for owner in _matching(groups, Action.AUDIT, modes, seen, MAX_AUDITS)
    )
    for owner in _matching(groups, Action.DENY, modes, seen, 1):
        return _Outcome(allow=False, origin=owner.rule.origin, audits=audits)
    for owner in _matching(groups, Action.ALLOW, modes, seen, 1):
        return _Outcome(allow=True, origin=owner.rule.origin, audits=audits)
    closed = _default_deny(groups, modes)
    return _Outcome(allow=not closed, origin=closed, audits=audits)


def _matching(
    groups: Sequence[Group], action: Action, modes: Sequence[bool], seen: Facts, most: int
) -> list[Owner]:
    found: list[Owner] = []
    for group in groups:
        for dry_run in modes:
            index = group.indexes.get(Kind(action, dry_run))
            if index is not None:
                found += index.matching(seen, most)
    found.sort()
    return found[:most]


def _default_deny(groups: Sequence[Group], modes: Sequence[bool]) -> str:
    """Return the ALLOW policies that close the workload, "" if there are none."""
    total = 0
    names: list[str] = []
    for group in groups:
        for dry_run in modes:
            index = group.indexes.get(Kind(Action.ALLOW, dry_run))
            if index is not None:
                total += len(index.policies)
                names += index.named
    if not names:
        return ""
    shown = sorted(names)[:NAMED]
    left = total - len(shown)
    return DEFAULT_DENY + ", ".join(shown) + (f" and {left} more" if left else "")
