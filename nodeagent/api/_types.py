"""The resources: Istio's, as far as layer 4 reads them.

This module owns the shape of every resource that configuration may hold. It promises strict types:
an unknown field is an error, and a field of Istio's that has no effect here is named as such, so
that no setting is silently without effect. It may not read text or decide what a resource does.

Source: istio.io/api security/v1 PeerAuthentication and AuthorizationPolicy, networking/v1
WorkloadEntry and ServiceEntry, and the rules of Istio's validating webhook (istio/istio
pkg/config/validation).
"""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec

from nodeagent.api import values
from nodeagent.api._authorization import AuthorizationPolicySpec, IdentitySetSpec
from nodeagent.api._base import (
    DEFAULT_NAMESPACE,
    DEFAULT_SERVICE_ACCOUNT,
    Address,
    BaseDocument,
    Labels,
    Mark,
    ObjectMeta,
    Port,
    PortName,
    Strict,
    Text,
    WorkloadSelector,
)
from nodeagent.api._walk import Check, Unused

__all__ = [
    "DEFAULT_NAMESPACE",
    "DEFAULT_SERVICE_ACCOUNT",
    "AuthorizationPolicy",
    "Document",
    "IdentitySet",
    "Mark",
    "MtlsMode",
    "MutualTls",
    "ObjectMeta",
    "PeerAuthentication",
    "PeerAuthenticationSpec",
    "PortProtocol",
    "Resolution",
    "ServiceEntry",
    "ServiceEntryEndpoint",
    "ServiceEntryPort",
    "ServiceEntrySpec",
    "ServiceLocation",
    "WorkloadEntry",
    "WorkloadEntrySpec",
    "WorkloadLabels",
    "WorkloadSelector",
]

# --- PeerAuthentication ------------------------------------------------------------------------


class MtlsMode(enum.Enum):
    """Mode of mutual TLS as written; UNSET inherits from the wider scope."""

    UNSET = "UNSET"
    DISABLE = "DISABLE"
    PERMISSIVE = "PERMISSIVE"
    STRICT = "STRICT"


class MutualTls(Strict, frozen=True, kw_only=True):
    mode: MtlsMode = MtlsMode.UNSET


class PeerAuthenticationSpec(Strict, frozen=True, kw_only=True):
    """`port_level_mtls` is keyed by the workload's ports, not by a service's."""

    selector: WorkloadSelector | None = None
    mtls: MutualTls = MutualTls()
    port_level_mtls: dict[Port, MutualTls] = msgspec.field(default_factory=dict)


# --- WorkloadEntry -----------------------------------------------------------------------------

_NETWORK = Unused("has no effect: this version takes every address for directly reachable")


class WorkloadEntrySpec(Strict, frozen=True, kw_only=True):
    """`ports` maps the names of a service's ports to this workload's own ports."""

    address: Address
    ports: dict[PortName, Port] = msgspec.field(default_factory=dict)
    labels: Labels = msgspec.field(default_factory=dict)
    network: Annotated[Text, _NETWORK] = ""
    locality: Annotated[str, Check(values.locality)] = ""
    weight: Annotated[int, Check(values.weight)] = 1
    service_account: Annotated[str, Check(values.service_account)] = DEFAULT_SERVICE_ACCOUNT


# --- ServiceEntry ------------------------------------------------------------------------------


class PortProtocol(enum.Enum):
    """Istio's protocols. At layer 4 all but UDP are TCP."""

    TCP = "TCP"
    TLS = "TLS"
    HTTP = "HTTP"
    HTTP2 = "HTTP2"
    HTTPS = "HTTPS"
    GRPC = "GRPC"
    GRPC_WEB = "GRPC-WEB"
    MONGO = "MONGO"
    MYSQL = "MYSQL"
    REDIS = "REDIS"
    UDP = "UDP"


class ServiceLocation(enum.Enum):
    MESH_EXTERNAL = "MESH_EXTERNAL"
    MESH_INTERNAL = "MESH_INTERNAL"


class Resolution(enum.Enum):
    NONE = "NONE"
    STATIC = "STATIC"
    DNS = "DNS"
    DNS_ROUND_ROBIN = "DNS_ROUND_ROBIN"
    DYNAMIC_DNS = "DYNAMIC_DNS"


class ServiceEntryPort(Strict, frozen=True, kw_only=True):
    """A port of a service. `target_port` is where the workload listens, `number` if absent."""

    number: Port
    name: PortName
    protocol: PortProtocol = PortProtocol.TCP
    target_port: Port | None = None


class WorkloadLabels(Strict, frozen=True, kw_only=True):
    """Selects the WorkloadEntries of the same namespace that carry all of `labels`; never empty."""

    labels: Labels


class ServiceEntryEndpoint(Strict, frozen=True, kw_only=True):
    """An endpoint written inside a ServiceEntry; the fields are those of a WorkloadEntry."""

    address: Address
    ports: dict[PortName, Port] = msgspec.field(default_factory=dict)
    labels: Labels = msgspec.field(default_factory=dict)
    network: Annotated[Text, _NETWORK] = ""
    locality: Annotated[str, Check(values.locality)] = ""
    weight: Annotated[int, Check(values.weight)] = 1
    service_account: Annotated[str, Check(values.service_account)] | None = None


class ServiceEntrySpec(Strict, frozen=True, kw_only=True):
    hosts: tuple[Annotated[str, Check(values.host)], ...]
    addresses: tuple[Annotated[str, Check(values.vip)], ...] = ()
    ports: tuple[ServiceEntryPort, ...]
    location: ServiceLocation = ServiceLocation.MESH_EXTERNAL
    resolution: Resolution = Resolution.NONE
    endpoints: tuple[ServiceEntryEndpoint, ...] = ()
    workload_selector: WorkloadLabels | None = None
    export_to: tuple[Text, ...] = ()
    subject_alt_names: Annotated[
        tuple[Text, ...],
        Unused("has no effect: each endpoint must prove its own workload's identity"),
    ] = ()


# --- documents ---------------------------------------------------------------------------------


class PeerAuthentication(BaseDocument, frozen=True, kw_only=True, tag=True):
    spec: PeerAuthenticationSpec


class WorkloadEntry(BaseDocument, frozen=True, kw_only=True, tag=True):
    """`marks` without `refers` is the annotation of its callers, if it has one."""

    spec: WorkloadEntrySpec

    @property
    def labels(self) -> dict[str, str]:
        """The labels that selectors see: as in Istio, those in the metadata win over the spec's."""
        if self.spec.labels and self.metadata.labels:
            return {**self.spec.labels, **self.metadata.labels}
        return self.spec.labels or self.metadata.labels


class ServiceEntry(BaseDocument, frozen=True, kw_only=True, tag=True):
    spec: ServiceEntrySpec


class AuthorizationPolicy(BaseDocument, frozen=True, kw_only=True, tag=True):
    """`marks` without `refers` are its rules, those with it its references to identity sets."""

    spec: AuthorizationPolicySpec


class IdentitySet(BaseDocument, frozen=True, kw_only=True, tag=True):
    """A named set of SPIFFE IDs. `marks` hold the references to other sets."""

    spec: IdentitySetSpec


Document = PeerAuthentication | WorkloadEntry | ServiceEntry | AuthorizationPolicy | IdentitySet
