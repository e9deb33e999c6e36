"""A WorkloadEntry by itself: what it says, whatever the others say.

This module owns the reading of one entry. It promises that equal entries are read alike. It may not
settle conflicts between entries.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping

import msgspec

from nodeagent import api
from nodeagent.api import Origin, WorkloadEntry
from nodeagent.policy import Subject
from nodeagent.settings import Settings
from ztunnel.protocol import DataPlane, Workload
from ztunnel.spiffe import SpiffeId

__all__ = ["Reading", "read_entry"]


class Reading(msgspec.Struct, frozen=True, gc=False):
    """What an entry says. `netns` is empty unless it is bound to this node.

    `resource` has all addresses that it asks for. `order` is its place among all, oldest first.
    """

    entry: WorkloadEntry
    order: tuple[dt.datetime, str, Origin]
    netns: str
    resource: Workload
    subject: Subject

    @property
    def uid(self) -> str:
        return self.resource.uid

    @property
    def hbone(self) -> bool:
        return self.resource.data_plane is DataPlane.HBONE


def read_entry(entry: WorkloadEntry, settings: Settings) -> Reading:
    found = api.netns_binding(entry)
    node = "" if found is None else found.node or settings.node
    here = found is not None and node == settings.node and not api.opted_out(entry)
    resource = _resource(entry, node, settings)
    created, _ = entry.age
    return Reading(
        entry=entry,
        order=(created, resource.uid, entry.origin),
        netns=found.netns if found is not None and here else "",
        resource=resource,
        subject=Subject(
            uid=resource.uid,
            namespace=resource.namespace,
            labels=entry.labels,
            in_mesh=resource.data_plane is DataPlane.HBONE,
        ),
    )


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
