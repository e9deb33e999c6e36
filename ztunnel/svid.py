"""Validation of a peer's X509-SVID: who, of all that we trust, has signed that this is whom?

This module owns every rule by which a certificate chain becomes an identity. It promises that what
`validate` returns satisfies the X509-SVID specification and RFC 5280 against the bundle of the
identity's own trust domain and no other, and that every refusal has one reason of a closed set. It
is pure: it may not open a socket, read a clock or a file, or remember a verdict.

Two verifiers look at a chain. OpenSSL's, inside the handshake, is only a first gate: it accepts CA
certificates as leaves, certificates without keyUsage, two URI names, names with NUL, and with
several bundles in one store it lets one domain's root sign another's identities. This module is
the second gate, and decides. It takes path building (signatures, validity, path length, name
constraints, critical extensions) from OpenSSL too, with a store of one trust domain, and checks
everything else itself on the path that was found.

Source: X509-SVID specification, sections 2 (SPIFFE ID), 3 (hierarchy), 4 (constraints and usage)
and 5.1 (path validation, leaf validation); RFC 5280 6.1.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.bindings._rust import _openssl
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from OpenSSL import crypto

from ztunnel.spiffe import SpiffeId, SpiffeIdError

__all__ = [
    "MAX_CERTIFICATE_BYTES",
    "MAX_CHAIN_BYTES",
    "MAX_CHAIN_LENGTH",
    "SvidError",
    "SvidReason",
    "VerifiedPeer",
    "anchors",
    "unusable_roots",
    "validate",
]

MAX_CHAIN_LENGTH: Final = 8
"""Certificates that a peer may send. Nested SPIRE servers below a corporate CA need about five;
OpenSSL's search over unordered intermediates grows with the square."""

MAX_CERTIFICATE_BYTES: Final = 16 * 1024
"""Bytes of one certificate. A leaf with the longest SPIFFE ID (2048 bytes) and RSA-4096 stays
below 4 KiB."""

MAX_CHAIN_BYTES: Final = 48 * 1024
"""Bytes of a whole chain: parsing costs time before anything is known about the peer."""

_MAX_SUBJECT_CHARACTERS: Final = 256
"""A subject is for people who read logs, and its length is the peer's choice."""

_MIN_RSA_BITS: Final = 2048
"""NIST SP 800-131A: less is disallowed. The handshake's security level 2 says the same."""

_ANCHOR_CACHE: Final = 64
"""Bundles whose parsed roots are kept: one for each trust domain, and some for rotations."""


class SvidReason(enum.StrEnum):
    """Why a chain was refused. Stable tokens, the same in logs and in metrics."""

    MALFORMED = "malformed"
    """Empty, no DER, or an extension that cannot be read."""
    TOO_LARGE = "too_large"
    BAD_IDENTITY = "bad_identity"
    """Not exactly one URI name, or that name is no workload's SPIFFE ID."""
    BAD_LEAF = "bad_leaf"
    """The leaf may not authenticate: a CA, or wrong usages."""
    BAD_ISSUER = "bad_issuer"
    """A certificate above the leaf may not sign SVIDs."""
    EXPIRED = "expired"
    NOT_YET_VALID = "not_yet_valid"
    UNTRUSTED_DOMAIN = "untrusted_domain"
    """We hold no bundle of the identity's trust domain."""
    UNKNOWN_ISSUER = "unknown_issuer"
    """No path from the leaf to a root of the identity's own trust domain."""
    BAD_SIGNATURE = "bad_signature"
    WEAK_ALGORITHM = "weak_algorithm"
    BAD_PATH = "bad_path"
    """RFC 5280: path length, name constraints, unknown critical extension, and the like."""


