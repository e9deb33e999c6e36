"""DENY policies that name callers, where a caller may come without its name.

This module owns one warning: whom it refuses under an identity a DENY lets in without, wherever
plaintext is taken. It promises to name each such policy and the workloads where it can be evaded,
and no other: not where every port is STRICT, where the ALLOW policies let in identities only, or
where another DENY refuses who has none. It may not change what a policy means.

Source: Istio's reference of AuthorizationPolicy (Source: fields that need mutual TLS are to be used
with STRICT, or a policy can be bypassed).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

import msgspec

from nodeagent.api import AuthorizationPolicy, ConfigWarning
from ztunnel.protocol import (
    Action,
    Attribute,
    Authorization,
    Condition,
    Mode,
    Rule,
    WorkloadPolicy,
)

__all__ = ["Evasions"]

_IDENTITY: Final = frozenset({Attribute.PRINCIPAL, Attribute.NAMESPACE, Attribute.SERVICE_ACCOUNT})

_NAMED: Final = 5
"""Workloads named in one warning; a mesh-wide policy may concern thousands."""


class _Meaning(NamedTuple):
    """What a policy does with callers that have no identity."""

    lets_in: bool
    """An ALLOW: it may let them in."""
    refuses: bool
    """A DENY: it refuses them all."""
    evaded: bool
    """A DENY: they never match some rule of it, which asks for an identity."""


class _Scope(msgspec.Struct):
    """What the policies of one place do with callers that have no identity."""

    allows: bool = False
    lets_in: bool = False
    refuses: bool = False
    evaded: list[str] = []
    """Uids of policies."""


class Evasions:
    """Finds the policies that can be evaded, of one set of policies after another.

    What a policy means is looked at once: one that has not changed is the same object.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[Authorization, _Meaning]] = {}

    def __call__(
        self,
        documents: Iterable[AuthorizationPolicy],
        authorizations: Mapping[str, Authorization],
        modes: Mapping[str, WorkloadPolicy],
        here: Iterable[str],
    ) -> tuple[ConfigWarning, ...]:
        """Return the warnings about `documents`, for the workloads `here` (uids).

        `authorizations` are what the documents mean, by uid; `modes` what is in force for
        workloads.
        """
        found: dict[str, list[str]] = {}
        takes_plaintext = [uid for uid in sorted(here) if uid in modes and _is_open(modes[uid])]
        scopes = self._scopes(authorizations) if takes_plaintext else {}
        for workload in takes_plaintext:
            places = ("", workload.partition("/")[0], workload)
            judging = [scopes[place] for place in places if place in scopes]
            closed = any(each.allows for each in judging)
            closed = closed and not any(each.lets_in for each in judging)
            if not closed and not any(each.refuses for each in judging):
                for each in judging:
                    for uid in each.evaded:
                        found.setdefault(uid, []).append(workload)
        by_uid = {f"AuthorizationPolicy/{each.uid}": each for each in documents} if found else {}
        return tuple(sorted(_warning(by_uid[uid], each) for uid, each in found.items()))

    def _scopes(self, policies: Mapping[str, Authorization]) -> dict[str, _Scope]:
        known: dict[str, tuple[Authorization, _Meaning]] = {}
        scopes: dict[str, _Scope] = {}
        for uid, policy in policies.items():
            if policy.dry_run or policy.action is Action.AUDIT:
                continue
            before = self._known.get(uid)
            if before is None or before[0] is not policy:
                before = (policy, _meaning(policy))
            known[uid] = before
            meaning = before[1]
            for place in (policy.namespace,) if policy.workloads is None else policy.workloads:
                scope = scopes.setdefault(place, _Scope())
                scope.allows |= policy.action is Action.ALLOW
                scope.lets_in |= meaning.lets_in
                scope.refuses |= meaning.refuses
                if meaning.evaded:
                    scope.evaded.append(uid)
        self._known = known
        return scopes


def _is_open(policy: WorkloadPolicy) -> bool:
    """Return whether plaintext is taken on any port."""
    return {policy.mode, *policy.port_modes.values()} != {Mode.STRICT}


def _meaning(policy: Authorization) -> _Meaning:
    if policy.action is Action.ALLOW:
        lets_in = not all(map(_asks, policy.rules))
        return _Meaning(lets_in=lets_in, refuses=False, evaded=False)
    return _Meaning(
        lets_in=False,
        refuses=any(map(_refuses, policy.rules)),
        evaded=any(map(_asks, policy.rules)),
    )


def _asks(rule: Rule) -> bool:
    """Return whether a caller needs an identity to match."""

    def one_asks(conditions: Iterable[Condition]) -> bool:
        return any(each.values and each.attribute in _IDENTITY for each in conditions)

    return one_asks(rule.conditions) or (bool(rule.sources) and all(map(one_asks, rule.sources)))


def _refuses(rule: Rule) -> bool:
    """Return whether every caller without an identity matches."""

    def all_hold(conditions: Iterable[Condition]) -> bool:
        return all(not each.values and each.attribute in _IDENTITY for each in conditions)

    sources = not rule.sources or any(map(all_hold, rule.sources))
    return not rule.operations and sources and all_hold(rule.conditions)


def _warning(document: AuthorizationPolicy, workloads: list[str]) -> ConfigWarning:
    more = f" and {len(workloads) - _NAMED} more" if len(workloads) > _NAMED else ""
    reason = (
        f"AuthorizationPolicy {document.uid} denies callers by their identity, and callers without "
        f"one get into {', '.join(workloads[:_NAMED])}{more}: whom it names need only come in "
        'plaintext; make these STRICT, or deny notPrincipals: ["*"] as well'
    )
    origin = document.origin
    return ConfigWarning(origin.file, origin.line, origin.column, "spec.action", reason)
