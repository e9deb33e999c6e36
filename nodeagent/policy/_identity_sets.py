"""Identity sets: what a reference to one stands for, and what is wrong among them.

This module owns the resolution of references. It promises that a reference which cannot be resolved
(no such set, a circle, too many identities) is an error with its place, and is never taken for an
empty set: whoever expands it is told what is missing. It may not know what a policy does with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from nodeagent.api import BaseDocument, ConfigError, IdentitySet, Mark, patterns

__all__ = ["MAX_IDENTITIES", "Expansion", "IdentitySets"]

MAX_IDENTITIES: Final = 20_000
"""Patterns that one reference may stand for, with all sets that it refers to: as many as one policy
may hold. Sets of sets would otherwise multiply without bound."""


class Expansion(msgspec.Struct, frozen=True):
    """`known` are patterns, each once; `missing` says in words what could not be resolved."""

    known: tuple[str, ...]
    missing: tuple[str, ...] = ()


class IdentitySets:
    """All identity sets of a mesh, each uid once."""

    def __init__(self, sets: Iterable[IdentitySet]) -> None:
        self._sets = {each.uid: each for each in sets}
        self._references = {
            uid: tuple(mark.refers for mark in each.marks) for uid, each in self._sets.items()
        }
        self._knots = _knots(self._references)
        self._expanded: dict[str, Expansion] = {}
        self._too_large: set[str] = set()

    def problems(self, referring: Iterable[BaseDocument]) -> list[ConfigError]:
        """Return the errors of all sets, and those of further documents with references."""
        found = [self._circle(cycle) for cycle in _cycles(self._references, self._knots)]
        for document in (*self._sets.values(), *referring):
            for mark in document.marks:
                reason = self._problem(mark)
                if reason:
                    found.append(
                        ConfigError(
                            document.origin.file, mark.line, mark.column, mark.field, reason
                        )
                    )
        return found

    def expand(self, values: Iterable[str], namespace: str) -> Expansion:
        """Return what principals stand for that are written in a document of `namespace`."""
        known: dict[str, None] = {}
        missing: dict[str, None] = {}
        for value in values:
            if patterns.set_of(value) is None:
                known[value] = None
                continue
            found = self.stands_for(patterns.qualified(value, namespace))
            known.update(dict.fromkeys(found.known))
            missing.update(dict.fromkeys(found.missing))
        return Expansion(tuple(known), tuple(missing))

    def stands_for(self, name: str) -> Expansion:
        """Return what the set of this uid stands for, whether or not there is one."""
        if name not in self._expanded:
            self._expanded[name] = self._reach(name)
        return self._expanded[name]

    def _reach(self, name: str) -> Expansion:
        known: dict[str, None] = {}
        missing: list[str] = []
        seen = {name}
        waiting = [name]
        while waiting:
            uid = waiting.pop()
            document = self._sets.get(uid)
            if document is None:
                missing.append(f"identity set {uid} does not exist")
                continue
            if uid in self._knots:
                missing.append(f"identity set {uid} refers to itself in a circle")
                continue
            known.update(
                (value, None)
                for value in document.spec.identities
                if patterns.set_of(value) is None
            )
            if len(known) > MAX_IDENTITIES:
                self._too_large.add(name)
                return Expansion((), (f"identity set {name} is too large",))
            for refers in self._references[uid]:
                if refers not in seen:
                    seen.add(refers)
                    waiting.append(refers)
        return Expansion(tuple(known), tuple(missing))

    def _problem(self, mark: Mark) -> str:
        """Return what is wrong with a reference itself; sets report their own."""
        if not mark.refers:
            return ""
        if mark.refers not in self._sets:
            return (
                f"identity set {mark.refers} does not exist: write it, or correct the reference; "
                "until then policies that refer to it fail closed"
            )
        self.stands_for(mark.refers)
        if mark.refers in self._too_large:
            return (
                f"identity set {mark.refers} has more than {MAX_IDENTITIES} identities with all "
                "that it refers to: split it; until then policies that refer to it fail closed"
            )
        return ""

    def _circle(self, cycle: tuple[str, ...]) -> ConfigError:
        first = self._sets[cycle[0]]
        mark = next(each for each in first.marks if each.refers == cycle[1 % len(cycle)])
        way = " → ".join((*cycle, cycle[0]))
        reason = (
            f"the sets refer to one another in a circle: {way}; remove one reference; "
            "until then policies that refer to them fail closed"
        )
        return ConfigError(first.origin.file, mark.line, mark.column, mark.field, reason)


def _knots(references: Mapping[str, tuple[str, ...]]) -> frozenset[str]:
    """Return the sets that are on a circle, or between two of them."""
    left = _stripped(references)
    backwards: dict[str, list[str]] = {uid: [] for uid in left}
    for uid in left:
        for refers in references[uid]:
            if refers in left:
                backwards[refers].append(uid)
    return frozenset(_stripped({uid: tuple(found) for uid, found in backwards.items()}))


def _stripped(references: Mapping[str, tuple[str, ...]]) -> set[str]:
    """Return the sets that are left once those without references have gone, again and again."""
    count = {
        uid: sum(refers in references for refers in found) for uid, found in references.items()
    }
    users: dict[str, list[str]] = {uid: [] for uid in references}
    for uid, found in references.items():
        for refers in found:
            if refers in users:
                users[refers].append(uid)
    free = [uid for uid, number in count.items() if not number]
    left = set(references)
    while free:
        uid = free.pop()
        left.discard(uid)
        for user in users[uid]:
            count[user] -= 1
            if not count[user]:
                free.append(user)
    return left


def _cycles(
    references: Mapping[str, tuple[str, ...]], knots: frozenset[str]
) -> list[tuple[str, ...]]:
    """Return a circle through, or reached from, each set in a knot; each circle once."""
    found: list[tuple[str, ...]] = []
    done: set[str] = set()
    for start in sorted(knots):
        way: dict[str, int] = {}
        uid = start
        while uid not in done and uid not in way:
            way[uid] = len(way)
            # A set in a knot refers to another one.
            uid = min(refers for refers in references[uid] if refers in knots)
        if uid in way and uid not in done:
            cycle = list(way)[way[uid] :]
            at = cycle.index(min(cycle))
            found.append(tuple(cycle[at:] + cycle[:at]))
        done.update(way)
    return found
