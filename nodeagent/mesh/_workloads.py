"""Workloads: who exists, under which identity, at which addresses, and which run on this node.

This module owns the reading of WorkloadEntries as a set. It promises that an address and a network
namespace belong to at most one workload, and that reading a set after another gives what reading it
alone gives. It may not read services or policies.

A conflict over an address is settled in favour of the workload that speaks HBONE, then of the
oldest, then of the lower uid. The loser keeps its name, identity and binding, and loses the
address. So it fails closed on both sides: whoever connects to the address demands the winner's
identity, which the loser cannot prove; and a workload outside the mesh, whoever wrote it, cannot
turn connections to a workload of the mesh into plaintext. A conflict over a network namespace is
settled in favour of the oldest, then of the lower uid; the loser is not bound.

Both are the second line of defence: a source refuses the document that comes second.

Theory of operation: who asks for each uid, address and namespace is kept from one set of entries to
the next. An entry that comes or goes changes what it asks for, and those that ask for the same; so
a change costs that, and copies of pointers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, TypeVar

import msgspec

from nodeagent import api
from nodeagent.api import ConfigWarning, WorkloadEntry
from nodeagent.mesh._entries import Reading, read_entry
from nodeagent.mesh._notes import Notes, name
from nodeagent.mesh._state import Binding
from nodeagent.policy import Subject, Subjects
from nodeagent.settings import Settings
from ztunnel.protocol import Workload

__all__ = ["WorkloadReader", "Workloads"]


class Workloads(msgspec.Struct, frozen=True, eq=False):
    """All keys are uids, but those of `owners`: addresses, each with its workload's uid.

    `annotated` are the entries that name their callers.
    """

    resources: dict[str, Workload] = {}
    readings: dict[str, Reading] = {}
    subjects: Subjects = Subjects({}, {})
    annotated: dict[str, WorkloadEntry] = {}
    owners: dict[str, str] = {}
    bindings: dict[str, Binding] = {}
    warnings: tuple[ConfigWarning, ...] = ()


T = TypeVar("T")

_ORDER: Final = operator.attrgetter("order")


class _Claims:
    """Who asks for what, oldest first."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[Reading, ...]] = {}
        self.contested: set[str] = set()
        """What several ask for."""

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def of(self, key: str) -> tuple[Reading, ...]:
        return self._found.get(key, ())

    def first(self, key: str) -> Reading | None:
        return next(iter(self.of(key)), None)

    def add(self, key: str, reading: Reading) -> None:
        found = self.of(key)
        if found:
            self.contested.add(key)
        self._found[key] = tuple(sorted((*found, reading), key=_ORDER)) if found else (reading,)

    def remove(self, key: str, reading: Reading) -> None:
        left = tuple(each for each in self.of(key) if each is not reading)
        if left:
            self._found[key] = left
        else:
            self._found.pop(key, None)
        if len(left) <= 1:
            self.contested.discard(key)


