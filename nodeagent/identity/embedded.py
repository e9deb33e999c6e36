"""The embedded CA: a certificate authority in a directory of this node.

This module owns when the CA's certificates are made, replaced and trusted. It promises that a
start with an empty directory makes one CA however many processes start at once, that nothing
existing is ever overwritten but an intermediate by its successor, that damaged or foreign files
are an error and not a new CA, and that it signs only what `permitted` allows. It may not decide
when SVIDs are renewed.

Files, all 0600 in a directory of 0700:

- `root.pem`: the bundle, one or more roots; all are trusted.
- `root-key.pem`: the key of the root that signs intermediates. It may be kept elsewhere, and is
  missed only when an intermediate is due.
- `intermediate.pem`: key and certificate of the intermediate that signs SVIDs, in one file, so
  that they are replaced together.

The order of making them is key, root, intermediate; every prefix of it is a state from which the
next start goes on. How a root is replaced by hand is in docs/identity.md.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

import structlog
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from nodeagent.identity import _certificates as certificates
from nodeagent.identity._vault import Stamp, Vault
from nodeagent.identity.provider import Bundles, ProviderError, ProviderReason, Svid
from ztunnel.spiffe import SpiffeId

__all__ = ["EmbeddedCa"]

_ROOT: Final = "root.pem"
_ROOT_KEY: Final = "root-key.pem"
_INTERMEDIATE: Final = "intermediate.pem"

_ROTATE_BEFORE_SECONDS: Final = certificates.INTERMEDIATE_SECONDS // 3
"""An intermediate is replaced this long before its end: time for an operator to bring the root's
key back, or to free a disk."""

_ROTATE_RETRY_SECONDS: Final = 600
"""After a rotation that failed: weeks are left, and each attempt writes a warning. A change of the
files is noticed at once."""

_POLL_SECONDS: Final = 5.0
"""How often the bundle's file is looked at: a root that an operator adds is trusted so soon."""

_log = structlog.get_logger()


@dataclasses.dataclass(frozen=True, slots=True)
class _State:
    """The CA as it was read, and by what a change is seen."""

    roots: tuple[bytes, ...]
    issuer: certificates.Signer
    stamps: tuple[Stamp | None, ...]
    rotate_at: int
    """When the intermediate is to be replaced, or that is to be tried again."""