class SvidError(Exception):
    """A peer's chain is refused. `detail` is one printable line that quotes nothing of the peer's
    but a valid SPIFFE ID or trust domain, and dates.
    """

    def __init__(self, reason: SvidReason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclasses.dataclass(frozen=True, slots=True)
class VerifiedPeer:
    """A peer that has proved `id`, provided that the handshake proved its key.

    `not_after` (seconds since the epoch) is when the first certificate of the path ends.
    `fingerprint` is the leaf's SHA-256 in hexadecimal. `subject` is RFC 4514, printable, cut.
    """

    id: SpiffeId
    not_after: float
    serial: int
    fingerprint: str
    subject: str


def validate(
    chain: Sequence[bytes], bundles: Mapping[str, tuple[bytes, ...]], now: float
) -> VerifiedPeer:
    """Return the identity that `chain` (DER, leaf first) proves at `now`, or raise SvidError.

    `bundles` maps trust domain to its roots (DER). `now` is in seconds since the epoch. That the
    peer holds the leaf's key is the handshake's part.
    """
    certificates = _parse(chain)
    leaf = certificates[0]
    identity = _identity(leaf)
    _check_leaf(leaf)
    _check_times(leaf, identity, now)
    roots = bundles.get(identity.trust_domain)
    if roots is None:
        raise SvidError(
            SvidReason.UNTRUSTED_DOMAIN,
            f"no bundle of the trust domain {identity.trust_domain!r} is held here",
        )
    path = _path(chain, roots, identity.trust_domain, now)
    _check_algorithms(leaf, anchor=False)
    last = len(path) - 1
    for index, certificate in enumerate(path[1:], start=1):
        _check_issuer(certificate, anchor=index == last)
    return VerifiedPeer(
        id=identity,
        not_after=min(certificate.not_valid_after_utc.timestamp() for certificate in path),
        serial=leaf.serial_number,
        fingerprint=hashlib.sha256(chain[0]).hexdigest(),
        subject=_printable(leaf.subject.rfc4514_string()),
    )


def unusable_roots(roots: Sequence[bytes]) -> tuple[str, ...]:
    """Return one sentence for each of `roots` that `validate` would never take as an anchor."""
    problems: list[str] = []
    for index, root in enumerate(roots):
        try:
            _check_anchor(root)
        except SvidError as error:
            problems.append(f"root {index}: {error}")
    return tuple(problems)


def _parse(chain: Sequence[bytes]) -> tuple[x509.Certificate, ...]:
    if not chain:
        raise SvidError(SvidReason.MALFORMED, "no certificate")
    if len(chain) > MAX_CHAIN_LENGTH:
        raise SvidError(
            SvidReason.TOO_LARGE, f"{len(chain)} certificates exceed the limit {MAX_CHAIN_LENGTH}"
        )
    # All sizes before the first parse, so that a refusal costs nothing.
    for index, der in enumerate(chain):
        if len(der) > MAX_CERTIFICATE_BYTES:
            raise SvidError(
                SvidReason.TOO_LARGE,
                f"certificate {index} has {len(der)} bytes, the limit is {MAX_CERTIFICATE_BYTES}",
            )
    total = sum(map(len, chain))
    if total > MAX_CHAIN_BYTES:
        raise SvidError(
            SvidReason.TOO_LARGE, f"a chain of {total} bytes exceeds the limit {MAX_CHAIN_BYTES}"
        )
    return tuple(_load(der, f"certificate {index}") for index, der in enumerate(chain))


def _load(der: bytes, name: str) -> x509.Certificate:
    try:
        certificate = x509.load_der_x509_certificate(der)
        # Extensions are decoded on first use: do it here, where a failure has its reason.
        _ = certificate.extensions, certificate.subject
        _ = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        version = certificate.version
    except (
        ValueError,
        TypeError,
        x509.DuplicateExtension,
        x509.InvalidVersion,
        x509.UnsupportedGeneralNameType,
    ) as error:
        raise SvidError(
            SvidReason.MALFORMED, f"{name} cannot be read ({type(error).__name__})"
        ) from None
    if version is not x509.Version.v3:
        raise SvidError(SvidReason.MALFORMED, f"{name} is not of version 3")
    return certificate


def _identity(leaf: x509.Certificate) -> SpiffeId:
    found = _uris(leaf)
    if len(found) != 1:
        raise SvidError(
            SvidReason.BAD_IDENTITY, f"the leaf has {len(found)} URI names, and must have one"
        )
    try:
        identity = SpiffeId.parse(found[0])
    except SpiffeIdError as error:
        raise SvidError(SvidReason.BAD_IDENTITY, str(error)) from None
    if not identity.path:
        raise SvidError(
            SvidReason.BAD_IDENTITY, "the SPIFFE ID names a trust domain, not a workload"
        )
    return identity


def _uris(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def _check_leaf(leaf: x509.Certificate) -> None:
    extensions = leaf.extensions
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName)
    if not leaf.subject.rdns and not names.critical:
        raise SvidError(
            SvidReason.BAD_LEAF, "an empty subject needs a critical subject alternative name"
        )
    if _is_ca(leaf):
        raise SvidError(SvidReason.BAD_LEAF, "the leaf is a CA certificate")
    usage = _key_usage(leaf)
    if usage is None:
        raise SvidError(SvidReason.BAD_LEAF, "the leaf has no keyUsage")
    if not usage.critical:
        raise SvidError(SvidReason.BAD_LEAF, "the leaf's keyUsage is not critical")
    if not usage.value.digital_signature:
        raise SvidError(SvidReason.BAD_LEAF, "the leaf's keyUsage lacks digitalSignature")
    if usage.value.key_cert_sign or usage.value.crl_sign:
        raise SvidError(SvidReason.BAD_LEAF, "the leaf's keyUsage allows signing certificates")
    purposes = _purposes(leaf)
    if purposes is not None and not purposes >= _BOTH_ROLES:
        raise SvidError(
            SvidReason.BAD_LEAF, "the leaf's extendedKeyUsage lacks serverAuth or clientAuth"
        )


_BOTH_ROLES: Final = frozenset({ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH})


def _check_times(leaf: x509.Certificate, identity: SpiffeId, now: float) -> None:
    ended = now - leaf.not_valid_after_utc.timestamp()
    # RFC 5280 4.1.2.5: the validity includes the second of notAfter.
    if ended >= 1:
        date = leaf.not_valid_after_utc.isoformat()
        raise SvidError(SvidReason.EXPIRED, f"{identity} expired {ended:.0f} s ago, at {date}")
    missing = leaf.not_valid_before_utc.timestamp() - now
    if missing > 0:
        raise SvidError(
            SvidReason.NOT_YET_VALID,
            f"{identity} is valid only in {missing:.0f} s, from "
            f"{leaf.not_valid_before_utc.isoformat()}: compare the clocks of the two nodes",
        )


def _check_issuer(certificate: x509.Certificate, *, anchor: bool) -> None:
    """Check a signing certificate (X509-SVID 3.2, 4.1 to 4.4)."""
    if not _is_ca(certificate):
        raise SvidError(SvidReason.BAD_ISSUER, "an issuer is no CA certificate")
    usage = _key_usage(certificate)
    if usage is None or not usage.value.key_cert_sign:
        raise SvidError(SvidReason.BAD_ISSUER, "an issuer's keyUsage lacks keyCertSign")
    spiffe_names = [uri for uri in _uris(certificate) if uri.lower().startswith("spiffe:")]
    if spiffe_names:
        _check_issuer_identity(spiffe_names)
        if not usage.critical:
            raise SvidError(SvidReason.BAD_ISSUER, "an issuer's keyUsage is not critical")
    _check_algorithms(certificate, anchor=anchor)
    purposes = _purposes(certificate)
    if (
        purposes is not None
        and not anchor
        and ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE not in purposes
        and not purposes >= _BOTH_ROLES
    ):
        raise SvidError(
            SvidReason.BAD_ISSUER, "an issuer's extendedKeyUsage lacks serverAuth or clientAuth"
        )


def _check_issuer_identity(names: Sequence[str]) -> None:
    if len(names) != 1:
        raise SvidError(SvidReason.BAD_ISSUER, f"an issuer has {len(names)} SPIFFE IDs")
    try:
        identity = SpiffeId.parse(names[0])
    except SpiffeIdError as error:
        raise SvidError(SvidReason.BAD_ISSUER, f"an issuer's name: {error}") from None
    if identity.path:
        raise SvidError(SvidReason.BAD_ISSUER, "an issuer's SPIFFE ID has a path")


def _check_algorithms(certificate: x509.Certificate, *, anchor: bool) -> None:
    """Check key and signature. An anchor's own signature proves nothing and is not looked at."""
    try:
        key = certificate.public_key()
        digest = None if anchor else certificate.signature_hash_algorithm
    except (ValueError, UnsupportedAlgorithm):
        raise SvidError(
            SvidReason.WEAK_ALGORITHM, "a key or signature algorithm is not supported"
        ) from None
    strong = (
        (isinstance(key, rsa.RSAPublicKey) and key.key_size >= _MIN_RSA_BITS)
        or (
            isinstance(key, ec.EllipticCurvePublicKey)
            and isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1 | ec.SECP521R1)
        )
        or isinstance(key, ed25519.Ed25519PublicKey)
    )
    if not strong:
        raise SvidError(
            SvidReason.WEAK_ALGORITHM, "a key is not P-256, P-384, P-521, Ed25519 or RSA >= 2048"
        )
    # None: the algorithm hashes by itself (Ed25519).
    if digest is not None and not isinstance(digest, hashes.SHA256 | hashes.SHA384 | hashes.SHA512):
        raise SvidError(SvidReason.WEAK_ALGORITHM, f"a signature uses {digest.name}")


