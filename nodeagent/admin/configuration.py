"""The published shape of `/configuration`: the documents in force, and what they are judged by.

This module owns the type that `/configuration` encodes and a command decodes, to answer questions
by the same documents as the daemon. It promises that documents come back equal, places in files
included. Only the two of one release need to understand each other: `schema` is raised with any
change of a resource's type, and readers refuse what they do not know. Nothing in here is a secret.
Pure: no sockets, no clocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from nodeagent.api import (
    AuthorizationPolicy,
    Document,
    IdentitySet,
    PeerAuthentication,
    ServiceEntry,
    WorkloadEntry,
)
from nodeagent.settings import Settings

__all__ = ["CONFIGURATION_SCHEMA", "Configuration", "Documents"]

CONFIGURATION_SCHEMA: Final = 1


class Documents(msgspec.Struct, frozen=True, kw_only=True):
    """Documents by kind: JSON does not tell the types apart."""

    peer_authentications: tuple[PeerAuthentication, ...] = ()
    authorization_policies: tuple[AuthorizationPolicy, ...] = ()
    identity_sets: tuple[IdentitySet, ...] = ()
    workload_entries: tuple[WorkloadEntry, ...] = ()
    service_entries: tuple[ServiceEntry, ...] = ()

    @classmethod
    def of(cls, documents: Iterable[Document]) -> Documents:
        known = tuple(documents)
        return cls(
            peer_authentications=tuple(x for x in known if isinstance(x, PeerAuthentication)),
            authorization_policies=tuple(x for x in known if isinstance(x, AuthorizationPolicy)),
            identity_sets=tuple(x for x in known if isinstance(x, IdentitySet)),
            workload_entries=tuple(x for x in known if isinstance(x, WorkloadEntry)),
            service_entries=tuple(x for x in known if isinstance(x, ServiceEntry)),
        )

    def all(self) -> tuple[Document, ...]:
        return (
            *self.peer_authentications,
            *self.authorization_policies,
            *self.identity_sets,
            *self.workload_entries,
            *self.service_entries,
        )


class Configuration(msgspec.Struct, frozen=True, kw_only=True):
    """What is judged by. `trusted` are the trust domains whose roots the node holds.

    `source` names where the documents come from. `pending` says why ztunnel does not judge by them
    yet, or not by all of them; empty when it does. `problems` are documents that were refused:
    their last good version is here.
    """

    schema: int
    source: str
    pending: str
    problems: tuple[str, ...]
    node: str
    cluster: str
    trust_domain: str
    root_namespace: str
    locality: str
    node_addresses: tuple[str, ...]
    node_plaintext: bool
    trusted: tuple[str, ...]
    documents: Documents

    def settings(self) -> Settings:
        """Return the daemon's settings, as far as a verdict depends on them."""
        return Settings(
            node=self.node,
            cluster=self.cluster,
            trust_domain=self.trust_domain,
            root_namespace=self.root_namespace,
            locality=self.locality,
            node_addresses=self.node_addresses,
            node_plaintext=self.node_plaintext,
        )
