"""Whom a certificate that the core shows us proves its peer to be, and whether it is whom we meant.

This module owns the refusal of a peer's certificate: its reason and the detail for the log. It may
not decide what a proven identity may do; rules on certificates are `svid`'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ztunnel import svid
from ztunnel.identities import Bundles, Identities, Proven, reason_of
from ztunnel.reasons import Reason

if TYPE_CHECKING:
    from ztunnel._core import Upcall
    from ztunnel.decisions import Peer

__all__ = ["CertificateRefusedError", "check_server", "verify"]


class CertificateRefusedError(Exception):
    """`detail` is what the log says beyond the reason."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def verify(upcall: Upcall, identities: Identities, bundles: Bundles, now: float) -> Proven:
    """Return whom the chain proves at `now`, seconds since the epoch.

    Raises CertificateRefusedError.
    """
    if not upcall.chain:
        raise CertificateRefusedError(Reason.CERT_MISSING, "")
    try:
        return identities.verify(upcall.chain, bundles, now)
    except svid.SvidError as error:
        raise CertificateRefusedError(reason_of(error), error.detail) from None


def check_server(peer: Peer | None, proven: Proven) -> None:
    """Let a server be one that `peer` expects. Raises CertificateRefusedError."""
    if peer is None:
        raise CertificateRefusedError(Reason.POD_REMOVED, "the pool has been removed")
    if str(proven.id) not in peer.expected:
        expected = " or ".join(sorted(peer.expected))
        raise CertificateRefusedError(
            Reason.IDENTITY_MISMATCH, f"expected {expected}, the peer is {proven.id}"
        )
    peer.remember(proven)
