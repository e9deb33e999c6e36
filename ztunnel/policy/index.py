"""Very many rules, and those of them that match one connection, without looking at the others.

This module owns the index over the rules of one effect. It promises that it finds exactly the
rules that match, the first of them by policy and number and so the same on every node; that an
index never changes; and that a change costs a copy of pointers besides what it touches. It is
pure, and may not know what follows from a match.

Theory of operation
-------------------
A case can match only if, of each test that wants something, one wanted piece comes out of the
connection. So it is enough to keep the case under the pieces of one such test: a look-up cuts each
connection once by every probe that is in use (a few tens: lengths of prefixes, not patterns), and
finds the cases under the pieces that come out. Under which of its tests a case is kept is chosen
when it is placed: where the fullest of its buckets is the emptiest, so that what many cases share
(a namespace, a port) serves none of them as a key while they differ in something else.

A case without such a test (it excludes, or asks for nothing) is kept under EVERYTHING and looked
at each time. Equal cases are one, whoever wrote them, so copies of a rule cost what one costs.
Buckets are in the order of the cases' first owners: a search ends at the first match.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import msgspec

from ztunnel.policy.conditions import EVERYTHING, Facts, Piece, Probe, Test
from ztunnel.policy.rules import Case, cases
from ztunnel.protocol import Authorization, Rule

__all__ = ["EMPTY", "NAMED", "Index", "Owner"]

NAMED: Final = 8
"""Policies that are named where all of them count; a line of a log should remain one."""


class Owner(msgspec.Struct, frozen=True, order=True, gc=False):
    """A rule that a case comes from: the uid of its policy, and its number there."""

    policy: str
    number: int
    rule: Rule


_Owner = tuple[str, int]
_Place = tuple[Probe, Piece]


class Index(msgspec.Struct, frozen=True, eq=False, dict=True):
    """Made by `changed` from another, in the end from EMPTY.

    `owners` come in order; `places` are where a case is kept, `buckets` what is kept there.
    """

    policies: Mapping[str, Authorization] = {}
    owners: Mapping[Case, Sequence[Owner]] = {}
    places: Mapping[Case, tuple[_Place, ...]] = {}
    buckets: Mapping[Probe, Mapping[Piece, Sequence[Case]]] = {}

    def first(self, seen: Facts) -> Owner | None:
        """Return the first rule that matches."""
        found = self.matching(seen, 1)
        return found[0] if found else None

    def matching(self, seen: Facts, most: int) -> list[Owner]:
        """Return the rules that match, in order; of more than `most` the first."""
        found: dict[_Owner, Owner] = {}
        for probe, pieces in self.buckets.items():
            bucket = pieces.get(probe.cut(seen))
            if bucket is None:
                continue
            # The order of a bucket is that of first owners: when so many of them are there, all
            # that is left to find in it comes behind them.
            firsts: set[_Owner] = set()
            for case in bucket:
                if not case.holds(seen):
                    continue
                owners = self.owners[case]
                firsts.add((owners[0].policy, owners[0].number))
                for owner in owners[:most]:
                    found[owner.policy, owner.number] = owner
                if len(firsts) == most:
                    break
        if len(found) > 1:
            return [found[key] for key in heapq.nsmallest(most, found)]
        return list(found.values())

    @functools.cached_property
    def named(self) -> tuple[str, ...]:
        """The origins of the first policies, NAMED at most."""
        return tuple(self.policies[uid].origin for uid in heapq.nsmallest(NAMED, self.policies))

    def changed(self, removed: Iterable[Authorization], added: Iterable[Authorization]) -> Index:
        """Return the index without `removed`, all of which it holds, and with `added`."""
        draft = _Draft(self)
        for policy in removed:
            draft.remove(policy)
        for policy in added:
            draft.add(policy)
        return draft.finish()


EMPTY: Final = Index()


class _Draft:
    """An index in the making: copies what it writes to, and never what it was made from."""

    def __init__(self, before: Index) -> None:
        self._policies = dict(before.policies)
        self._owners = dict(before.owners)
        self._places = dict(before.places)
        self._buckets = before.buckets
        self._own: dict[Case, dict[_Owner, Owner]] = {}
        """Owners of the cases that are written to."""
        self._open: dict[_Place, dict[Case, None]] = {}
        """Buckets that are written to, or whose order may have changed."""

    def add(self, policy: Authorization) -> None:
        self._policies[policy.uid] = policy
        for case, owner in _owned(policy):
            owners = self._owners_of(case)
            if not owners:
                self._place(case)
            owners[owner.policy, owner.number] = owner

    def remove(self, policy: Authorization) -> None:
        del self._policies[policy.uid]
        for case, owner in _owned(policy):
            owners = self._owners_of(case)
            del owners[owner.policy, owner.number]
            if not owners:
                for place in self._places.pop(case):
                    del self._bucket(place)[case]

    def finish(self) -> Index:
        for case, owners in self._own.items():
            if not owners:
                self._owners.pop(case, None)
                continue
            self._owners[case] = tuple(owners[key] for key in sorted(owners))
            for place in self._places[case]:
                self._bucket(place)
        buckets = dict(self._buckets)
        copied: dict[Probe, dict[Piece, Sequence[Case]]] = {}
        for (probe, piece), bucket in self._open.items():
            pieces = copied.get(probe)
            if pieces is None:
                pieces = copied[probe] = dict(buckets.get(probe, {}))
            if bucket:
                pieces[piece] = tuple(sorted(bucket, key=self._first_owner))
            else:
                pieces.pop(piece, None)
        for probe, pieces in copied.items():
            if pieces:
                buckets[probe] = pieces
            else:
                buckets.pop(probe, None)
        return Index(self._policies, self._owners, self._places, buckets)

    def _first_owner(self, case: Case) -> _Owner:
        first = self._owners[case][0]
        return first.policy, first.number

    def _owners_of(self, case: Case) -> dict[_Owner, Owner]:
        owners = self._own.get(case)
        if owners is None:
            before = self._owners.get(case, ())
            owners = self._own[case] = {(owner.policy, owner.number): owner for owner in before}
        return owners

    def _bucket(self, place: _Place) -> dict[Case, None]:
        bucket = self._open.get(place)
        if bucket is None:
            bucket = self._open[place] = dict.fromkeys(self._there(place))
        return bucket

    def _there(self, place: _Place) -> Sequence[Case]:
        probe, piece = place
        return self._buckets.get(probe, {}).get(piece, ())

    def _place(self, case: Case) -> None:
        def fullest(places: tuple[_Place, ...]) -> tuple[int, int]:
            return max(map(self._count, places)), len(places)

        places = min(_choices(case), key=fullest, default=((EVERYTHING, 0),))
        self._places[case] = places
        for place in places:
            self._bucket(place)[case] = None

    def _count(self, place: _Place) -> int:
        opened = self._open.get(place)
        return len(opened if opened is not None else self._there(place))


def _owned(policy: Authorization) -> Iterator[tuple[Case, Owner]]:
    for number, rule in enumerate(policy.rules):
        owner = Owner(policy.uid, number, rule)
        for case in cases(rule):
            yield case, owner


def _choices(case: Case) -> Iterator[tuple[_Place, ...]]:
    """Return the ways to keep `case`: under each of them it is found whenever it matches."""
    for test in case.tests:
        if test.wanted:
            yield _pieces(test)
    if case.operations:
        wanted = [
            next((_pieces(test) for test in tests if test.wanted), ()) for tests in case.operations
        ]
        if all(wanted):
            yield tuple(dict.fromkeys(place for places in wanted for place in places))


def _pieces(test: Test) -> tuple[_Place, ...]:
    return tuple((probe, piece) for probe, pieces in test.wanted for piece in pieces)
