"""AuthorizationPolicy and IdentitySet: who may call whom, as written.

This module owns the shape of both specs, and which of an AuthorizationPolicy's fields are layer 7.
It promises strict types, and that no list in a rule is empty: one that lost its items would match
any caller (CVE-2025-64715). It may not decide what a rule matches.

Source: istio.io/api security/v1beta1 (authorization_policy.proto) and istio/istio
pkg/config/validation (ValidateAuthorizationPolicy).
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Annotated, Final

import msgspec

from nodeagent.api import patterns
from nodeagent.api._base import Strict, Text, WorkloadSelector
from nodeagent.api._walk import Check

__all__ = [
    "CONDITION_KEYS",
    "DRY_RUN",
    "AuthorizationPolicySpec",
    "AuthorizationRule",
    "Condition",
    "From",
    "IdentitySetSpec",
    "Operation",
    "PolicyAction",
    "Provider",
    "Source",
    "TargetReference",
    "To",
    "is_layer7_key",
    "layer7",
    "only_layer7",
]

DRY_RUN: Final = "istio.io/dry-run"
"""Annotation: the policy is evaluated and logged, and not enforced."""

_Some = Check(patterns.not_empty)

Principals = Annotated[tuple[Annotated[str, Check(patterns.principal)], ...], _Some]
Identities = Annotated[tuple[Annotated[str, Check(patterns.identity)], ...], _Some]
Namespaces = Annotated[tuple[Annotated[str, Check(patterns.namespace)], ...], _Some]
Accounts = Annotated[tuple[Annotated[str, Check(patterns.account)], ...], _Some]
Blocks = Annotated[tuple[Annotated[str, Check(patterns.block)], ...], _Some]
Ports = Annotated[tuple[Annotated[str, Check(patterns.port)], ...], _Some]
Words = Annotated[tuple[Annotated[str, Check(patterns.word)], ...], _Some]


class PolicyAction(enum.Enum):
    ALLOW = "ALLOW"
    DENY = "DENY"
    AUDIT = "AUDIT"
    CUSTOM = "CUSTOM"


class Source(Strict, frozen=True, kw_only=True):
    """Who calls. All fields must hold; in each, one of the values."""

    principals: Principals = ()
    not_principals: Principals = ()
    request_principals: Words = ()
    not_request_principals: Words = ()
    namespaces: Namespaces = ()
    not_namespaces: Namespaces = ()
    service_accounts: Accounts = ()
    not_service_accounts: Accounts = ()
    ip_blocks: Blocks = ()
    not_ip_blocks: Blocks = ()
    remote_ip_blocks: Blocks = ()
    not_remote_ip_blocks: Blocks = ()


class Operation(Strict, frozen=True, kw_only=True):
    """What is called. All fields must hold; in each, one of the values."""

    hosts: Words = ()
    not_hosts: Words = ()
    ports: Ports = ()
    not_ports: Ports = ()
    methods: Words = ()
    not_methods: Words = ()
    paths: Words = ()
    not_paths: Words = ()


class From(Strict, frozen=True, kw_only=True):
    source: Source


class To(Strict, frozen=True, kw_only=True):
    operation: Operation


class Condition(Strict, frozen=True, kw_only=True):
    """A further condition. What `values` may hold depends on the key: `CONDITION_KEYS`."""

    key: Text
    values: Annotated[tuple[Text, ...], _Some] = ()
    not_values: Annotated[tuple[Text, ...], _Some] = ()


class AuthorizationRule(Strict, frozen=True, kw_only=True):
    """One of `sources`, one of `operations`, and all of `when`; what is absent matches all."""

    sources: Annotated[tuple[From, ...], _Some] = msgspec.field(default=(), name="from")
    operations: Annotated[tuple[To, ...], _Some] = msgspec.field(default=(), name="to")
    when: Annotated[tuple[Condition, ...], _Some] = ()


class TargetReference(Strict, frozen=True, kw_only=True):
    """What a waypoint or gateway enforces; nothing for an agent at the workload."""

    group: Text = ""
    kind: Text
    name: Annotated[str, Check(patterns.word)]
    namespace: Text = ""


class Provider(Strict, frozen=True, kw_only=True):
    name: Text = ""


class AuthorizationPolicySpec(Strict, frozen=True, kw_only=True):
    """`rules` None and () mean the same: nothing matches."""

    selector: WorkloadSelector | None = None
    target_ref: TargetReference | None = None
    target_refs: Annotated[tuple[TargetReference, ...], _Some] = ()
    rules: tuple[AuthorizationRule, ...] | None = None
    action: PolicyAction = PolicyAction.ALLOW
    provider: Provider | None = None


class IdentitySetSpec(Strict, frozen=True, kw_only=True):
    """`identities` are patterns of SPIFFE IDs and references to other sets."""

    identities: Identities


CONDITION_KEYS: Final = {
    "source.ip": patterns.block,
    "source.namespace": patterns.namespace,
    "source.principal": patterns.principal,
    "source.serviceAccount": patterns.account,
    "destination.ip": patterns.block,
    "destination.port": patterns.port,
}
"""The keys of conditions that layer 4 can evaluate, each with the grammar of its values."""

_LAYER7_KEYS: Final = frozenset(
    {
        "remote.ip",
        "request.auth.principal",
        "request.auth.audiences",
        "request.auth.presenter",
        "connection.sni",
    }
)
_LAYER7_MAPS: Final = ("request.headers[", "request.auth.claims[", "experimental.envoy.filters.")

_LAYER7_SOURCE: Final = {
    "request_principals": "requestPrincipals",
    "not_request_principals": "notRequestPrincipals",
    "remote_ip_blocks": "remoteIpBlocks",
    "not_remote_ip_blocks": "notRemoteIpBlocks",
}
_LAYER7_OPERATION: Final = {
    "hosts": "hosts",
    "not_hosts": "notHosts",
    "methods": "methods",
    "not_methods": "notMethods",
    "paths": "paths",
    "not_paths": "notPaths",
}


def is_layer7_key(key: str) -> bool:
    """Return whether Istio knows `key` as a condition that layer 4 cannot evaluate."""
    if key in _LAYER7_KEYS:
        return True
    # Istio's form is a[b], with something in between.
    return key.startswith(_LAYER7_MAPS) and key.endswith("]") and 0 < key.find("[") < len(key) - 2


def layer7(rule: AuthorizationRule) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yield each field of `rule` that is not evaluated: its place below the rule, and its name."""
    for index, each in enumerate(rule.sources):
        for attribute, name in _LAYER7_SOURCE.items():
            if getattr(each.source, attribute):
                yield ("from", index, "source", name), name
    for index, operation in enumerate(rule.operations):
        for attribute, name in _LAYER7_OPERATION.items():
            if getattr(operation.operation, attribute):
                yield ("to", index, "operation", name), name
    for index, condition in enumerate(rule.when):
        if condition.key not in CONDITION_KEYS:
            yield ("when", index, "key"), condition.key


def only_layer7(part: Source | Operation) -> bool:
    """Return whether nothing of a source or operation is evaluated."""
    names = _LAYER7_SOURCE if isinstance(part, Source) else _LAYER7_OPERATION
    return msgspec.structs.replace(part, **dict.fromkeys(names, ())) == type(part)()
