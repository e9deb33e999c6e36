"""What a single resource must keep to beyond the types of its fields.

This module owns the rules between fields: Istio's webhook rules as far as they concern layer 4, and
refusals of what this version would otherwise leave without effect. It promises to report each
breach at the node that causes it, and to be the same for every source. It may not compare
resources with one another.

Source: istio/istio pkg/config/validation (ValidatePeerAuthentication, ValidateServiceEntry);
`_authorization_rules` for the rest.
"""

from __future__ import annotations

import msgspec

from nodeagent.api import _binding, patterns
from nodeagent.api._authorization import DRY_RUN
from nodeagent.api._authorization_rules import (
    EMPTY_SELECTOR,
    check_authorization_policy,
    check_identity_set,
    past,
    policy_marks,
    set_marks,
)
from nodeagent.api._base import Mark
from nodeagent.api._place import Place
from nodeagent.api._tree import Mapping
from nodeagent.api._types import (
    AuthorizationPolicy,
    Document,
    IdentitySet,
    PeerAuthentication,
    PortProtocol,
    Resolution,
    ServiceEntry,
    ServiceEntrySpec,
    WorkloadEntry,
)
from nodeagent.api._walk import Walker

__all__ = ["check", "marked"]


def check(walker: Walker, document: Document, root: Mapping, path: str) -> None:
    """Report to `walker` what is wrong with `document`, which was read from `root` at `path`."""
    place = Place(walker, root, path)
    _foreign_annotations(place, document)
    match document:
        case PeerAuthentication():
            _peer_authentication(place, document)
        case WorkloadEntry():
            _workload_entry(place, document)
        case ServiceEntry():
            _service_entry(place, document.spec)
        case AuthorizationPolicy():
            check_authorization_policy(place, document)
        case IdentitySet():
            check_identity_set(place, document)


def _foreign_annotations(place: Place, document: Document) -> None:
    """Report annotations that mean something on another kind only."""
    for key in document.metadata.annotations:
        at = ("metadata", "annotations", key)
        if key.startswith(_binding.ANNOTATION_PREFIX) and not isinstance(document, WorkloadEntry):
            place.error("has a meaning on a WorkloadEntry only: move it there", *at)
        if key == DRY_RUN and not isinstance(document, AuthorizationPolicy):
            place.warn("has no effect: only an AuthorizationPolicy can be a dry run", *at)


def marked(walker: Walker, document: Document, root: Mapping, path: str) -> Document:
    """Return `document` with the places of its parts that somebody may have to name later."""
    place = Place(walker, root, path)
    marks: tuple[Mark, ...] = ()
    match document:
        case AuthorizationPolicy():
            marks = policy_marks(place, document)
        case IdentitySet():
            marks = set_marks(place, document)
        case WorkloadEntry():
            marks = _callers_marks(place, document)
        case _:
            pass
    return msgspec.structs.replace(document, marks=marks) if marks else document


def _callers_marks(place: Place, document: WorkloadEntry) -> tuple[Mark, ...]:
    found = _binding.callers(document)
    if found is None:
        return ()
    at = ("metadata", "annotations", _binding.ANNOTATION_CALLERS)
    references = (
        patterns.qualified(value, document.metadata.namespace)
        for value in found
        if patterns.set_of(value)
    )
    return (place.mark(*at), *(place.mark(*at, refers=name) for name in references))


def _peer_authentication(place: Place, document: PeerAuthentication) -> None:
    spec = document.spec
    if spec.selector is not None and not spec.selector.match_labels:
        place.error(EMPTY_SELECTOR, "spec", "selector", "matchLabels")
    if spec.port_level_mtls and spec.selector is None:
        reason = (
            "needs a selector with matchLabels: ports belong to workloads, and without a selector "
            "the policy is for a whole namespace or mesh"
        )
        place.error(reason, "spec", "portLevelMtls")
    if not spec.port_level_mtls and place.has("spec", "portLevelMtls"):
        place.error("is empty: name at least one port, or delete it", "spec", "portLevelMtls")


def _workload_entry(place: Place, document: WorkloadEntry) -> None:
    for key, value in document.metadata.annotations.items():
        place.attempt(_binding.check_annotation, key, value, "metadata", "annotations", key)
    for key, value in document.metadata.labels.items():
        place.attempt(_binding.check_label, key, value, "metadata", "labels", key)
    for key, value in document.spec.labels.items():
        place.attempt(_binding.check_label, key, value, "spec", "labels", key)
        if document.metadata.labels.get(key, value) != value:
            place.warn("has no effect: metadata.labels gives it too", "spec", "labels", key)
    if _binding.ANNOTATION_CALLERS in document.metadata.annotations:
        _callers(place, document)
    if _binding.ANNOTATION_NETNS in document.metadata.annotations and _binding.opted_out(document):
        place.warn(
            "has no effect: the label istio.io/dataplane-mode: none takes the workload out",
            "metadata", "annotations", _binding.ANNOTATION_NETNS,
        )  # fmt: skip