class WorkloadReader:
    """Reads one set of entries after another."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._entries: Sequence[WorkloadEntry] = ()
        self._known: dict[int, Reading] = {}
        """By the entry's `id`, which is its own while the reading holds the entry."""
        self._uids = _Claims()
        self._addresses = _Claims()
        """Of the readings that are the first of their uid, as `_spaces`."""
        self._spaces = _Claims()
        self._last = Workloads()

    def read(self, entries: Sequence[WorkloadEntry]) -> Workloads:
        """Return what `entries` say together; their order does not matter."""
        if entries == self._entries:
            return self._last
        self._entries = entries
        present = dict(zip(map(id, entries), entries, strict=True))
        come = {
            key: read_entry(present[key], self._settings)
            for key in present.keys() - self._known.keys()
        }
        gone = [self._known.pop(key) for key in self._known.keys() - present.keys()]
        self._known.update(come)
        if come or gone:
            self._last = self._changed(self._moved(gone, come.values()))
        return self._last

    def _moved(self, gone: Iterable[Reading], come: Iterable[Reading]) -> _Changes:
        """Take in who comes and goes; return what that changes."""
        gone, come = list(gone), list(come)
        before = {each.uid: self._uids.first(each.uid) for each in (*gone, *come)}
        for reading in gone:
            self._uids.remove(reading.uid, reading)
        for reading in come:
            self._uids.add(reading.uid, reading)
        firsts: dict[str, Reading | None] = {}
        addresses: set[str] = set()
        for uid, old in before.items():
            new = self._uids.first(uid)
            if new is old:
                continue
            firsts[uid] = new
            if old is not None:
                self._ask(old, _Claims.remove)
                addresses.update(old.resource.addresses)
            if new is not None:
                self._ask(new, _Claims.add)
                addresses.update(new.resource.addresses)
        return firsts, addresses

    def _ask(self, reading: Reading, act: Callable[[_Claims, str, Reading], None]) -> None:
        for address in reading.resource.addresses:
            act(self._addresses, address, reading)
        if reading.netns:
            act(self._spaces, reading.netns, reading)

    def _changed(self, changes: _Changes) -> Workloads:
        firsts, addresses = changes
        last = self._last
        readings = _replaced(last.readings, firsts)
        owners = dict(last.owners)
        concerned = set(firsts)
        for address in addresses:
            owner = self._owner(address)
            if owner is None:
                owners.pop(address, None)
            else:
                owners[address] = owner.uid
            concerned.update(each.uid for each in self._addresses.of(address))
        resources = _replaced(
            last.resources,
            {
                uid: _left(readings[uid].resource, owners) if uid in readings else None
                for uid in concerned
            },
        )
        entries = {
            uid: new.entry
            if new is not None and api.ANNOTATION_CALLERS in new.entry.metadata.annotations
            else None
            for uid, new in firsts.items()
        }
        return Workloads(
            resources=resources,
            readings=readings,
            subjects=_moved_subjects(last.subjects, firsts),
            annotated=_replaced(last.annotated, entries),
            owners=owners,
            bindings=self._bindings(),
            warnings=self._warnings(readings, owners),
        )

    def _owner(self, address: str) -> Reading | None:
        found = self._addresses.of(address)
        # A pod's identity must never answer for the node itself.
        foreign = address not in self._settings.node_addresses
        inside = next((each for each in found if each.hbone and foreign), None)
        return inside or next((each for each in found if not each.hbone), None)

    def _bindings(self) -> dict[str, Binding]:
        found = ((netns, self._spaces.first(netns)) for netns in self._spaces)
        return dict(
            sorted((first.uid, Binding(first.uid, netns)) for netns, first in found if first)
        )

    def _warnings(
        self, readings: Mapping[str, Reading], owners: Mapping[str, str]
    ) -> tuple[ConfigWarning, ...]:
        notes = Notes()
        for uid in self._uids.contested:
            holder, *others = self._uids.of(uid)
            for other in others:
                notes.twice(other.entry, holder.entry)
        own = self._settings.node_addresses
        for address in {*self._addresses.contested, *own}:
            for each in self._addresses.of(address):
                if each.hbone and address in own:
                    reason = (
                        f"the address {address} is this node's own, and no workload of the mesh's"
                    )
                elif (owner := owners[address]) != each.uid:
                    reason = (
                        f"the address {address} belongs to {name(readings[owner].entry)}; "
                        "connections to it demand that workload's identity; give each workload "
                        "its own address"
                    )
                else:
                    continue
                notes.add(each.entry, "spec.address", reason)
        for netns in self._spaces.contested:
            holder, *others = self._spaces.of(netns)
            for other in others:
                reason = (
                    f"the network namespace {netns} belongs to {name(holder.entry)}; this "
                    "workload is not enrolled; bind each namespace once"
                )
                notes.add(other.entry, "metadata.annotations", reason)
        return notes.found()


_Changes = tuple[dict[str, Reading | None], set[str]]
"""The readings that are now the first of their uid, None where there is none any more; and the
addresses that any of them, or of those before them, asks for."""


def _left(resource: Workload, owners: Mapping[str, str]) -> Workload:
    """Return `resource` with the addresses that it has."""
    found = tuple(each for each in resource.addresses if owners.get(each) == resource.uid)
    if found == resource.addresses:
        return resource
    return msgspec.structs.replace(resource, addresses=found)


def _replaced(before: dict[str, T], changes: Mapping[str, T | None]) -> dict[str, T]:
    """Return `before` with the changes; itself if they change nothing, and what equals kept."""
    different = {uid: new for uid, new in changes.items() if before.get(uid) != new}
    if not different:
        return before
    result = dict(before)
    for uid, new in different.items():
        if new is None:
            del result[uid]
        else:
            result[uid] = new
    if result.keys() <= before.keys():
        return result
    # In one order, whatever came first; nearly in order, which sorting finds out in one pass.
    return {uid: result[uid] for uid in sorted(result)}


def _moved_subjects(before: Subjects, firsts: Mapping[str, Reading | None]) -> Subjects:
    changes: dict[str, dict[str, Subject | None]] = {}
    outside: dict[str, Subject | None] = {}
    for uid, reading in firsts.items():
        subject = None if reading is None else reading.subject
        changes.setdefault(uid.partition("/")[0], {})[uid] = subject
        outside[uid] = None if subject is None or subject.in_mesh else subject
    inside = {
        namespace: _replaced(before.namespaces.get(namespace, {}), moved) or None
        for namespace, moved in changes.items()
    }
    namespaces = _replaced(before.namespaces, inside)
    if namespaces is before.namespaces:
        return before
    return Subjects(namespaces, _replaced(before.outside, outside))
