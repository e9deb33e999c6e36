"""Identities that peers have proved: verified once for each certificate chain, then remembered.

This module owns the cache of verified chains and the numbers by which the core speaks of them. It
promises that a remembered identity is never used against other roots than it was verified against
(a changed bundle verifies it anew), nor after its certificates' end for anything new, and that the
cache is bounded. It may not open sockets or read clocks, and rules on certificates are `svid`'s.

An expired identity is good for no new stream, but streams that it opened live on: SVIDs last an
hour, connections last days, and a rotation must not touch them. Roots that are withdrawn end both.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from ztunnel import svid
from ztunnel.reasons import Reason

__all__ = ["MAX_IDENTITIES", "Bundles", "Identities", "Proven", "reason_of"]

MAX_IDENTITIES: Final = 8192
"""Remembered chains, about 2 KB each. A cluster of 1,000 identities renewing every hour keeps those
of the last eight hours, and any that a connection still rests on longer."""

Bundles = Mapping[str, tuple[bytes, ...]]

_REASONS: Final[dict[svid.SvidReason, Reason]] = {
    svid.SvidReason.MALFORMED: Reason.CERT_INVALID,
    svid.SvidReason.TOO_LARGE: Reason.CERT_INVALID,
    svid.SvidReason.BAD_IDENTITY: Reason.CERT_INVALID,
    svid.SvidReason.BAD_LEAF: Reason.CERT_INVALID,
    svid.SvidReason.BAD_ISSUER: Reason.CERT_INVALID,
    svid.SvidReason.EXPIRED: Reason.CERT_EXPIRED,
    svid.SvidReason.NOT_YET_VALID: Reason.CERT_NOT_YET_VALID,
    svid.SvidReason.UNTRUSTED_DOMAIN: Reason.TRUST_DOMAIN,
    svid.SvidReason.UNKNOWN_ISSUER: Reason.CERT_UNTRUSTED,
    svid.SvidReason.BAD_SIGNATURE: Reason.CERT_UNTRUSTED,
    svid.SvidReason.WEAK_ALGORITHM: Reason.CERT_INVALID,
    svid.SvidReason.BAD_PATH: Reason.CERT_INVALID,
}


def reason_of(error: svid.SvidError) -> Reason:
    """Return the core's token for a refusal."""
    return _REASONS[error.reason]


class Proven:
    """One verified chain. `number` is the core's; `refs` counts decisions and pools that use it.

    `not_after` is in seconds since the epoch. `roots` are those it was last verified against.
    `fingerprint` is the SHA-256 of the peer's own certificate, `subject` its name (`svid`).
    """

    __slots__ = (
        "chain",
        "digest",
        "fingerprint",
        "id",
        "not_after",
        "number",
        "refs",
        "roots",
        "subject",
        "withdrawn",
    )

    def __init__(
        self,
        number: int,
        peer: svid.VerifiedPeer,
        chain: tuple[bytes, ...],
        digest: bytes,
        roots: tuple[bytes, ...],
    ) -> None:
        self.number = number
        self.id = peer.id
        self.fingerprint = peer.fingerprint
        self.subject = peer.subject
        self.chain = chain
        self.digest = digest
        self.not_after = peer.not_after
        self.roots = roots
        self.refs = 0
        self.withdrawn = False


class Identities:
    """The cache. `evicted` is told of each identity that is forgotten while something uses it."""

    def __init__(
        self,
        numbers: Iterator[int],
        evicted: Callable[[Proven], None],
        limit: int = MAX_IDENTITIES,
    ) -> None:
        self._numbers = numbers
        self._evicted = evicted
        self._limit = limit
        self._by_digest: OrderedDict[bytes, Proven] = OrderedDict()
        self._by_number: dict[int, Proven] = {}
        self._ends: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._by_number)

    def __iter__(self) -> Iterator[Proven]:
        return iter(list(self._by_number.values()))

    def get(self, number: int) -> Proven | None:
        return self._by_number.get(number)

    def last_end(self, identity: str, before: float) -> float | None:
        """Return when the last certificate of an identity ended that has by `before`, if one has.

        Looks at all: for lines that are rare.
        """
        ends = (proven.not_after for proven in self if str(proven.id) == identity)
        return max((end for end in ends if end <= before), default=None)

    def verify(self, chain: Sequence[bytes], bundles: Bundles, now: float) -> Proven:
        """Return whom `chain` (DER, leaf first) proves at `now`. Raises svid.SvidError."""
        digest = _digest(chain)
        known = self._by_digest.get(digest)
        if known is not None:
            if now < known.not_after and self.still_trusted(known, bundles, now):
                self._by_digest.move_to_end(digest)
                return known
            # The full verification names the reason.
            svid.validate(chain, bundles, now)
            if known.withdrawn:
                # Its number's connections have been cut for good: prove anew under a new one.
                self._forget(known)
        peer = svid.validate(chain, bundles, now)
        proven = Proven(
            next(self._numbers),
            peer,
            tuple(chain),
            digest,
            bundles[peer.id.trust_domain],
        )
        self._make_room()
        self._by_digest[digest] = proven
        self._by_number[proven.number] = proven
        heapq.heappush(self._ends, (proven.not_after, proven.number))
        return proven

    def still_trusted(self, proven: Proven, bundles: Bundles, now: float) -> bool:
        """True while the chain holds against the roots of now; its own end is not looked at.

        False is final: a number that was withdrawn once stays so.
        """
        roots = bundles.get(proven.id.trust_domain)
        if proven.withdrawn or roots is None:
            proven.withdrawn = True
            return False
        if roots == proven.roots:
            return True
        try:
            svid.validate(proven.chain, bundles, min(now, proven.not_after))
        except svid.SvidError:
            proven.withdrawn = True
            return False
        proven.roots = roots
        return True

    def ended(self, now: float) -> list[Proven]:
        """Return the identities whose certificates ended since the last call."""
        found: list[Proven] = []
        while self._ends and self._ends[0][0] <= now:
            _, number = heapq.heappop(self._ends)
            proven = self._by_number.get(number)
            if proven is not None:
                found.append(proven)
        return found

    def _make_room(self) -> None:
        while len(self._by_number) >= self._limit:
            oldest = next(
                (proven for proven in self._by_digest.values() if not proven.refs),
                None,
            )
            if oldest is None:
                oldest = next(iter(self._by_digest.values()))
                self._evicted(oldest)
            self._forget(oldest)
        if len(self._ends) > 2 * self._limit:
            self._ends = [end for end in self._ends if end[1] in self._by_number]
            heapq.heapify(self._ends)

    def _forget(self, proven: Proven) -> None:
        self._by_number.pop(proven.number, None)
        if self._by_digest.get(proven.digest) is proven:
            del self._by_digest[proven.digest]


def _digest(chain: Sequence[bytes]) -> bytes:
    digest = hashlib.sha256()
    for certificate in chain:
        # The length keeps two ways of cutting the same bytes apart.
        digest.update(len(certificate).to_bytes(4, "big"))
        digest.update(certificate)
    return digest.digest()
