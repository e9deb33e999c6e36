"""Workloads by what judges who calls them, in the old configuration and in the new one.

This module owns the question whether two configurations judge the callers of a workload by the
same rules. It promises that workloads that are judged alike in both are one `Place`, however many
they are, and that a policy which only moved in its file, or got another name, is no difference.
Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

import msgspec

from nodeagent.offline import Group, Offline
from ztunnel.protocol import Action, Attribute, Authorization, Condition, Mode, Rule

__all__ = ["Place", "View", "conditions", "places"]

_DECIDING: Final = frozenset({Action.ALLOW, Action.DENY})
"""AUDIT marks and never decides."""

_Plain = tuple[Action, frozenset[object]]


class View(NamedTuple):
    """What one configuration judges the callers of a workload by, without names and places.

    `groups` are numbers: the same for policies that say the same.
    """

    judged: bool
    mode: Mode | None
    port_modes: tuple[tuple[int, Mode], ...]
    groups: frozenset[int]

    @property
    def clear(self) -> tuple[bool, tuple[tuple[int, bool], ...]]:
        """Where callers leave mutual TLS out: by default, and on the ports with another mode."""
        ports = tuple((port, mode is Mode.DISABLE) for port, mode in self.port_modes)
        default = self.mode is Mode.DISABLE
        return default, tuple(each for each in ports if each[1] is not default)


class Place(msgspec.Struct, frozen=True):
    """Workloads that are judged alike: any one of them stands for all. `old` and `new` differ or
    not; `policies` are those of both.
    """

    workloads: tuple[str, ...]
    old: View
    new: View
    policies: tuple[Authorization, ...]

    @property
    def changes(self) -> bool:
        return self.old != self.new

    @property
    def tells_identities_apart(self) -> bool:
        """True if it changes in a way that may concern callers with an identity."""
        return (
            self.old.groups != self.new.groups
            or self.old.judged != self.new.judged
            or self.old.clear != self.new.clear
        )


def places(old: Offline, new: Offline) -> list[Place]:
    """Return the places of the workloads that both configurations have, by their first workload."""
    reader = _Reader()
    found: dict[tuple[object, ...], list[str]] = {}
    made: dict[tuple[object, ...], tuple[View, View, tuple[Authorization, ...]]] = {}
    for uid in sorted(old.workloads.keys() & new.workloads.keys()):
        before, after = reader.view(old, uid), reader.view(new, uid)
        if not before.judged and not after.judged:
            continue
        # Rules on the destination's address tell apart what is otherwise judged alike.
        own = uid if reader.by_address(before) or reader.by_address(after) else ""
        # So does having no address (a conflict took it): what cannot be called is always refused.
        callable_in = tuple(bool(each.workloads[uid].addresses) for each in (old, new))
        key = (before, after, own, callable_in)
        if key not in made:
            policies = (*reader.policies(old, uid), *reader.policies(new, uid))
            made[key] = (before, after, policies)
        found.setdefault(key, []).append(uid)
    return [Place(tuple(uids), *made[key]) for key, uids in found.items()]


def conditions(policies: Iterable[Authorization]) -> Iterable[Condition]:
    """Return every condition of the policies, each once."""
    found: dict[Condition, None] = {}
    for policy in policies:
        for rule in policy.rules:
            for alternatives in (*rule.sources, *rule.operations, rule.conditions):
                found.update(dict.fromkeys(alternatives))
    return found


class _Reader:
    """Reads groups of policies, each once. The configurations must live as long."""

    def __init__(self) -> None:
        self._read: dict[int, int] = {}
        self._numbers: dict[frozenset[object], int] = {}
        self._by_address: dict[int, bool] = {}

    def view(self, off: Offline, uid: str) -> View:
        found = off.state.policies.get(uid)
        if found is None or not off.judged(uid):
            return View(judged=False, mode=None, port_modes=(), groups=frozenset())
        numbers = (self._number(group) for group in off.state.scopes.of(uid))
        # What says nothing is nothing: a group of AUDIT policies only.
        groups = frozenset(number for number in numbers if number)
        return View(True, found.mode, tuple(sorted(found.port_modes.items())), groups)

    def by_address(self, view: View) -> bool:
        return any(self._by_address[number] for number in view.groups)

    @staticmethod
    def policies(off: Offline, uid: str) -> tuple[Authorization, ...]:
        if not off.judged(uid):
            return ()
        return tuple(policy for group in off.state.scopes.of(uid) for policy in _deciding(group))

    def _number(self, group: Group) -> int:
        """Return what stands for all groups that say the same, 0 for those that decide nothing."""
        number = self._read.get(id(group))
        if number is not None:
            return number
        policies = list(_deciding(group))
        said = frozenset(_plain(policy) for policy in policies)
        if not said:
            number = 0
        else:
            number = self._numbers.setdefault(said, len(self._numbers) + 1)
            self._by_address[number] = any(
                condition.attribute is Attribute.DESTINATION_IP
                for condition in conditions(policies)
            )
        self._read[id(group)] = number
        return number


def _deciding(group: Group) -> Iterable[Authorization]:
    for kind, index in group.indexes.items():
        if kind.action in _DECIDING and not kind.dry_run:
            yield from index.policies.values()


def _plain(policy: Authorization) -> _Plain:
    return policy.action, frozenset(map(_rule, policy.rules))


def _rule(rule: Rule) -> object:
    """Return what a rule asks for: the order of its parts does not matter, nor does its name."""
    return (
        frozenset(map(frozenset, rule.sources)),
        frozenset(map(frozenset, rule.operations)),
        frozenset(rule.conditions),
    )
