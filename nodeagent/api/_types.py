"""The resources: Istio's, as far as layer 4 reads them.

This module owns the shape of every resource that configuration may hold. It promises strict types:
an unknown field is an error, and a field of Istio's that has no effect here is named as such, so
that no setting is silently without effect. It may not read text or decide what a resource does.

Source: istio.io/api security/v1 PeerAuthentication, networking/v1 WorkloadEntry and ServiceEntry,
and the rules of Istio's validating webhook (istio/istio pkg/config/validation).
"""

from __future__ import annotations

import datetime as dt
import enum
from typing import Annotated, Any

import msgspec

from nodeagent.api import values
from nodeagent.api._errors import Origin
from nodeagent.api._walk import IGNORED, NULLABLE, Check, Unused

__all__ = [
    "DEFAULT_NAMESPACE",
    "DEFAULT_SERVICE_ACCOUNT",
    "Document",
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

DEFAULT_NAMESPACE = "default"
"""The namespace of a document that names none, as in Kubernetes."""

DEFAULT_SERVICE_ACCOUNT = "default"
"""The service account of a workload that names none, as in Kubernetes."""

Labels = dict[Annotated[str, Check(values.label_key)], Annotated[str, Check(values.label_value)]]
Annotations = Annotated[
    dict[
        Annotated[str, Check(values.annotation_key)],
        Annotated[str, Check(values.annotation_value)],
    ],
    Check(values.metadata_annotations),
]
Port = Annotated[int, Check(values.port)]
PortName = Annotated[str, Check(values.dns_label)]
Address = Annotated[str, Check(values.address)]
Text = Annotated[str, Check(values.text)]
Ignored = Annotated[Any, IGNORED]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    pass


class ObjectMeta(_Strict, frozen=True, kw_only=True):
    """Kubernetes' metadata. What a server writes for itself is tolerated and left unread."""

    name: Annotated[str, Check(values.dns_subdomain)]
    namespace: Annotated[str, Check(values.dns_label)] = DEFAULT_NAMESPACE
    labels: Labels = {}
    annotations: Annotations = {}
    creation_timestamp: Annotated[dt.datetime | None, NULLABLE, Check(values.timestamp)] = None
    generate_name: Ignored = None
    self_link: Ignored = None
    uid: Ignored = None
    resource_version: Ignored = None
    generation: Ignored = None
    deletion_timestamp: Ignored = None
    deletion_grace_period_seconds: Ignored = None
    owner_references: Ignored = None
    finalizers: Ignored = None
    managed_fields: Ignored = None


# --- PeerAuthentication ------------------------------------------------------------------------


class MtlsMode(enum.Enum):
    """Mode of mutual TLS as written; UNSET inherits from the wider scope."""

    UNSET = "UNSET"
    DISABLE = "DISABLE"
    PERMISSIVE = "PERMISSIVE"
    STRICT = "STRICT"


class MutualTls(_Strict, frozen=True, kw_only=True):
    mode: MtlsMode = MtlsMode.UNSET


class WorkloadSelector(_Strict, frozen=True, kw_only=True):
    """Selects the workloads of the policy's namespace that carry all of `match_labels`.

    Never empty: a selector that lost its labels would select every workload, so it is refused.
    """

    match_labels: Labels


class PeerAuthenticationSpec(_Strict, frozen=True, kw_only=True):
    """`port_level_mtls` is keyed by the workload's ports, not by a service's."""

    selector: WorkloadSelector | None = None
    mtls: MutualTls = MutualTls()
    port_level_mtls: dict[Port, MutualTls] = {}


# --- WorkloadEntry -----------------------------------------------------------------------------

_NETWORK = Unused("has no effect: this version takes every address for directly reachable")


class WorkloadEntrySpec(_Strict, frozen=True, kw_only=True):
    """`ports` maps the names of a service's ports to this workload's own ports."""

    address: Address
    ports: dict[PortName, Port] = {}
    labels: Labels = {}
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


class ServiceEntryPort(_Strict, frozen=True, kw_only=True):
    """A port of a service. `target_port` is where the workload listens, `number` if absent."""

    number: Port
    name: PortName
    protocol: PortProtocol = PortProtocol.TCP
    target_port: Port | None = None


class WorkloadLabels(_Strict, frozen=True, kw_only=True):
    """Selects the WorkloadEntries of the same namespace that carry all of `labels`; never empty."""

    labels: Labels


class ServiceEntryEndpoint(_Strict, frozen=True, kw_only=True):
    """An endpoint written inside a ServiceEntry; the fields are those of a WorkloadEntry."""

    address: Address
    ports: dict[PortName, Port] = {}
    labels: Labels = {}
    network: Annotated[Text, _NETWORK] = ""
    locality: Annotated[str, Check(values.locality)] = ""
    weight: Annotated[int, Check(values.weight)] = 1
    service_account: Annotated[str, Check(values.service_account)] | None = None


class ServiceEntrySpec(_Strict, frozen=True, kw_only=True):
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


class _Document(msgspec.Struct, frozen=True, kw_only=True):
    metadata: ObjectMeta
    origin: Origin

    @property
    def uid(self) -> str:
        """The key within its kind: "namespace/name"."""
        return f"{self.metadata.namespace}/{self.metadata.name}"

    @property
    def age(self) -> tuple[dt.datetime, str]:
        """What the oldest of several is told by: creation, then uid. Without a time: the newest."""
        created = self.metadata.creation_timestamp
        return (created or _END_OF_TIME, self.uid)


_END_OF_TIME = dt.datetime.max.replace(tzinfo=dt.UTC)


class PeerAuthentication(_Document, frozen=True, kw_only=True, tag=True):
    spec: PeerAuthenticationSpec


class WorkloadEntry(_Document, frozen=True, kw_only=True, tag=True):
    spec: WorkloadEntrySpec

    @property
    def labels(self) -> dict[str, str]:
        """The labels that selectors see: as in Istio, those in the metadata win over the spec's."""
        return {**self.spec.labels, **self.metadata.labels}


class ServiceEntry(_Document, frozen=True, kw_only=True, tag=True):
    spec: ServiceEntrySpec


Document = PeerAuthentication | WorkloadEntry | ServiceEntry
