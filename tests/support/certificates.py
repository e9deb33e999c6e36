"""Builders of certificates for tests, right ones and wrong ones.

This module owns the description of a certificate as a table of what it should hold, with defaults
that make a correct X509-SVID, so that a test names only what it makes wrong. It promises no
compliance: it signs whatever it is asked to sign.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Sequence
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey
Digest = hashes.SHA256 | hashes.SHA384 | hashes.SHA512 | hashes.SHA224

NOW: Final = 1_800_000_000
"""The time of tests that pass the time in: seconds since the epoch."""

BOTH_ROLES: Final = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """A keyUsage extension."""

    digital_signature: bool = False
    key_cert_sign: bool = False
    crl_sign: bool = False
    critical: bool = True


LEAF_USAGE: Final = Usage(digital_signature=True)
ISSUER_USAGE: Final = Usage(key_cert_sign=True, crl_sign=True)


@dataclasses.dataclass(frozen=True)
class Identity:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: Key

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.DER)

    @property
    def key_der(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.DER,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )


def name(common_name: str) -> x509.Name:
    """Return a subject; empty without `common_name`."""
    if not common_name:
        return x509.Name([])
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _at(seconds: float) -> dt.datetime:
    return dt.datetime.fromtimestamp(seconds, tz=dt.UTC)


def issue(
    issuer: Identity | None,
    *,
    subject: str,
    uris: Sequence[str] = (),
    dns: Sequence[str] = (),
    names_critical: bool = False,
    is_ca: bool | None = None,
    path_length: int | None = None,
    usage: Usage | None = None,
    purposes: Sequence[ObjectIdentifier] | None = None,
    not_before: float = NOW - 3600,
    not_after: float = NOW + 3600,
    key: Key | None = None,
    digest: Digest | None = None,
    extra: Sequence[tuple[x509.ExtensionType, bool]] = (),
) -> Identity:
    """Return a certificate with exactly these parts; self-signed without `issuer`."""
    own_key = key if key is not None else ec.generate_private_key(ec.SECP256R1())
    signer = own_key if issuer is None else issuer.key
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(subject) if issuer is None else issuer.certificate.subject)
        .public_key(own_key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_at(not_before))
        .not_valid_after(_at(not_after))
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(own_key.public_key()), critical=False
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
    )
    names = [x509.UniformResourceIdentifier(uri) for uri in uris]
    others = [x509.DNSName(host) for host in dns]
    if names or others:
        builder = builder.add_extension(
            x509.SubjectAlternativeName([*names, *others]), critical=names_critical
        )
    if is_ca is not None:
        builder = builder.add_extension(
            x509.BasicConstraints(ca=is_ca, path_length=path_length), critical=True
        )
    if usage is not None:
        builder = builder.add_extension(
            x509.KeyUsage(
                digital_signature=usage.digital_signature,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=usage.key_cert_sign,
                crl_sign=usage.crl_sign,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=usage.critical,
        )
    if purposes is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    for extension, critical in extra:
        builder = builder.add_extension(extension, critical=critical)
    chosen = None if isinstance(signer, ed25519.Ed25519PrivateKey) else digest or hashes.SHA256()
    return Identity(builder.sign(signer, chosen), own_key)


def authority(
    trust_domain: str = "cluster.local",
    issuer: Identity | None = None,
    *,
    subject: str = "",
    uris: Sequence[str] | None = None,
    is_ca: bool | None = True,
    path_length: int | None = None,
    usage: Usage | None = ISSUER_USAGE,
    purposes: Sequence[ObjectIdentifier] | None = None,
    not_before: float = NOW - 86400,
    not_after: float = NOW + 86400,
    key: Key | None = None,
    digest: Digest | None = None,
    extra: Sequence[tuple[x509.ExtensionType, bool]] = (),
) -> Identity:
    """Return a signing certificate: a root without `issuer`."""
    kind = "root" if issuer is None else "intermediate"
    return issue(
        issuer,
        subject=subject or f"{trust_domain} {kind}",
        uris=(f"spiffe://{trust_domain}",) if uris is None else uris,
        is_ca=is_ca,
        path_length=path_length,
        usage=usage,
        purposes=purposes,
        not_before=not_before,
        not_after=not_after,
        key=key,
        digest=digest,
        extra=extra,
    )


def workload(
    issuer: Identity | None,
    uri: str = "spiffe://cluster.local/ns/default/sa/sleep",
    *,
    subject: str = "",
    uris: Sequence[str] | None = None,
    dns: Sequence[str] = (),
    names_critical: bool = True,
    is_ca: bool | None = False,
    usage: Usage | None = LEAF_USAGE,
    purposes: Sequence[ObjectIdentifier] | None = BOTH_ROLES,
    not_before: float = NOW - 60,
    not_after: float = NOW + 3600,
    key: Key | None = None,
    digest: Digest | None = None,
    extra: Sequence[tuple[x509.ExtensionType, bool]] = (),
) -> Identity:
    """Return a leaf: a correct X509-SVID unless told otherwise."""
    return issue(
        issuer,
        subject=subject,
        uris=(uri,) if uris is None else uris,
        dns=dns,
        names_critical=names_critical,
        is_ca=is_ca,
        usage=usage,
        purposes=purposes,
        not_before=not_before,
        not_after=not_after,
        key=key,
        digest=digest,
        extra=extra,
    )
