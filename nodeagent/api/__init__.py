"""The configuration language: Istio's resources, as far as layer 4 reads them.

This package owns the resource types, the reader of YAML and JSON with places in every error, and
the grammar of names, labels, ports and addresses. It promises strictness: what it does not
understand or enforce it refuses, and no reading ever raises, hangs or grows out of bounds. It is
pure: it reads no files, clocks or sockets, and compares no documents of different files.

Theory of operation: bytes become a bounded tree of marked nodes (`_tree`), typed by what the schema
expects at each place (`_walk`, `_scalars`, `values`, `_types`), checked between fields (`_rules`),
and put into envelopes (`_loader`). `_claims` names what only one document may hold; `patterns` is
the grammar of what policies compare with, and `_schema` tells editors as much of all this as a JSON
Schema can.
"""

from nodeagent.api import patterns, values
from nodeagent.api._authorization import (
    CONDITION_KEYS,
    DRY_RUN,
    AuthorizationPolicySpec,
    AuthorizationRule,
    Condition,
    From,
    IdentitySetSpec,
    Operation,
    PolicyAction,
    Source,
    TargetReference,
    To,
    layer7,
)
from nodeagent.api._base import (
    DEFAULT_NAMESPACE,
    DEFAULT_SERVICE_ACCOUNT,
    BaseDocument,
    Mark,
    ObjectMeta,
    WorkloadSelector,
)
from nodeagent.api._binding import (
    ANNOTATION_ADDRESSES,
    ANNOTATION_CALLERS,
    ANNOTATION_NETNS,
    NetnsBinding,
    addresses,
    callers,
    netns_binding,
    opted_out,
    speaks_hbone,
)
from nodeagent.api._claims import claims, conflict, own_conflicts
from nodeagent.api._errors import ConfigError, ConfigWarning, Origin, quote
from nodeagent.api._loader import (
    Loaded,
    load,
    load_file,
    read_struct,
    read_struct_lines,
    read_struct_of_list,
)
from nodeagent.api._schema import custom_resource_definitions, json_schema, json_schemas
from nodeagent.api._types import (
    AuthorizationPolicy,
    Document,
    IdentitySet,
    MtlsMode,
    MutualTls,
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
)
from nodeagent.api._walk import Check

__all__ = [
    "ANNOTATION_ADDRESSES",
    "ANNOTATION_CALLERS",
    "ANNOTATION_NETNS",
    "CONDITION_KEYS",
    "DEFAULT_NAMESPACE",
    "DEFAULT_SERVICE_ACCOUNT",
    "DRY_RUN",
    "AuthorizationPolicy",
    "AuthorizationPolicySpec",
    "AuthorizationRule",
    "BaseDocument",
    "Check",
    "Condition",
    "ConfigError",
    "ConfigWarning",
    "Document",
    "From",
    "IdentitySet",
    "IdentitySetSpec",
    "Loaded",
    "Mark",
    "MtlsMode",
    "MutualTls",
    "NetnsBinding",
    "ObjectMeta",
    "Operation",
    "Origin",
    "PeerAuthentication",
    "PeerAuthenticationSpec",
    "PolicyAction",
    "PortProtocol",
    "Resolution",
    "ServiceEntry",
    "ServiceEntryEndpoint",
    "ServiceEntryPort",
    "ServiceEntrySpec",
    "ServiceLocation",
    "Source",
    "TargetReference",
    "To",
    "WorkloadEntry",
    "WorkloadEntrySpec",
    "WorkloadLabels",
    "WorkloadSelector",
    "addresses",
    "callers",
    "claims",
    "conflict",
    "custom_resource_definitions",
    "json_schema",
    "json_schemas",
    "layer7",
    "load",
    "load_file",
    "netns_binding",
    "opted_out",
    "own_conflicts",
    "patterns",
    "quote",
    "read_struct",
    "read_struct_lines",
    "read_struct_of_list",
    "speaks_hbone",
    "values",
]
