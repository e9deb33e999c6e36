"""From documents to the state of the mesh.

This module owns the order of the steps: sort, drop what is there twice, workloads, services,
policies. It promises that the result depends on the set of documents only, whatever was built
before. It may not decide anything itself; the steps do.

Theory of operation: a document that has not changed is the same object from one set to the next,
and a step whose inputs are the same returns what it returned. So an edit costs the steps that it
concerns, and of those that look at every document only what they have not seen before.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, TypeVar

from nodeagent import policy
from nodeagent.api import (
    AuthorizationPolicy,
    ConfigWarning,
    Document,
    IdentitySet,
    PeerAuthentication,
    ServiceEntry,
    WorkloadEntry,
)
from nodeagent.memo import Last
from nodeagent.mesh._notes import Notes
from nodeagent.mesh._services import ServiceReader
from nodeagent.mesh._state import MeshState
from nodeagent.mesh._workloads import WorkloadReader
from nodeagent.settings import Settings

__all__ = ["Builder", "build"]

D = TypeVar("D", PeerAuthentication, ServiceEntry, AuthorizationPolicy, IdentitySet)

_Once = tuple[list[D], tuple[ConfigWarning, ...]]


class Builder:
    """Builds one state after another, for the node of `settings`.

    With `everywhere`, policies are those of all workloads in the mesh, on whichever node they are:
    for questions about a whole configuration. Bindings stay those of the node.
    """

    def __init__(self, settings: Settings, *, everywhere: bool = False) -> None:
        self._settings = settings
        self._everywhere = everywhere
        self._read_workloads = WorkloadReader(settings).read
        self._service_entries: Last[_Once[ServiceEntry]] = Last(_once)
        self._read_services = Last(ServiceReader(settings).read)
        self._authentications: Last[_Once[PeerAuthentication]] = Last(_once)
        self._resolve = Last(policy.resolve)
        self._authorizations: Last[_Once[AuthorizationPolicy]] = Last(_once)
        self._sets: Last[_Once[IdentitySet]] = Last(_once)
        self._evasions = Last(policy.Evasions())
        self._unenforced = Last(policy.unenforced)
        self._authorizer = policy.Authorizer(settings.root_namespace)

    def build(self, documents: Iterable[Document]) -> MeshState:
        """Return what `documents` mean; their order does not matter."""
        found: dict[type[Document], list[Any]] = {}
        for document in documents:
            found.setdefault(type(document), []).append(document)
        workloads = self._read_workloads(found.get(WorkloadEntry, []))
        entries, entries_twice = self._service_entries(found.get(ServiceEntry, []))
        services = self._read_services(entries, workloads)
        judged: Collection[str] = workloads.bindings.keys()
        if self._everywhere:
            judged = [each.uid for each in workloads.subjects.all() if each.in_mesh]
        authentications, authentications_twice = self._authentications(
            found.get(PeerAuthentication, [])
        )
        resolution = self._resolve(
            authentications,
            workloads.subjects,
            self._settings.root_namespace,
            None if self._everywhere else judged,
        )
        policies, policies_twice = self._authorizations(found.get(AuthorizationPolicy, []))
        sets, sets_twice = self._sets(found.get(IdentitySet, []))
        authorizations = self._authorizer.authorize(
            policies, sets, workloads.annotated.values(), workloads.subjects, judged
        )
        warnings = {
            *workloads.warnings,
            *entries_twice,
            *services.warnings,
            *authentications_twice,
            *resolution.warnings,
            *policies_twice,
            *sets_twice,
            *authorizations.warnings,
            *self._evasions(policies, authorizations.policies, resolution.policies, judged),
        }
        return MeshState(
            workloads=workloads.resources,
            services=services.resources,
            policies=resolution.policies,
            authorizations=authorizations.policies,
            left_out=authorizations.left_out,
            bindings=workloads.bindings,
            problems=authorizations.problems,
            unenforced=self._unenforced(policies),
            warnings=tuple(str(warning) for warning in sorted(warnings)),
        )


def build(
    documents: Iterable[Document], settings: Settings, *, everywhere: bool = False
) -> MeshState:
    """Return what `documents` mean; the rest is as with `Builder`."""
    return Builder(settings, everywhere=everywhere).build(documents)


def _once(documents: Sequence[D]) -> _Once[D]:
    """Return the documents, oldest first, each uid once: the oldest."""
    notes = Notes()
    kept: dict[str, D] = {}
    for document in sorted(documents, key=lambda item: (item.age, item.origin)):
        holder = kept.setdefault(document.uid, document)
        if holder is not document:
            notes.twice(document, holder)
    return list(kept.values()), notes.found()
