"""From the state of the identities to the published `/certificates`: pure but for a cache.

This module owns what is read out of a certificate for an operator. It promises that a certificate
which cannot be read is said to be so, and that nothing in here has seen a key. It may not ask
anybody: everything comes in as values.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from nodeagent.admin.certificates import (
    CertificateDetail,
    CertificatesReport,
    IdentityReport,
    RootReport,
)
from nodeagent.identity import IdentityState, IdentityStatus
from ztunnel import protocol

__all__ = ["certificates_report", "detail"]

_NAMES: Final = {NameOID.SERIAL_NUMBER: "serialNumber"}
"""Names of attributes that RFC 4514 has no letters for, and X.520 does."""

MAX_KEPT: Final = 4096
"""Certificates that are not read anew for each question: those of a large node, a few KB each."""


def certificates_report(
    now: datetime,
    node: str,
    trust_domain: str,
    status: IdentityStatus,
    resources: Iterable[protocol.Resource],
    workloads: Mapping[str, str],
) -> CertificatesReport:
    """Return the report. `resources` are ztunnel's, `workloads` is each one's identity."""
    chains: dict[str, tuple[bytes, ...]] = {}
    roots: list[RootReport] = []
    for resource in resources:
        if isinstance(resource, protocol.Credential):
            chains[resource.uid] = resource.chain
        elif isinstance(resource, protocol.TrustBundle):
            roots += [
                RootReport(trust_domain=resource.uid, certificate=detail(der))
                for der in resource.roots
            ]
    holders: dict[str, list[str]] = {}
    for workload, identity in sorted(workloads.items()):
        holders.setdefault(identity, []).append(workload)
    return CertificatesReport(
        time=now,
        node=node,
        trust_domain=trust_domain,
        identities=tuple(
            _identity(each, chains.get(each.identity, ()), holders.get(each.identity, ()))
            for each in status.identities
        ),
        roots=tuple(sorted(roots, key=lambda each: (each.trust_domain, each.certificate.sha256))),
        bundle_error=status.bundle_error,
    )


def _identity(
    state: IdentityState, chain: Iterable[bytes], workloads: Iterable[str]
) -> IdentityReport:
    return IdentityReport(
        identity=state.identity,
        phase=state.phase.value,
        not_before=_moment(state.not_before),
        not_after=_moment(state.not_after),
        renew_at=_moment(state.renew_at),
        renewals=state.issued,
        failures=state.failures,
        reason=state.last_reason,
        error=state.last_error,
        workloads=tuple(workloads),
        # Withdrawn for ztunnel too, but perhaps not at this moment.
        chain=tuple(map(detail, chain)) if state.not_after else (),
    )


def _moment(seconds: float) -> datetime | None:
    return datetime.fromtimestamp(int(seconds), UTC) if seconds else None


@functools.lru_cache(maxsize=MAX_KEPT)
def detail(der: bytes) -> CertificateDetail:
    """Return what an operator asks of a certificate."""
    digest = hashlib.sha256(der).hexdigest()
    try:
        found = x509.load_der_x509_certificate(der)
        return CertificateDetail(
            sha256=digest,
            subject=found.subject.rfc4514_string(_NAMES),
            issuer=found.issuer.rfc4514_string(_NAMES),
            serial=f"{found.serial_number:x}",
            not_before=found.not_valid_before_utc,
            not_after=found.not_valid_after_utc,
            key=_key(found),
        )
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.UnsupportedGeneralNameType) as error:
        return CertificateDetail(sha256=digest, error=f"cannot be read: {error}")


def _key(certificate: x509.Certificate) -> str:
    key = certificate.public_key()
    if isinstance(key, ec.EllipticCurvePublicKey):
        return f"EC {key.curve.name}"
    if isinstance(key, rsa.RSAPublicKey):
        return f"RSA {key.key_size}"
    return type(key).__name__.removesuffix("PublicKey").lstrip("_")
