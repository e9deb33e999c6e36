"""The seam between the node's identities and whoever issues them.

This module owns the interface that every issuer implements (the embedded CA, SPIRE, the Istio CA)
and the checked value that it hands over. It promises that an `Svid` fits together: the leaf names
the identity that was asked for, and the key is the leaf's. It may not decide when to ask, or keep
anything; and no text made here shows a key.

An implementation is one class with two methods, and may be asked for many identities at once.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

from ztunnel.spiffe import SpiffeId

__all__ = ["Bundles", "Provider", "ProviderError", "ProviderReason", "Svid"]

Bundles = Mapping[str, tuple[bytes, ...]]
"""Every trust domain that is trusted, with its roots (DER). What is absent has been withdrawn."""


class ProviderReason(enum.StrEnum):
    """Why an issuer did not deliver. Stable tokens, the same in logs, status and metrics."""

    DENIED = "denied"
    """The issuer says that this node may not have the identity: its SVID must not be used on."""
    UNAVAILABLE = "unavailable"
    """The issuer cannot be reached or did not answer in time."""
    STORAGE = "storage"
    """Files of the issuer cannot be read or written."""
    MISCONFIGURED = "misconfigured"
    """An operator has to change something first."""
    BAD_ANSWER = "bad_answer"
    """What was delivered is not what was asked for."""
    CLOCK = "clock"
    """What was delivered is not valid now."""


class ProviderError(Exception):
    """No SVID, or no bundles, this time.

    `retryable` is False when the same question will get the same answer until somebody changes
    something. `detail` says what, where and what to do, in one line, and holds no key.
    """

    def __init__(self, reason: ProviderReason, detail: str, *, retryable: bool) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail
        self.retryable = retryable


@dataclasses.dataclass(frozen=True, slots=True)
class Svid:
    """An X509-SVID with its key. Made by `from_der`, which checks it.

    `chain` is DER, leaf first, without the root. `key` is PKCS#8 DER and not part of the repr.
    Times are seconds since the epoch.
    """

    id: SpiffeId
    chain: tuple[bytes, ...]
    key: bytes = dataclasses.field(repr=False)
    not_before: int
    not_after: int

    @classmethod
    def from_der(cls, spiffe_id: SpiffeId, chain: Sequence[bytes], key: bytes) -> Svid:
        """Return the SVID, or raise ProviderError if leaf, key and `spiffe_id` do not agree."""
        try:
            certificates = [x509.load_der_x509_certificate(der) for der in chain]
            leaf = certificates[0]
            names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            uris = names.get_values_for_type(x509.UniformResourceIdentifier)
            leaf_key = _public(leaf.public_key())
        except (ValueError, IndexError, x509.ExtensionNotFound, UnsupportedAlgorithm) as error:
            raise _bad(f"the certificates cannot be read ({type(error).__name__})") from None
        if uris != [str(spiffe_id)]:
            raise _bad(f"the certificate is not one for {spiffe_id}")
        try:
            private = serialization.load_der_private_key(key, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise _bad(f"the key for {spiffe_id} is no unencrypted PKCS#8") from None
        if _public(private.public_key()) != leaf_key:
            raise _bad(f"the key for {spiffe_id} is not that of its certificate")
        # The chain is of use only while all of it is valid.
        return cls(
            id=spiffe_id,
            chain=tuple(chain),
            key=key,
            not_before=max(int(each.not_valid_before_utc.timestamp()) for each in certificates),
            not_after=min(int(each.not_valid_after_utc.timestamp()) for each in certificates),
        )


class Provider(Protocol):
    """Whoever issues SVIDs."""

    async def fetch(self, spiffe_id: SpiffeId) -> Svid:
        """Return a new SVID for `spiffe_id`. Raises ProviderError. May be cancelled at any time."""
        ...

    def bundles(self) -> AsyncIterator[Bundles]:
        """Yield the full set of bundles: at once, and after every change. Raises ProviderError.

        Whoever iterates starts again after an error or an end.
        """
        ...


def _public(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _bad(detail: str) -> ProviderError:
    return ProviderError(ProviderReason.BAD_ANSWER, detail, retryable=True)
