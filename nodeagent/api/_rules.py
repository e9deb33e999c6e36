"""What a single resource must keep to beyond the types of its fields.

This module owns the rules between fields: Istio's webhook rules as far as they concern layer 4, and
refusals of what this version would otherwise leave without effect. It promises to report each
breach at the node that causes it, and to be the same for every source. It may not compare
resources with one another.

Source: istio/istio pkg/config/validation (ValidatePeerAuthentication, ValidateServiceEntry).
"""

from __future__ import annotations

from collections.abc import Callable

from nodeagent.api import _binding
from nodeagent.api._tree import Mapping, Node, Sequence, join
from nodeagent.api._types import (
    Document,
    PeerAuthentication,
    PortProtocol,
    Resolution,
    ServiceEntry,
    ServiceEntrySpec,
    WorkloadEntry,
)
from nodeagent.api._walk import Walker

__all__ = ["check"]


def check(walker: Walker, document: Document, root: Mapping, path: str) -> None:
    """Report to `walker` what is wrong with `document`, which was read from `root` at `path`."""
    place = _Place(walker, root, path)
    match document:
        case PeerAuthentication():
            _peer_authentication(place, document)
        case WorkloadEntry():
            _workload_entry(place, document)
        case ServiceEntry():
            _service_entry(place, document.spec)


class _Place:
    """A document's nodes by path, so that a rule can point at the line that breaks it."""

    def __init__(self, walker: Walker, root: Mapping, path: str) -> None:
        self._walker = walker
        self._root = root
        self._path = path

    def _find(self, keys: tuple[str | int, ...]) -> tuple[Node, str]:
        """Return the deepest node that exists on the way, and the path that was asked for."""
        node: Node | None = self._root
        deepest: Node = self._root
        path = self._path
        for key in keys:
            path = join(path, key)
            if isinstance(node, Mapping) and isinstance(key, str):
                node = node.get(key)
            elif isinstance(node, Sequence) and isinstance(key, int):
                node = node.items[key]
            else:
                node = None
            deepest = node or deepest
        return deepest, path

    def has(self, *keys: str | int) -> bool:
        """Return whether the author wrote the field at all."""
        parent, _ = self._find(keys[:-1])
        return isinstance(parent, Mapping) and keys[-1] in parent.entries

    def attempt(
        self, function: Callable[[str, str], None], key: str, value: str, *keys: str | int
    ) -> None:
        """Report as an error what `function` says of `key` and `value`."""
        try:
            function(key, value)
        except ValueError as error:
            self.error(str(error), *keys)

    def error(self, reason: str, *keys: str | int) -> None:
        node, path = self._find(keys)
        self._walker.error(node, path, reason)

    def warn(self, reason: str, *keys: str | int) -> None:
        node, path = self._find(keys)
        self._walker.warn(node, path, reason)


def _peer_authentication(place: _Place, document: PeerAuthentication) -> None:
    spec = document.spec
    if spec.selector is not None and not spec.selector.match_labels:
        place.error(_EMPTY_SELECTOR, "spec", "selector", "matchLabels")
    if spec.port_level_mtls and spec.selector is None:
        reason = (
            "needs a selector with matchLabels: ports belong to workloads, and without a selector "
            "the policy is for a whole namespace or mesh"
        )
        place.error(reason, "spec", "portLevelMtls")
    if not spec.port_level_mtls and place.has("spec", "portLevelMtls"):
        place.error("is empty: name at least one port, or delete it", "spec", "portLevelMtls")


_EMPTY_SELECTOR = (
    "is empty and would select every workload: name at least one label; to mean all, "
    "delete the whole selector"
)


def _workload_entry(place: _Place, document: WorkloadEntry) -> None:
    for key, value in document.metadata.annotations.items():
        place.attempt(_binding.check_annotation, key, value, "metadata", "annotations", key)
    for key, value in document.metadata.labels.items():
        place.attempt(_binding.check_label, key, value, "metadata", "labels", key)
    for key, value in document.spec.labels.items():
        place.attempt(_binding.check_label, key, value, "spec", "labels", key)
        if document.metadata.labels.get(key, value) != value:
            place.warn("has no effect: metadata.labels gives it too", "spec", "labels", key)
    if _binding.ANNOTATION_NETNS in document.metadata.annotations and _binding.opted_out(document):
        place.warn(
            "has no effect: the label istio.io/dataplane-mode: none takes the workload out",
            "metadata", "annotations", _binding.ANNOTATION_NETNS,
        )  # fmt: skip


def _service_entry(place: _Place, spec: ServiceEntrySpec) -> None:
    _hosts_and_addresses(place, spec)
    _ports(place, spec)
    _resolution(place, spec)
    _endpoints(place, spec)
    if spec.workload_selector is not None and not spec.workload_selector.labels:
        place.error(_EMPTY_SELECTOR, "spec", "workloadSelector", "labels")
    if any(scope != "*" for scope in spec.export_to):
        place.warn("has no effect: at layer 4 a service is seen by all namespaces",
                   "spec", "exportTo")  # fmt: skip


def _hosts_and_addresses(place: _Place, spec: ServiceEntrySpec) -> None:
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


def _ports(place: _Place, spec: ServiceEntrySpec) -> None:
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


def _resolution(place: _Place, spec: ServiceEntrySpec) -> None:
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


def _endpoints(place: _Place, spec: ServiceEntrySpec) -> None:
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
