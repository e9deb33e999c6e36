"""The labels of Istio's standard TCP metrics: who called whom, through which service, how secured.

This module owns the label names, their order and how a connection gets their values. It promises
that a label that names an identity was proved by that identity's key (between two pods of this
node that are joined directly: by its certificate, whose key this node holds), that a missing value
reads `unknown` (Kiali matches on it) and that values come from the mesh's state, never from what a
peer said of itself. It is pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from ztunnel.protocol import Service, Workload

__all__ = [
    "DESTINATION",
    "LABEL_NAMES",
    "MUTUAL_TLS",
    "PLAINTEXT",
    "SOURCE",
    "UNKNOWN",
    "Labels",
    "inbound_services",
    "is_handed_over",
    "make",
    "overflow",
    "service_name",
    "value",
    "workloads",
]

UNKNOWN: Final = "unknown"
SOURCE: Final = "source"
DESTINATION: Final = "destination"
MUTUAL_TLS: Final = "mutual_tls"
PLAINTEXT: Final = "none"

_WORKLOAD_LABELS: Final = (
    "workload",
    "workload_namespace",
    "canonical_service",
    "canonical_revision",
    "principal",
    "app",
    "version",
    "cluster",
    "region",
    "zone",
)

LABEL_NAMES: Final = (
    "reporter",
    "request_protocol",
    "connection_security_policy",
    *(f"source_{name}" for name in _WORKLOAD_LABELS),
    *(f"destination_{name}" for name in _WORKLOAD_LABELS),
    "destination_service",
    "destination_service_name",
    "destination_service_namespace",
)
"""Labels of a series, in the order of `Labels`; `response_flags` comes with each sample."""

Labels = tuple[str, ...]

_POSITION: Final = {name: position for position, name in enumerate(LABEL_NAMES)}
_NAMED: Final = tuple(
    (_POSITION[f"{side}_workload"], _POSITION[f"{side}_workload_namespace"])
    for side in (SOURCE, DESTINATION)
)


def value(labels: Labels, name: str) -> str:
    """Return one label's value, empty when it is unknown."""
    found = labels[_POSITION[name]]
    return "" if found == UNKNOWN else found


def workloads(labels: Labels) -> Iterator[str]:
    """Yield the uids of the workloads that a label set names."""
    for name, namespace in _NAMED:
        if labels[name] != UNKNOWN:
            yield f"{labels[namespace]}/{labels[name]}"


def make(
    reporter: str,
    security: str,
    source: Workload | None,
    destination: Workload | None,
    service: Service | None,
    *,
    source_principal: str = "",
    destination_principal: str = "",
) -> Labels:
    """Return the labels of a connection. `security` is MUTUAL_TLS, PLAINTEXT or UNKNOWN."""
    return (
        reporter,
        "tcp",
        security,
        *_side(source, source_principal),
        *_side(destination, destination_principal),
        *(
            (service.hostname, service_name(service), service.namespace or UNKNOWN)
            if service is not None
            else (UNKNOWN, UNKNOWN, UNKNOWN)
        ),
    )


def is_handed_over(labels: Labels) -> bool:
    """True for what went between two pods of this node directly: both known, nothing encrypted."""
    return value(labels, "connection_security_policy") == PLAINTEXT and bool(
        value(labels, "source_principal")
    )


def overflow(labels: Labels) -> Labels:
    """Return the one label set that stands for all of a reporter beyond the limit of series."""
    return labels[:3] + (UNKNOWN,) * (len(LABEL_NAMES) - 3)


def _side(workload: Workload | None, principal: str) -> tuple[str, ...]:
    if workload is None:
        # A namespace alone, though the identity may name one, makes Kiali drop the edge.
        return tuple(
            (principal or UNKNOWN) if name == "principal" else UNKNOWN for name in _WORKLOAD_LABELS
        )
    region, _, rest = workload.locality.partition("/")
    zone = rest.partition("/")[0]
    # Istio's own fallbacks: series without a canonical name or revision are skipped by Kiali.
    canonical = workload.canonical_service or workload.app or workload.name
    revision = workload.canonical_revision or workload.version or "latest"
    return (
        workload.name or UNKNOWN,
        workload.namespace or UNKNOWN,
        canonical or UNKNOWN,
        revision,
        principal or UNKNOWN,
        workload.app or canonical or UNKNOWN,
        workload.version or revision,
        workload.cluster or UNKNOWN,
        region or UNKNOWN,
        zone or UNKNOWN,
    )


def service_name(service: Service) -> str:
    """Return the short name of a cluster service ("name.namespace.svc.…"), else the hostname."""
    name, dot, rest = service.hostname.partition(".")
    return name if dot and rest.startswith(f"{service.namespace}.svc") else service.hostname


def inbound_services(
    services: Mapping[str, Service], workloads: Iterable[str]
) -> dict[tuple[str, int], Service]:
    """Return which service an inbound connection to (workload, port) most likely came through.

    The wire does not say it. Where several services have the same endpoint, the first by uid is
    named, so that every node names the same.
    """
    wanted = frozenset(workloads)
    found: dict[tuple[str, int], Service] = {}
    for uid in sorted(services):
        service = services[uid]
        for endpoint in service.endpoints:
            if endpoint.workload not in wanted:
                continue
            for port in service.ports:
                target = endpoint.ports.get(port.number, port.target)
                found.setdefault((endpoint.workload, target), service)
    return found
