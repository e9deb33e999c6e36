"""Counts by keys that others choose, in bounded room.

This module owns one kind of counter: by key, with a limit. It promises that the number of keys is
bounded, that what finds no room is counted under one key for the rest, and how often that was, and
that keys which nothing has counted for long give way first. It reads no clock but the one that it
is given, and may not know what the keys are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Final, Generic, TypeVar

__all__ = ["EXPIRY_SECONDS", "Tally"]

EXPIRY_SECONDS: Final = 600.0
"""For how long the last numbers of something that is gone can still be scraped: longer than any
sensible interval, and than the five minutes for which Prometheus takes a sample as present."""

K = TypeVar("K")


class _Count:
    __slots__ = ("last", "number")

    def __init__(self) -> None:
        self.number = 0
        self.last = 0.0


class Tally(Generic[K]):
    """Numbers by key. `clock` is monotonic, seconds; `rest` is the key of what finds no room."""

    def __init__(self, clock: Callable[[], float], limit: int, rest: Callable[[K], K]) -> None:
        self._clock = clock
        self._limit = limit
        self._rest = rest
        self._counts: OrderedDict[K, _Count] = OrderedDict()
        self.overflowed = 0
        """What was counted for the rest."""
        self.expired = 0
        """Keys that are no longer there."""

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, key: K, number: int = 1) -> None:
        now = self._clock()
        count = self._counts.get(key)
        if count is None and len(self._counts) >= self._limit and not self._make_room(now):
            self.overflowed += number
            key = self._rest(key)
            count = self._counts.get(key)
        if count is None:
            count = self._counts[key] = _Count()
        count.number += number
        count.last = now
        self._counts.move_to_end(key)

    def _make_room(self, now: float) -> bool:
        key, count = next(iter(self._counts.items()))
        if now - count.last < EXPIRY_SECONDS:
            return False
        del self._counts[key]
        self.expired += 1
        return True

    def items(self) -> Iterator[tuple[K, int]]:
        return ((key, count.number) for key, count in self._counts.items())

    def expire(self, is_gone: Callable[[K], bool]) -> None:
        """Forget the keys that are gone and that nothing has counted for EXPIRY_SECONDS."""
        before = self._clock() - EXPIRY_SECONDS
        idle: list[K] = []
        for key, count in self._counts.items():
            if count.last >= before:
                break  # the rest has been counted later
            if is_gone(key):
                idle.append(key)
        for key in idle:
            del self._counts[key]
        self.expired += len(idle)
