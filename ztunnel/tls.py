"""TLS of HBONE: the OpenSSL contexts of one identity, and the functions by which C drives them.

This module owns every TLS setting of the tunnel and the only door to OpenSSL's C functions. It
promises that both contexts of an identity speak TLS 1.3 with mutual authentication and nothing
else, that no Python runs during a handshake (a callback would need the interpreter on the core's
threads), and that a function's address leaves here only if its declaration is the expected one. It
may not read or write a file, decide which identity a peer may have, or show a key.

OpenSSL's verification is a first gate: its store holds the roots of all trust domains, which alone
would let one domain sign another's identities. `ztunnel.svid` is the second gate, and decides,
before a byte of application data passes.

What each setting is for stands beside it. Sources: RFC 8446; SSL_CTX_set_options(3),
SSL_CTX_set_mode(3), SSL_CTX_set1_groups_list(3) of OpenSSL 4.0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.bindings._rust import _openssl
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from OpenSSL import SSL, crypto

from ztunnel import svid

__all__ = [
    "ALPN",
    "Contexts",
    "TlsError",
    "build",
    "context_pointer",
    "function_table",
    "version",
]

ALPN: Final = b"h2"
"""The one protocol of HBONE. The client's context offers it; at the server the core's callback,
set through the function table, refuses everything else."""

_CIPHERSUITES: Final = b"TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384"
"""HBONE's two suites. AES-128 first: bulk traffic is bound by the cipher, and the session keys'
128 bits are what P-256 certificates give anyway. No ChaCha: every node has AES instructions."""

_GROUPS: Final = b"*X25519MLKEM768/*X25519:P-256"
"""Post-quantum hybrid first. A star sends a key share at once: a peer without ML-KEM answers in
one round trip instead of asking again. The slash makes our server prefer the hybrid even at the
price of that second round trip."""

_VERIFY_DEPTH: Final = svid.MAX_CHAIN_LENGTH - 1
"""Intermediates that OpenSSL follows: those of the longest chain that `ztunnel.svid` reads."""

_SESSION_ID_CONTEXT: Final = b"hbone"
"""Without one, OpenSSL fails the handshake of a client that offers a ticket instead of ignoring
the ticket."""

# Bits 32 and 33 of ssl.h, without a name in pyOpenSSL. Decompression on behalf of a stranger costs
# up to 22 MiB a connection (CVE-2025-66199).
_OP_NO_TX_CERTIFICATE_COMPRESSION: Final = 1 << 32
_OP_NO_RX_CERTIFICATE_COMPRESSION: Final = 1 << 33

_OPTIONS: Final = (
    SSL.OP_NO_TICKET
    | SSL.OP_NO_RENEGOTIATION
    | SSL.OP_NO_COMPRESSION
    | SSL.OP_CIPHER_SERVER_PREFERENCE
    | _OP_NO_TX_CERTIFICATE_COMPRESSION
    | _OP_NO_RX_CERTIFICATE_COMPRESSION
)

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey

_lib: Final = _openssl.lib
_ffi: Final = _openssl.ffi


class TlsError(Exception):
    """A context or the function table cannot be made. The message says why, without key bytes."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)
class Contexts:
    """The two contexts of one identity. Whoever gives their pointers to C keeps this alive."""

    client: SSL.Context
    server: SSL.Context


def build(chain: Sequence[bytes], key: bytes, roots: Iterable[bytes]) -> Contexts:
    """Return the contexts that prove `chain` (DER, leaf first) with `key` (PKCS#8 DER).

    `roots` (DER) are those of every trust domain. What may not be an anchor is left out, so its
    peers are refused; `ztunnel.svid.unusable_roots` says which. Raises TlsError for anything wrong
    with the chain or the key.
    """
    certificates = _load_chain(chain)
    private = _load_key(key)
    anchors = svid.anchors(tuple(roots))
    return Contexts(
        client=_context(SSL.TLS_CLIENT_METHOD, certificates, private, anchors),
        server=_context(SSL.TLS_SERVER_METHOD, certificates, private, anchors),
    )


def context_pointer(context: SSL.Context) -> int:
    """Return the address of the `SSL_CTX`, valid for as long as `context` lives."""
    return int(_ffi.cast("uintptr_t", context._context))  # noqa: SLF001 - pyOpenSSL has no accessor


