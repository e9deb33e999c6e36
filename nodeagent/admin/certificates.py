"""The published shape of `/certificates`: identities, their chains, and the roots that are trusted.

This module owns the types that `/certificates` encodes and a command decodes. It promises that
within one `CERTIFICATES_SCHEMA` fields are only added, that times are RFC 3339 in UTC, and that no
key is in here. Pure: no sockets, no clocks.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

import msgspec

__all__ = [
    "CERTIFICATES_SCHEMA",
    "CertificateDetail",
    "CertificatesReport",
    "IdentityReport",
    "RootReport",
]

CERTIFICATES_SCHEMA: Final = 1


class CertificateDetail(msgspec.Struct, frozen=True, kw_only=True):
    """One certificate. Names are RFC 4514, `serial` is hexadecimal, `sha256` that of its DER.

    `key` is the kind of its key ("EC secp256r1"), `error` why the rest cannot be read.
    """

    sha256: str
    subject: str = ""
    issuer: str = ""
    serial: str = ""
    not_before: datetime | None = None
    not_after: datetime | None = None
    key: str = ""
    error: str = ""


class IdentityReport(msgspec.Struct, frozen=True, kw_only=True):
    """One identity of this node.

    `phase` is pending, valid, renewal_failing or unavailable. `not_after` is when its certificate
    is of no more use: the earliest end in `chain`, which is leaf first and without the root.
    `renew_at` is when the next request is planned. `failures` counts since the last success,
    `reason` and `error` are the last one's. `workloads` are those of this node that have it.
    """

    identity: str
    phase: str
    not_before: datetime | None = None
    not_after: datetime | None = None
    renew_at: datetime | None = None
    renewals: int = 0
    failures: int = 0
    reason: str = ""
    error: str = ""
    workloads: tuple[str, ...] = ()
    chain: tuple[CertificateDetail, ...] = ()


class RootReport(msgspec.Struct, frozen=True, kw_only=True):
    """A root that is trusted for the identities of `trust_domain`."""

    trust_domain: str
    certificate: CertificateDetail


class CertificatesReport(msgspec.Struct, frozen=True, kw_only=True):
    """`bundle_error` is why no newer roots come, empty while they do."""

    schema: int = CERTIFICATES_SCHEMA
    time: datetime
    node: str
    trust_domain: str
    identities: tuple[IdentityReport, ...] = ()
    roots: tuple[RootReport, ...] = ()
    bundle_error: str = ""
