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
"""

from __future__ import annotations

import datetime as dt
import operator
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from nodeagent import api
from nodeagent.api import ConfigWarning, Origin, WorkloadEntry
from nodeagent.mesh._notes import Notes, name
from nodeagent.mesh._state import Binding
from nodeagent.policy import Subject
from nodeagent.settings import Settings
from ztunnel.protocol import DataPlane, Workload
from ztunnel.spiffe import SpiffeId

__all__ = ["Reading", "WorkloadReader", "Workloads"]


class Reading(msgspec.Struct, frozen=True, gc=False):
    """What an entry says by itself. `netns` is empty unless it is bound to this node.

    `resource` has all addresses that it asks for. `order` is its place among all, oldest first.
    """

    entry: WorkloadEntry
    order: tuple[dt.datetime, str, Origin]
    addresses: tuple[str, ...]
    hbone: bool
    netns: str
    resource: Workload
    subject: Subject


class Workloads(msgspec.Struct, frozen=True):
    """All keys are uids, but those of `owners`: addresses, each with its workload's uid.

    `readings` come oldest first, and `subjects` in the same order. `annotated` are the entries that
    name their callers.
    """

    resources: dict[str, Workload]
    readings: dict[str, Reading]
    subjects: list[Subject]
    annotated: list[WorkloadEntry]
    owners: dict[str, str]
    bindings: dict[str, Binding]
    warnings: tuple[ConfigWarning, ...]


_ORDER: Final = operator.attrgetter("order")


class WorkloadReader:
    """Reads one set of entries after another; an entry that was there before is not read again."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._known: dict[int, Reading] = {}
        """By the entry's `id`, which is its own while the reading holds the entry."""
        self._ordered: list[Reading] = []

    def read(self, entries: Sequence[WorkloadEntry]) -> Workloads:
        """Return what `entries` say together; their order does not matter."""
        notes = Notes()
        by_uid: dict[str, Reading] = {}
        for reading in self._oldest_first(entries):
            holder = by_uid.setdefault(reading.resource.uid, reading)
            if holder is not reading:
                notes.twice(reading.entry, holder.entry)
        owners, losers = _owners(by_uid, self._settings, notes)
        return Workloads(
            resources={
                uid: _left(reading.resource, owners) if uid in losers else reading.resource
                for uid, reading in by_uid.items()
            },
            readings=by_uid,
            subjects=[reading.subject for reading in by_uid.values()],
            annotated=[
                reading.entry
                for reading in by_uid.values()
                if api.ANNOTATION_CALLERS in reading.entry.metadata.annotations
            ],
            owners=owners,
            bindings=_bindings(by_uid, notes),
            warnings=notes.found(),
        )

    def _oldest_first(self, entries: Sequence[WorkloadEntry]) -> list[Reading]:
        before = self._known
        known = {id(entry): before.get(id(entry)) or self._read(entry) for entry in entries}
        # Nearly in order, which sorting finds out in one pass.
        ordered = [reading for reading in self._ordered if id(reading.entry) in known]
        ordered += [reading for key, reading in known.items() if key not in before]
        ordered.sort(key=_ORDER)
        self._known, self._ordered = known, ordered
        return ordered

    def _read(self, entry: WorkloadEntry) -> Reading:
        found = api.netns_binding(entry)
        node = "" if found is None else found.node or self._settings.node
        here = found is not None and node == self._settings.node and not api.opted_out(entry)
        resource = _resource(entry, node, self._settings)
        created, _ = entry.age
        return Reading(
            entry=entry,
            order=(created, resource.uid, entry.origin),
            addresses=resource.addresses,
            hbone=resource.data_plane is DataPlane.HBONE,
            netns=found.netns if found is not None and here else "",
            resource=resource,
            subject=Subject(
                uid=resource.uid,
                namespace=resource.namespace,
                labels=entry.labels,
                in_mesh=resource.data_plane is DataPlane.HBONE,
            ),
        )


def _owners(
    readings: Mapping[str, Reading], settings: Settings, notes: Notes
) -> tuple[dict[str, str], set[str]]:
    """Return who has each address, and who does not have all that it asks for."""
    owners: dict[str, str] = {}
    losers: set[str] = set()
    for hbone in (True, False):
        for uid, reading in readings.items():
            if reading.hbone is not hbone:
                continue
            for address in reading.addresses:
                if hbone and address in settings.node_addresses:
                    # A pod's identity must never answer for the node itself.
                    reason = (
                        f"the address {address} is this node's own, and no workload of the mesh's"
                    )
                elif (owner := owners.setdefault(address, uid)) != uid:
                    reason = (
                        f"the address {address} belongs to {name(readings[owner].entry)}; "
                        "connections to it demand that workload's identity; give each workload "
                        "its own address"
                    )
                else:
                    continue
                losers.add(uid)
                notes.add(reading.entry, "spec.address", reason)
    return owners, losers


def _left(resource: Workload, owners: Mapping[str, str]) -> Workload:
    """Return `resource` with the addresses that it has."""
    found = tuple(each for each in resource.addresses if owners.get(each) == resource.uid)
    return msgspec.structs.replace(resource, addresses=found)


def _bindings(readings: Mapping[str, Reading], notes: Notes) -> dict[str, Binding]:
    owners: dict[str, WorkloadEntry] = {}
    bindings: dict[str, Binding] = {}
    for uid, reading in readings.items():
        if not reading.netns:
            continue
        owner = owners.setdefault(reading.netns, reading.entry)
        if owner is reading.entry:
            bindings[uid] = Binding(uid, reading.netns)
        else:
            reason = (
                f"the network namespace {reading.netns} belongs to {name(owner)}; this workload is "
                "not enrolled; bind each namespace once"
            )
            notes.add(reading.entry, "metadata.annotations", reason)
    return dict(sorted(bindings.items()))


def _resource(entry: WorkloadEntry, node: str, settings: Settings) -> Workload:
    """Return the workload with all addresses that the entry asks for; `node` is where it runs."""
    labels = entry.labels
    metadata = entry.metadata
    hbone = api.speaks_hbone(entry)
    identity = ""
    if hbone:
        identity = str(
            SpiffeId.workload(settings.trust_domain, metadata.namespace, entry.spec.service_account)
        )
    return Workload(
        uid=entry.uid,
        name=metadata.name,
        namespace=metadata.namespace,
        service_account=entry.spec.service_account,
        trust_domain=settings.trust_domain,
        identity=identity,
        addresses=api.addresses(entry),
        data_plane=DataPlane.HBONE if hbone else DataPlane.TCP,
        cluster=settings.cluster,
        node=node,
        locality=entry.spec.locality,
        canonical_service=_first(labels, _CANONICAL_NAME) or metadata.name,
        canonical_revision=_first(labels, _CANONICAL_REVISION) or "latest",
        app=_first(labels, _APP),
        version=_first(labels, _VERSION),
    )


# Istio's order of preference for what telemetry calls a workload (istio/istio pkg/model,
# canonical service).
_CANONICAL_NAME = ("service.istio.io/canonical-name", "app.kubernetes.io/name", "app")
_CANONICAL_REVISION = (
    "service.istio.io/canonical-revision",
    "app.kubernetes.io/version",
    "version",
)
_APP = ("app", "app.kubernetes.io/name")
_VERSION = ("version", "app.kubernetes.io/version")


def _first(labels: Mapping[str, str], keys: tuple[str, ...]) -> str:
    return next((labels[key] for key in keys if labels.get(key)), "")