def _check_anchor(root: bytes) -> x509.Certificate:
    if len(root) > MAX_CERTIFICATE_BYTES:
        raise SvidError(SvidReason.TOO_LARGE, f"exceeds {MAX_CERTIFICATE_BYTES} bytes")
    certificate = _load(root, "the certificate")
    _check_issuer(certificate, anchor=True)
    return certificate


@functools.lru_cache(maxsize=_ANCHOR_CACHE)
def anchors(roots: tuple[bytes, ...]) -> tuple[crypto.X509, ...]:
    """Return those of `roots` that may be anchors. What cannot be used is left out: fail closed."""
    usable: list[crypto.X509] = []
    for root in roots:
        try:
            _check_anchor(root)
            usable.append(_load_openssl(root))
        except SvidError:
            continue
    return tuple(usable)


def _load_openssl(der: bytes) -> crypto.X509:
    try:
        return crypto.load_certificate(crypto.FILETYPE_ASN1, der)
    except crypto.Error:
        raise SvidError(SvidReason.MALFORMED, "a certificate is refused by OpenSSL") from None


def _path(
    chain: Sequence[bytes], roots: tuple[bytes, ...], domain: str, now: float
) -> list[x509.Certificate]:
    """Return the certification path, leaf first, anchor last (RFC 5280 6.1)."""
    store = crypto.X509Store()
    for anchor in anchors(tuple(roots)):
        store.add_cert(anchor)
    # An operator who puts an intermediate into the bundle means to trust exactly that; SPIRE and
    # Go's verifier read bundles so. Anchors are CA certificates and the leaf is none, so a leaf
    # can never be its own anchor.
    store.set_flags(crypto.X509StoreFlags.PARTIAL_CHAIN)
    store.set_time(dt.datetime.fromtimestamp(now, tz=dt.UTC))
    loaded = [_load_openssl(der) for der in chain]
    context = crypto.X509StoreContext(store, loaded[0], loaded[1:])
    try:
        path = [certificate.to_cryptography() for certificate in context.get_verified_chain()]
    except crypto.X509StoreContextError as error:
        raise _path_error(error, domain) from None
    return path


