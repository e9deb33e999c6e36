"""Policy: which mutual TLS mode is in force for each workload and port, and who decided it.

This package owns the meaning of PeerAuthentication. It promises one answer for one set of
documents, whatever their order, with the place of the document that decided each part; and never
UNSET: inheritance is resolved here. It is pure, and knows nothing of nodes, sources or the tunnel.
"""

from nodeagent.policy._peer_authentication import Resolution, Subject, resolve

__all__ = ["Resolution", "Subject", "resolve"]
