"""Identities of this node's workloads: where SVIDs come from, and how they are kept fresh.

This package owns the provider interface, the embedded CA behind it, and the manager that renews.
It promises that keys exist in memory and, for the CA's own, in one private directory, and nowhere
else. It may not know how SVIDs reach the tunnel.
"""

from nodeagent.identity.embedded import EmbeddedCa
from nodeagent.identity.manager import (
    Clock,
    IdentityManager,
    IdentityPhase,
    IdentityState,
    IdentityStatus,
)
from nodeagent.identity.provider import Bundles, Provider, ProviderError, ProviderReason, Svid

__all__ = [
    "Bundles",
    "Clock",
    "EmbeddedCa",
    "IdentityManager",
    "IdentityPhase",
    "IdentityState",
    "IdentityStatus",
    "Provider",
    "ProviderError",
    "ProviderReason",
    "Svid",
]
