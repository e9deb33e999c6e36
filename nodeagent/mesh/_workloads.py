"""Workloads: who exists, under which identity, at which addresses, and which run on this node.

This module owns the reading of WorkloadEntries as a set. It promises that an address and a network
namespace belong to at most one workload. It may not read services or policies.

A conflict over an address is settled in favour of the workload that speaks HBONE, then of the
oldest, then of the lower uid. The loser keeps its name, identity and binding, and loses the
address. So it fails closed on both sides: whoever connects to the address demands the winner's
identity, which the loser cannot prove; and a workload outside the mesh, whoever wrote it, cannot
turn connections to a workload of the mesh into plaintext. A conflict over a network namespace is
settled in favour of the oldest, then of the lower uid; the loser is not bound.

Both are the second line of defence: a source refuses the document that comes second.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from nodeagent import api
from nodeagent.api import WorkloadEntry
from nodeagent.mesh._notes import Notes, name
from nodeagent.mesh._state import Binding
from nodeagent.settings import Settings
from ztunnel.protocol import DataPlane, Workload
from ztunnel.spiffe import SpiffeId

__all__ = ["Workloads", "read_workloads"]


class Workloads(msgspec.Struct, frozen=True):
    """All keys are uids, but those of `owners`: addresses, each with its workload's uid."""

    resources: dict[str, Workload]
    entries: dict[str, WorkloadEntry]
    owners: dict[str, str]
    bindings: dict[str, Binding]


def read_workloads(entries: Iterable[WorkloadEntry], settings: Settings, notes: Notes) -> Workloads:
    """Return what `entries`, oldest first and each uid once, say together."""
    by_uid = {entry.uid: entry for entry in entries}
    owners = _owners(by_uid, settings, notes)
    bindings = _bindings(by_uid, settings, notes)
    resources = {uid: _resource(by_uid[uid], owners, settings) for uid in sorted(by_uid)}
    return Workloads(resources, by_uid, owners, bindings)


def _owners(
    entries: Mapping[str, WorkloadEntry], settings: Settings, notes: Notes
) -> dict[str, str]:
    owners: dict[str, str] = {}
    # The sort is stable: within each half the oldest stays first.
    for entry in sorted(entries.values(), key=lambda item: not api.speaks_hbone(item)):
        for address in api.addresses(entry):
            if api.speaks_hbone(entry) and address in settings.node_addresses:
                # A pod's identity must never answer for the node itself.
                reason = f"the address {address} is this node's own, and no workload of the mesh's"
                notes.add(entry, "spec.address", reason)
                continue
            owner = owners.setdefault(address, entry.uid)
            if owner != entry.uid:
                reason = (
                    f"the address {address} belongs to {name(entries[owner])}; connections to it "
                    "demand that workload's identity; give each workload its own address"
                )
                notes.add(entry, "spec.address", reason)
    return owners


def _bindings(
    entries: Mapping[str, WorkloadEntry], settings: Settings, notes: Notes
) -> dict[str, Binding]:
    owners: dict[str, WorkloadEntry] = {}
    bindings: dict[str, Binding] = {}
    for uid, entry in entries.items():
        found = api.netns_binding(entry)
        if found is None or api.opted_out(entry) or _node(entry, settings) != settings.node:
            continue
        owner = owners.setdefault(found.netns, entry)
        if owner is entry:
            bindings[uid] = Binding(uid, found.netns)
        else:
            reason = (
                f"the network namespace {found.netns} belongs to {name(owner)}; this workload is "
                "not enrolled; bind each namespace once"
            )
            notes.add(entry, "metadata.annotations", reason)
    return dict(sorted(bindings.items()))


def _node(entry: WorkloadEntry, settings: Settings) -> str:
    """Return the node that `entry` is bound to, empty if to none."""
    found = api.netns_binding(entry)
    return "" if found is None else found.node or settings.node


def _resource(entry: WorkloadEntry, owners: Mapping[str, str], settings: Settings) -> Workload:
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
        addresses=tuple(a for a in api.addresses(entry) if owners.get(a) == entry.uid),
        data_plane=DataPlane.HBONE if hbone else DataPlane.TCP,
        cluster=settings.cluster,
        node=_node(entry, settings),
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