def _callers(place: Place, document: WorkloadEntry) -> None:
    at = ("metadata", "annotations", _binding.ANNOTATION_CALLERS)
    if not _binding.speaks_hbone(document):
        place.warn("has no effect: the workload is outside the mesh, so nobody enforces it", *at)
    try:
        found = _binding.callers(document) or ()
    except ValueError:
        # Said already: the whole annotation is an error.
        return
    for value in filter(patterns.looks_past, found):
        place.warn(past(value), *at)


def _service_entry(place: Place, spec: ServiceEntrySpec) -> None:
    _hosts_and_addresses(place, spec)
    _ports(place, spec)
    _resolution(place, spec)
    _endpoints(place, spec)
    if spec.workload_selector is not None and not spec.workload_selector.labels:
        place.error(EMPTY_SELECTOR, "spec", "workloadSelector", "labels")
    if any(scope != "*" for scope in spec.export_to):
        place.warn("has no effect: at layer 4 a service is seen by all namespaces",
                   "spec", "exportTo")  # fmt: skip


def _hosts_and_addresses(place: Place, spec: ServiceEntrySpec) -> None:
    if not spec.hosts:
        place.error("is empty: name at least one host", "spec", "hosts")
    for field, values in (("hosts", spec.hosts), ("addresses", spec.addresses)):
        for index, value in enumerate(values):
            if value in values[:index]:
                place.error("is given twice: remove one", "spec", field, index)
    if spec.resolution is Resolution.STATIC:
        for index, name in enumerate(spec.hosts):
            if name.startswith("*"):
                reason = "a wildcard names no single service at layer 4: write the full name"
                place.error(reason, "spec", "hosts", index)


def _ports(place: Place, spec: ServiceEntrySpec) -> None:
    if not spec.ports:
        place.error("is empty: name at least one port", "spec", "ports")
    numbers: set[tuple[int, bool]] = set()
    names: set[str] = set()
    for index, port in enumerate(spec.ports):
        # DNS has TCP and UDP on one number.
        number = (port.number, port.protocol is PortProtocol.UDP)
        if number in numbers:
            place.error("is given twice: remove one", "spec", "ports", index, "number")
        if port.name in names:
            place.error("is given twice: rename one", "spec", "ports", index, "name")
        if port.protocol is PortProtocol.UDP:
            reason = "the port has no effect: only TCP is carried"
            place.warn(reason, "spec", "ports", index, "protocol")
        numbers.add(number)
        names.add(port.name)


def _resolution(place: Place, spec: ServiceEntrySpec) -> None:
    match spec.resolution:
        case Resolution.STATIC:
            if spec.endpoints and spec.workload_selector is not None:
                reason = "cannot stand beside endpoints: remove one of the two"
                place.error(reason, "spec", "workloadSelector")
            if not spec.endpoints and spec.workload_selector is None:
                reason = "STATIC needs endpoints or a workloadSelector: add one of the two"
                place.error(reason, "spec", "resolution")
        case Resolution.NONE:
            for field, given in (
                ("endpoints", bool(spec.endpoints)),
                ("workloadSelector", spec.workload_selector is not None),
            ):
                if given:
                    reason = "needs resolution: STATIC (without one it is NONE)"
                    place.error(reason, "spec", field)
            place.warn("NONE has no effect: traffic goes to its own destination",
                       "spec", "resolution")  # fmt: skip
        case _:
            reason = "this version resolves no names: write STATIC, with endpoints by address"
            place.error(reason, "spec", "resolution")


def _endpoints(place: Place, spec: ServiceEntrySpec) -> None:
    names = {port.name for port in spec.ports}
    seen: set[str] = set()
    for index, endpoint in enumerate(spec.endpoints):
        at = ("spec", "endpoints", index)
        if endpoint.address in seen:
            place.error("is given twice: use weight instead", *at, "address")
        seen.add(endpoint.address)
        for name in endpoint.ports:
            if name not in names:
                reason = f"is no port of this service; known: {', '.join(sorted(names))}"
                place.error(reason, *at, "ports", name)
        for key, value in endpoint.labels.items():
            place.attempt(_binding.check_label, key, value, *at, "labels", key)
            if key == _binding.LABEL_TUNNEL:
                # Taken here without a workload it would be plaintext where its author wants HBONE.
                reason = (
                    "an endpoint written here has no identity of its own: write a WorkloadEntry "
                    "with this label, and select it"
                )
                place.error(reason, *at, "labels", key)
