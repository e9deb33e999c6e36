"""The certificates of the embedded CA: what a root, an intermediate and a leaf hold.

This module owns the profile of every certificate that the embedded CA signs. It promises that they
are X509-SVIDs (leaf and signing), that none outlives its issuer, and that none is valid only in
the future of a peer whose clock is a little behind. It is pure but for random keys and serial
numbers: it may not read a clock or a file, or know who may have which identity.

Sources: X509-SVID specification 2 to 4; RFC 5280 4.1 and 4.2; RFC 8813 3 (an EC key's keyUsage
may not hold keyEncipherment, so the leaf's is digitalSignature alone).
"""

from __future__ import annotations

import dataclasses
import datetime as dt
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ztunnel.spiffe import SpiffeId

__all__ = [
    "BACKDATE_SECONDS",
    "INTERMEDIATE_SECONDS",
    "ROOT_SECONDS",
    "Signer",
    "der",
    "make_intermediate",
    "make_leaf",
    "make_root",
    "new_key",
    "signed_by",
    "trust_domain_of",
]

BACKDATE_SECONDS: Final = 300
"""How far notBefore lies in the past: peers' clocks may be behind by so much."""

ROOT_SECONDS: Final = 10 * 365 * 86400
"""Life of a root. Replacing it touches every node, so it is long."""

INTERMEDIATE_SECONDS: Final = 90 * 86400
"""Life of an intermediate. Long enough for an operator who keeps the root's key elsewhere to bring
it back once a quarter; peers need no change when it is replaced."""

_ORGANIZATION: Final = "nodeagent"


@dataclasses.dataclass(frozen=True, slots=True)
class Signer:
    """A signing certificate and its key; the key is not part of the repr."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = dataclasses.field(repr=False)

    @property
    def not_after(self) -> int:
        """The end of the validity, seconds since the epoch."""
        return int(self.certificate.not_valid_after_utc.timestamp())


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def make_root(trust_domain: str, key: ec.EllipticCurvePrivateKey, now: int) -> x509.Certificate:
    """Return a self-signed root for `trust_domain`, valid from `now` (seconds since the epoch)."""
    # Two roots of one trust domain differ by key identifier; the serial number in the name makes
    # them distinct for people too.
    name = _name(f"{trust_domain} root", f"{x509.random_serial_number():x}"[:16])
    builder = _builder(name, name, key.public_key(), now, now + ROOT_SECONDS)
    builder = _signing_extensions(builder, trust_domain, key.public_key(), path_length=None)
    return builder.sign(key, hashes.SHA256())


def make_intermediate(
    root: Signer, trust_domain: str, key: ec.EllipticCurvePrivateKey, now: int
) -> x509.Certificate:
    """Return an intermediate that signs leaves only."""
    name = _name(f"{trust_domain} intermediate", f"{x509.random_serial_number():x}"[:16])
    end = min(now + INTERMEDIATE_SECONDS, root.not_after)
    builder = _builder(name, root.certificate.subject, key.public_key(), now, end)
    builder = _signing_extensions(builder, trust_domain, root.key.public_key(), path_length=0)
    return builder.sign(root.key, hashes.SHA256())


def make_leaf(
    issuer: Signer, spiffe_id: SpiffeId, key: ec.EllipticCurvePublicKey, now: int, seconds: int
) -> x509.Certificate:
    """Return the certificate of a workload, valid for `seconds`, never longer than its issuer."""
    end = min(now + seconds, issuer.not_after)
    builder = _builder(x509.Name([]), issuer.certificate.subject, key, now, end)
    return (
        builder.add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(spiffe_id))]),
            critical=True,
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage(
                [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            ),
            critical=False,
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()),
            critical=False,
        )
        .sign(issuer.key, hashes.SHA256())
    )


def trust_domain_of(certificate: x509.Certificate) -> str | None:
    """Return the trust domain of a signing certificate, or None if it is none of this CA's form."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        identity = SpiffeId.parse(uris[0])
    except (x509.ExtensionNotFound, ValueError, IndexError):
        return None
    return identity.trust_domain if len(uris) == 1 and not identity.path else None


def signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Return whether `issuer` has signed `certificate`."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _name(common_name: str, serial: str) -> x509.Name:
    # X.520: a common name has at most 64 characters, a trust domain up to 255.
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, _ORGANIZATION),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name[-64:]),
            x509.NameAttribute(NameOID.SERIAL_NUMBER, serial),
        ]
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: int,
    not_after: int,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_time(now - BACKDATE_SECONDS))
        .not_valid_after(_time(not_after))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _signing_extensions(
    builder: x509.CertificateBuilder,
    trust_domain: str,
    issuer_key: ec.EllipticCurvePublicKey,
    path_length: int | None,
) -> x509.CertificateBuilder:
    uri = x509.UniformResourceIdentifier(str(SpiffeId(trust_domain, "")))
    return (
        builder.add_extension(x509.SubjectAlternativeName([uri]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False
        )
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _time(seconds: int) -> dt.datetime:
    return dt.datetime.fromtimestamp(seconds, tz=dt.UTC)