def _path_error(error: crypto.X509StoreContextError, domain: str) -> SvidError:
    code, depth, text = error.errors
    reason = _REASONS.get(code, SvidReason.BAD_PATH)
    detail = f"{text} (certificate {depth} of the path)"
    if reason is SvidReason.UNKNOWN_ISSUER:
        detail = f"no path to a root of the trust domain {domain!r}: {text}"
    return SvidError(reason, detail)


# pyOpenSSL has no names for these. Numbers would not do: INVALID_CA was 24, and is 79.
_V: Final = _openssl.lib
_REASONS: Final[Mapping[int, SvidReason]] = {
    _V.X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT: SvidReason.UNKNOWN_ISSUER,
    _V.X509_V_ERR_UNABLE_TO_DECRYPT_CERT_SIGNATURE: SvidReason.BAD_SIGNATURE,
    _V.X509_V_ERR_UNABLE_TO_DECODE_ISSUER_PUBLIC_KEY: SvidReason.BAD_SIGNATURE,
    _V.X509_V_ERR_CERT_SIGNATURE_FAILURE: SvidReason.BAD_SIGNATURE,
    _V.X509_V_ERR_CERT_NOT_YET_VALID: SvidReason.NOT_YET_VALID,
    _V.X509_V_ERR_CERT_HAS_EXPIRED: SvidReason.EXPIRED,
    _V.X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT: SvidReason.UNKNOWN_ISSUER,
    _V.X509_V_ERR_SELF_SIGNED_CERT_IN_CHAIN: SvidReason.UNKNOWN_ISSUER,
    _V.X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY: SvidReason.UNKNOWN_ISSUER,
    _V.X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE: SvidReason.UNKNOWN_ISSUER,
    _V.X509_V_ERR_INVALID_CA: SvidReason.BAD_ISSUER,
    _V.X509_V_ERR_CERT_UNTRUSTED: SvidReason.UNKNOWN_ISSUER,
    _V.X509_V_ERR_KEYUSAGE_NO_CERTSIGN: SvidReason.BAD_ISSUER,
}


def _is_ca(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _key_usage(certificate: x509.Certificate) -> x509.Extension[x509.KeyUsage] | None:
    try:
        return certificate.extensions.get_extension_for_class(x509.KeyUsage)
    except x509.ExtensionNotFound:
        return None


def _purposes(certificate: x509.Certificate) -> frozenset[x509.ObjectIdentifier] | None:
    try:
        extension = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    except x509.ExtensionNotFound:
        return None
    return frozenset(extension.value)


def _printable(text: str) -> str:
    cut = text[:_MAX_SUBJECT_CHARACTERS]
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in cut
    )
