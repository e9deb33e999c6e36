"""From documents to the state of the mesh.

This module owns the order of the steps: sort, drop what is there twice, workloads, services,
policies. It promises that the result depends on the set of documents only. It may not decide
anything itself; the steps do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from nodeagent import api, policy
from nodeagent.api import (
    AuthorizationPolicy,
    Document,
    IdentitySet,
    PeerAuthentication,
    ServiceEntry,
    WorkloadEntry,
)
from nodeagent.mesh._notes import Notes
from nodeagent.mesh._services import read_services
from nodeagent.mesh._state import MeshState
from nodeagent.mesh._workloads import Workloads, read_workloads
from nodeagent.settings import Settings

__all__ = ["build"]

D = TypeVar("D", PeerAuthentication, WorkloadEntry, ServiceEntry, AuthorizationPolicy, IdentitySet)


def build(
    documents: Iterable[Document], settings: Settings, *, everywhere: bool = False
) -> MeshState:
    """Return what `documents` mean for the node of `settings`; their order does not matter.

    With `everywhere`, policies are those of all workloads in the mesh, on whichever node they are:
    for questions about a whole configuration. Bindings stay those of the node.
    """
    notes = Notes()
    found = list(documents)
    entries = _ordered([each for each in found if isinstance(each, WorkloadEntry)], notes)
    workloads = read_workloads(entries, settings, notes)
    services = read_services(
        _ordered([each for each in found if isinstance(each, ServiceEntry)], notes),
        workloads,
        settings,
        notes,
    )
    subjects = _subjects(workloads)
    judged = list(workloads.bindings)
    if everywhere:
        judged = sorted(subject.uid for subject in subjects if subject.in_mesh)
    resolution = policy.resolve(
        _ordered([each for each in found if isinstance(each, PeerAuthentication)], notes),
        subjects,
        settings.root_namespace,
    )
    notes.extend(resolution.warnings)
    authorizations = policy.authorize(
        _ordered([each for each in found if isinstance(each, AuthorizationPolicy)], notes),
        _ordered([each for each in found if isinstance(each, IdentitySet)], notes),
        entries,
        subjects,
        judged,
        settings.root_namespace,
    )
    notes.extend(authorizations.warnings)
    return MeshState(
        workloads=workloads.resources,
        services=services,
        policies={uid: resolution.policies[uid] for uid in judged},
        authorizations=authorizations.policies,
        left_out=authorizations.left_out,
        bindings=workloads.bindings,
        problems=authorizations.problems,
        warnings=notes.texts(),
    )


def _ordered(documents: Sequence[D], notes: Notes) -> list[D]:
    """Return the documents, oldest first, each uid once: the oldest."""
    kept: dict[str, D] = {}
    for document in sorted(documents, key=lambda item: (item.age, item.origin)):
        holder = kept.setdefault(document.uid, document)
        if holder is not document:
            reason = f"has no effect: it is also in {holder.origin}; remove one"
            notes.add(document, "metadata.name", reason)
    return list(kept.values())


def _subjects(workloads: Workloads) -> list[policy.Subject]:
    return [
        policy.Subject(
            uid=uid,
            namespace=entry.metadata.namespace,
            labels=entry.labels,
            in_mesh=api.speaks_hbone(entry),
        )
        for uid, entry in workloads.entries.items()
    ]
