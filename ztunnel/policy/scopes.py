"""Which policies count for which workload: an index for each set of them, from change to change.

This module owns the grouping of policies by where they count. It promises that a workload is
judged by all policies that are in force for it and by no other; that groups are shared, between
snapshots where nothing in them has changed, and between workloads that the same policies select;
and that a change costs what it touches. It is pure, and may not decide.

A workload is judged by three groups: of the mesh, of its namespace, and of the selectors that
select it. They stay apart, so that a policy of the mesh is kept once and not for each workload.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Final, NamedTuple

import msgspec

from ztunnel.policy import index
from ztunnel.policy.index import Index
from ztunnel.protocol import Action, Authorization

__all__ = ["NOWHERE", "Group", "Kind", "Scopes", "updated"]

Policies = Mapping[str, Authorization]


class Kind(NamedTuple):
    """What becomes of a match."""

    action: Action
    dry_run: bool


class _Change(NamedTuple):
    """A policy of a group, before and after; None where the group has none."""

    before: Authorization | None
    after: Authorization | None


class Group(msgspec.Struct, frozen=True):
    """Policies that always count together. A kind without policies is not there."""

    indexes: Mapping[Kind, Index]

    def changed(self, changes: Iterable[_Change]) -> Group:
        removed: dict[Kind, list[Authorization]] = {}
        added: dict[Kind, list[Authorization]] = {}
        for change in changes:
            for policy, lists in ((change.before, removed), (change.after, added)):
                if policy is not None:
                    lists.setdefault(Kind(policy.action, policy.dry_run), []).append(policy)
        indexes = dict(self.indexes)
        for kind in removed.keys() | added.keys():
            before = indexes.pop(kind, index.EMPTY)
            after = before.changed(removed.get(kind, ()), added.get(kind, ()))
            if after.policies:
                indexes[kind] = after
        return Group(indexes)

    def holds_just(self, wanted: AbstractSet[str]) -> bool:
        """True if `wanted` are the uids of this group."""
        if len(wanted) != sum(len(each.policies) for each in self.indexes.values()):
            return False
        return all(each.policies.keys() <= wanted for each in self.indexes.values())


_NOTHING: Final = Group({})


class Scopes(msgspec.Struct, frozen=True):
    """The groups by the place where they count: see `_places`."""

    groups: Mapping[str, Group]

    def of(self, workload: str) -> tuple[Group, ...]:
        """Return the groups that `workload` ("namespace/name") is judged by."""
        places = ("", workload.partition("/")[0], workload)
        found = (self.groups.get(place) for place in places)
        return tuple(group for group in found if group is not None)


NOWHERE: Final = Scopes({})


def _places(policy: Authorization | None) -> tuple[str, ...]:
    """Return where `policy` counts: "" for the mesh, a namespace, or uids of workloads."""
    if policy is None:
        return ()
    return (policy.namespace,) if policy.workloads is None else policy.workloads


def updated(
    scopes: Scopes, before: Policies, after: Policies, touched: Iterable[str] | None
) -> Scopes:
    """Return the scopes of `after`. `touched` are the uids that may differ, None all.

    `scopes` are those of `before`, and both hold only what `rules.check` lets pass.
    """
    if after is before:
        return scopes
    changes: dict[str, list[_Change]] = {}
    for uid in dict.fromkeys(touched) if touched is not None else before.keys() | after.keys():
        old, new = before.get(uid), after.get(uid)
        if old != new:
            _spread(_Change(old, new), changes)
    return Scopes(_regrouped(scopes.groups, changes)) if changes else scopes


def _spread(change: _Change, changes: dict[str, list[_Change]]) -> None:
    """Add to each place what becomes of the policy there."""
    # The same objects for all places, so that places to which the same happens can be told.
    gone, come = _Change(change.before, None), _Change(None, change.after)
    there = frozenset(_places(change.before))
    here = frozenset(_places(change.after))
    for place in there - here:
        changes.setdefault(place, []).append(gone)
    for place in here - there:
        changes.setdefault(place, []).append(come)
    if not _judge_alike(change):
        for place in there & here:
            changes.setdefault(place, []).append(change)


def _judge_alike(change: _Change) -> bool:
    """True if only the selection differs: for who is selected by both, nothing has changed."""
    old, new = change
    return (
        old is not None
        and new is not None
        and msgspec.structs.replace(old, workloads=new.workloads) == new
    )


def _regrouped(
    groups: Mapping[str, Group], changes: Mapping[str, Sequence[_Change]]
) -> dict[str, Group]:
    result = dict(groups)
    made: dict[tuple[int, ...], Group] = {}
    newcomers = _Newcomers(result)
    # Those that are new last: a further replica finds the group of the others.
    for place in sorted(changes, key=lambda place: place not in groups):
        before = groups.get(place, _NOTHING)
        key = (id(before), *map(id, changes[place]))
        group = made.get(key)
        if group is None:
            if before is _NOTHING:
                group = newcomers.group(changes[place])
            else:
                group = before.changed(changes[place])
            made[key] = group
        if group.indexes:
            result[place] = group
        else:
            result.pop(place, None)
    return result


class _Newcomers:
    """The groups of places that had none, shared with those of `groups` as they have become."""

    def __init__(self, groups: Mapping[str, Group]) -> None:
        self._groups = groups
        self._there: list[Group] | None = None
        self._made: dict[frozenset[str], Group] = {}

    def group(self, changes: Sequence[_Change]) -> Group:
        """Return the group of just the policies that `changes` bring."""
        wanted = frozenset(change.after.uid for change in changes if change.after is not None)
        if self._there is None:
            # Once: looking at what is made here would take the square of their number.
            self._there = list({id(group): group for group in self._groups.values()}.values())
        found = self._made.get(wanted)
        if found is None:
            there = (group for group in self._there if group.holds_just(wanted))
            found = self._made[wanted] = next(there, None) or _NOTHING.changed(changes)
        return found
