"""How many audit lines there may be in a second, and how many there would have been.

This module owns the count. It promises that one source has no more than its share, so that whoever
floods the log does not hide what others do; that what is left out is counted; and that its memory
is bounded. It is pure: times are given.
"""

from __future__ import annotations

from typing import Final

__all__ = ["SHARE", "Bucket"]

SHARE: Final = 4
"""A source has one line in so many, of each second."""

MAX_SOURCES: Final = 4096
"""Sources that are told apart within a second. Further ones share what one may have."""


class Bucket:
    """A token bucket of one second's lines. Times are monotonic, in seconds."""

    def __init__(self, now: float) -> None:
        self._rate = 0
        self._tokens = 0.0
        self._filled = now
        self._second = int(now)
        self._sources: dict[bytes, int] = {}
        self.left_out = 0

    def limit(self, rate: int) -> None:
        """Have `rate` lines per second from now on, 0 for no limit, as at first."""
        if rate == self._rate:
            return
        self._rate = rate
        self._tokens = float(rate)

    def admit(self, source: bytes, now: float) -> bool:
        """Return whether there is room for a line about `source`, an address; if not, count it."""
        if not self._rate or self._has_room(source, now):
            return True
        self.left_out += 1
        return False

    def _has_room(self, source: bytes, now: float) -> bool:
        passed = max(0.0, now - self._filled)
        self._tokens = min(float(self._rate), self._tokens + passed * self._rate)
        self._filled = now
        if int(now) != self._second:
            self._second = int(now)
            self._sources.clear()
        if source not in self._sources and len(self._sources) >= MAX_SOURCES:
            source = b""
        taken = self._sources.get(source, 0)
        if self._tokens < 1 or taken >= max(1, self._rate // SHARE):
            return False
        self._tokens -= 1
        self._sources[source] = taken + 1
        return True