class EmbeddedCa:
    """A `Provider` that signs by itself."""

    def __init__(
        self,
        directory: Path,
        trust_domain: str,
        *,
        ttl_seconds: int,
        permitted: Callable[[SpiffeId], bool],
        wall_clock: Callable[[], float] = time.time,
        poll_seconds: float = _POLL_SECONDS,
    ) -> None:
        """Prepare a CA in `directory`; nothing is read or written before the first question.

        `permitted` says whether a workload of this node is bound to an identity; nothing else is
        signed. Several processes may share `directory`. Raises SpiffeIdError for a bad
        `trust_domain`, ValueError for a lifetime that is not positive.
        """
        if ttl_seconds <= 0:
            raise ValueError(f"ttl_seconds must be positive, not {ttl_seconds}")
        self._trust_domain = SpiffeId(trust_domain, "").trust_domain
        self._directory = directory
        self._ttl_seconds = ttl_seconds
        self._permitted = permitted
        self._wall_clock = wall_clock
        self._poll_seconds = poll_seconds
        self._state: _State | None = None
        self._one_at_a_time = asyncio.Lock()

    async def fetch(self, spiffe_id: SpiffeId) -> Svid:
        """Return a new SVID. Raises ProviderError, DENIED for what no workload here is bound to."""
        if spiffe_id.trust_domain != self._trust_domain:
            raise ProviderError(
                ProviderReason.DENIED,
                f"the embedded CA signs for the trust domain {self._trust_domain}, "
                f"not for {spiffe_id}",
                retryable=False,
            )
        if not spiffe_id.path or not self._permitted(spiffe_id):
            raise ProviderError(
                ProviderReason.DENIED,
                f"no workload bound to this node has the identity {spiffe_id}",
                retryable=False,
            )
        state = await self._current()
        return await asyncio.to_thread(self._sign, state, spiffe_id)

    async def bundles(self) -> AsyncIterator[Bundles]:
        """Yield the roots of the CA, at once and whenever the bundle's file has changed."""
        last: tuple[bytes, ...] | None = None
        while True:
            state = await self._current()
            if state.roots != last:
                last = state.roots
                yield {self._trust_domain: last}
            await asyncio.sleep(self._poll_seconds)

    def check(self) -> None:
        """Raise ProviderError if the CA in the directory cannot be used, now or once it is time
        for the next intermediate. Changes nothing where there is a CA.
        """
        with Vault(self._directory) as vault:
            if vault.stamp(_ROOT) is None:
                return
            roots = self._load_roots(vault, 0)
            self._load_intermediate(vault, roots)
            self._load_root_key(vault, roots)

    def _sign(self, state: _State, spiffe_id: SpiffeId) -> Svid:
        key = certificates.new_key()
        leaf = certificates.make_leaf(
            state.issuer, spiffe_id, key.public_key(), int(self._wall_clock()), self._ttl_seconds
        )
        return Svid.from_der(
            spiffe_id,
            (certificates.der(leaf), certificates.der(state.issuer.certificate)),
            key.private_bytes(
                serialization.Encoding.DER,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
        )

    async def _current(self) -> _State:
        async with self._one_at_a_time:
            return await asyncio.to_thread(self._refresh)

    def _refresh(self) -> _State:
        """Return the state in force, reading and making what is necessary. Blocks."""
        now = int(self._wall_clock())
        with Vault(self._directory) as vault:
            state = self._state
            if (
                state is not None
                and state.stamps == _stamps(vault)
                and now < min(state.rotate_at, state.issuer.not_after)
                and now >= _begins(state.issuer)
            ):
                return state
            with vault.locked():
                self._state = self._load(vault, now)
            return self._state

    def _load(self, vault: Vault, now: int) -> _State:
        roots = self._load_roots(vault, now)
        issuer = self._load_intermediate(vault, roots)
        if issuer is None or now >= _rotation(issuer):
            issuer = self._rotate(vault, roots, issuer, now)
        if now < _begins(issuer):
            raise ProviderError(
                ProviderReason.CLOCK,
                f"{self._directory / _INTERMEDIATE} is valid only in {_begins(issuer) - now} s: "
                "the clock of this node is behind, or was ahead when the CA was made",
                retryable=True,
            )
        return _State(
            roots=tuple(map(certificates.der, roots)),
            issuer=issuer,
            stamps=_stamps(vault),
            rotate_at=max(_rotation(issuer), now + _ROTATE_RETRY_SECONDS),
        )

    def _load_roots(self, vault: Vault, now: int) -> list[x509.Certificate]:
        content = vault.read(_ROOT)
        if content is None:
            return [self._make_root(vault, now)]
        roots = self._parse(_ROOT, content)
        for root in roots:
            self._check_domain(_ROOT, root)
        return roots

    def _make_root(self, vault: Vault, now: int) -> x509.Certificate:
        if self._state is not None or vault.stamp(_INTERMEDIATE) is not None:
            raise self._wrong(
                _ROOT,
                "is gone, while its CA is in use: restore it from a backup, or, to start a new "
                "CA that nobody trusts yet, stop the agents that share it and empty the directory",
            )
        # A key without a root is what a start leaves that was cut short: go on from there.
        content = vault.read(_ROOT_KEY)
        if content is None:
            key = certificates.new_key()
            vault.replace(_ROOT_KEY, _pem_key(key))
        else:
            key = self._parse_key(_ROOT_KEY, content)
        root = certificates.make_root(self._trust_domain, key, now)
        vault.replace(_ROOT, _pem(root))
        _log.info("ca_root_made", directory=str(self._directory), trust_domain=self._trust_domain)
        return root

    def _load_intermediate(
        self, vault: Vault, roots: list[x509.Certificate]
    ) -> certificates.Signer | None:
        content = vault.read(_INTERMEDIATE)
        if content is None:
            return None
        certificate = self._parse(_INTERMEDIATE, content)[0]
        key = self._parse_key(_INTERMEDIATE, content)
        if key.public_key() != certificate.public_key():
            raise self._wrong(_INTERMEDIATE, "holds a key and a certificate of another key")
        self._check_domain(_INTERMEDIATE, certificate)
        if not any(certificates.signed_by(certificate, root) for root in roots):
            raise self._wrong(
                _INTERMEDIATE,
                f"is signed by no root of {_ROOT}: restore the root, or remove {_INTERMEDIATE}",
            )
        return certificates.Signer(certificate, key)

    def _rotate(
        self,
        vault: Vault,
        roots: list[x509.Certificate],
        old: certificates.Signer | None,
        now: int,
    ) -> certificates.Signer:
        """Return a new intermediate, or `old` while it is valid and there can be no new one."""
        try:
            return self._make_intermediate(vault, roots, now)
        except ProviderError as error:
            if old is None or now >= old.not_after:
                raise
            _log.warning(
                "ca_intermediate_not_replaced",
                directory=str(self._directory),
                error=error.detail,
                seconds_left=old.not_after - now,
            )
            return old

    def _make_intermediate(
        self, vault: Vault, roots: list[x509.Certificate], now: int
    ) -> certificates.Signer:
        signer = self._load_root_key(vault, roots)
        if signer is None:
            raise self._wrong(
                _ROOT_KEY, "is absent, and a new intermediate is due: bring the root's key back"
            )
        if now >= signer.not_after:
            raise self._wrong(_ROOT, "has expired: add a new root, see docs/identity.md")
        key = certificates.new_key()
        certificate = certificates.make_intermediate(signer, self._trust_domain, key, now)
        vault.replace(_INTERMEDIATE, _pem_key(key) + _pem(certificate))
        _log.info("ca_intermediate_made", directory=str(self._directory))
        return certificates.Signer(certificate, key)

    def _load_root_key(
        self, vault: Vault, roots: list[x509.Certificate]
    ) -> certificates.Signer | None:
        """Of several roots the one whose key lies here signs; None without a key."""
        content = vault.read(_ROOT_KEY)
        if content is None:
            return None
        key = self._parse_key(_ROOT_KEY, content)
        matching = [root for root in roots if root.public_key() == key.public_key()]
        if not matching:
            raise self._wrong(_ROOT_KEY, f"is the key of no root in {_ROOT}")
        root = max(matching, key=lambda each: each.not_valid_after_utc)
        return certificates.Signer(root, key)

    def _check_domain(self, name: str, certificate: x509.Certificate) -> None:
        # A root that was brought from elsewhere may have no SPIFFE ID.
        found = certificates.trust_domain_of(certificate)
        if found not in {None, self._trust_domain}:
            raise self._wrong(
                name,
                f"is of the trust domain {found}, and the settings say {self._trust_domain}: "
                "correct the settings, or use another CA directory",
            )

    def _parse(self, name: str, content: bytes) -> list[x509.Certificate]:
        try:
            return x509.load_pem_x509_certificates(content)
        except ValueError:
            raise self._damaged(name) from None

    def _parse_key(self, name: str, content: bytes) -> ec.EllipticCurvePrivateKey:
        # No cause is kept: a parser's error may describe what it read.
        try:
            key = serialization.load_pem_private_key(content, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise self._damaged(name) from None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise self._wrong(name, "holds a key that is not of an elliptic curve")
        return key

    def _damaged(self, name: str) -> ProviderError:
        return self._wrong(
            name, "is damaged or cut short: restore it from a backup; nothing was changed"
        )

    def _wrong(self, name: str, what: str) -> ProviderError:
        return ProviderError(
            ProviderReason.MISCONFIGURED, f"{self._directory / name} {what}", retryable=False
        )


def _stamps(vault: Vault) -> tuple[Stamp | None, ...]:
    return vault.stamp(_ROOT), vault.stamp(_INTERMEDIATE), vault.stamp(_ROOT_KEY)


def _begins(issuer: certificates.Signer) -> int:
    return int(issuer.certificate.not_valid_before_utc.timestamp())


def _rotation(issuer: certificates.Signer) -> int:
    return issuer.not_after - _ROTATE_BEFORE_SECONDS


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _pem_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
