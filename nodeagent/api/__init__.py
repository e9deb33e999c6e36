"""The configuration language: Istio's resources, as far as layer 4 reads them.

This package owns the resource types, the reader of YAML and JSON with places in every error, and
the grammar of names, labels, ports and addresses. It promises strictness: what it does not
understand or enforce it refuses, and no reading ever raises, hangs or grows out of bounds. It is
pure: it reads no files, clocks or sockets, and compares no documents of different files.

Theory of operation: bytes become a bounded tree of marked nodes (`_tree`), typed by what the schema
expects at each place (`_walk`, `_scalars`, `values`, `_types`), checked between fields (`_rules`),
and put into envelopes (`_loader`). `_claims` names what only one document may hold.
"""

from nodeagent.api import values
from nodeagent.api._binding import (
    ANNOTATION_ADDRESSES,
    ANNOTATION_NETNS,
    NetnsBinding,
    addresses,
    netns_binding,
    opted_out,
    speaks_hbone,
)
from nodeagent.api._claims import claims, conflict
from nodeagent.api._errors import ConfigError, ConfigWarning, Origin
from nodeagent.api._loader import Loaded, load, read_struct
from nodeagent.api._types import (
    DEFAULT_NAMESPACE,
    DEFAULT_SERVICE_ACCOUNT,
    Document,
    MtlsMode,
    MutualTls,
    ObjectMeta,
    PeerAuthentication,
    PeerAuthenticationSpec,
    PortProtocol,
    Resolution,
    ServiceEntry,
    ServiceEntryEndpoint,
    ServiceEntryPort,
    ServiceEntrySpec,
    ServiceLocation,
    WorkloadEntry,
    WorkloadEntrySpec,
    WorkloadLabels,
    WorkloadSelector,
)
from nodeagent.api._walk import Check

__all__ = [
    "ANNOTATION_ADDRESSES",
    "ANNOTATION_NETNS",
    "DEFAULT_NAMESPACE",
    "DEFAULT_SERVICE_ACCOUNT",
    "Check",
    "ConfigError",
    "ConfigWarning",
    "Document",
    "Loaded",
    "MtlsMode",
    "MutualTls",
    "NetnsBinding",
    "ObjectMeta",
    "Origin",
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
    "addresses",
    "claims",
    "conflict",
    "load",
    "netns_binding",
    "opted_out",
    "read_struct",
    "speaks_hbone",
    "values",
]