def version() -> str:
    """Return the version of the OpenSSL that does all TLS here, such as "OpenSSL 4.0.0 …"."""
    return str(_ffi.string(_lib.OpenSSL_version(0)).decode("ascii", "replace"))


def function_table(declarations: Mapping[str, str]) -> dict[str, int]:
    """Return the address of each function named, in the OpenSSL that pyOpenSSL's contexts use.

    `declarations` maps a function's name to its C type as cffi prints it, which the caller was
    compiled against. Raises TlsError that names every function which is missing or differs.
    """
    problems: list[str] = []
    table: dict[str, int] = {}
    for name, expected in declarations.items():
        try:
            address = _ffi.addressof(_lib, name)
        except AttributeError:
            problems.append(f"{name}: expected {expected!r}, found nothing")
            continue
        found = _ffi.typeof(address).cname
        if found != expected:
            problems.append(f"{name}: expected {expected!r}, found {found!r}")
            continue
        table[name] = int(_ffi.cast("uintptr_t", address))
    if problems:
        raise TlsError(
            f"the installed cryptography package ({version()}) has not the OpenSSL functions that "
            f"this build was made for; install the version of the lock file: {'; '.join(problems)}"
        )
    return table


def _context(
    method: int,
    chain: Sequence[x509.Certificate],
    key: PrivateKey,
    anchors: Sequence[crypto.X509],
) -> SSL.Context:
    context = SSL.Context(method)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_max_proto_version(SSL.TLS1_3_VERSION)
    context.set_tls13_ciphersuites(_CIPHERSUITES)
    _set_groups(context)
    # Resumption would skip the certificates, and with them expiry and revocation. Tickets and
    # cache each resume alone: both must be off.
    context.set_options(_OPTIONS)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_session_id(_SESSION_ID_CONTEXT)
    # 34 KiB less for each idle connection.
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)
    # A read returns after a session ticket or a key update instead of waiting for data.
    context.clear_mode(_lib.SSL_MODE_AUTO_RETRY)
    context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT)
    context.set_verify_depth(_VERIFY_DEPTH)
    if method == SSL.TLS_CLIENT_METHOD:
        context.set_alpn_protos([ALPN])
    try:
        context.use_certificate(chain[0])
        for intermediate in chain[1:]:
            context.add_extra_chain_cert(intermediate)
        context.use_privatekey(key)
        context.check_privatekey()
    except SSL.Error as error:
        raise TlsError(f"OpenSSL refuses the certificate or its key: {_reasons(error)}") from None
    _set_anchors(context, anchors)
    return context


def _set_groups(context: SSL.Context) -> None:
    done = _lib.SSL_CTX_set1_curves_list(context._context, _GROUPS)  # noqa: SLF001 - as in context_pointer
    if done != 1:
        _lib.ERR_clear_error()
        raise TlsError(
            f"the installed cryptography package's OpenSSL does not know the groups "
            f"{_GROUPS.decode()}; install the version of the lock file"
        )


def _set_anchors(context: SSL.Context, anchors: Sequence[crypto.X509]) -> None:
    store = context.get_cert_store()
    if store is None:
        raise TlsError("OpenSSL made a context without a store")
    for anchor in anchors:
        store.add_cert(anchor)
    # As in ztunnel.svid: an intermediate in a bundle is an anchor.
    store.set_flags(crypto.X509StoreFlags.PARTIAL_CHAIN)


def _load_chain(chain: Sequence[bytes]) -> tuple[x509.Certificate, ...]:
    if not chain:
        raise TlsError("the chain holds no certificate")
    if len(chain) > svid.MAX_CHAIN_LENGTH:
        raise TlsError(
            f"the chain has {len(chain)} certificates, the limit is {svid.MAX_CHAIN_LENGTH}"
        )
    try:
        return tuple(x509.load_der_x509_certificate(der) for der in chain)
    except ValueError:
        raise TlsError("a certificate of the chain is no DER") from None


def _load_key(der: bytes) -> PrivateKey:
    # The cause is dropped: an error of the parser may describe what it read.
    try:
        key = serialization.load_der_private_key(der, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise TlsError("the key is no unencrypted PKCS#8") from None
    if not isinstance(key, PrivateKey):
        raise TlsError("the key is neither EC, RSA nor Ed25519")
    return key


def _reasons(error: SSL.Error) -> str:
    """Return OpenSSL's reason strings: constants of the library."""
    entries = error.args[0] if error.args else []
    return ", ".join(entry[-1] for entry in entries) or "no reason given"
