"""Giving memory back to the kernel after many connections have closed.

This module owns when that is worth it, and the call itself. glibc keeps what is freed for the next
allocation: a tunnel that once held thousands of connections would keep their memory for ever
(measured: 9,000 closed connections left 1.3 times the idle size behind). It promises that steady
coming and going, however quick, never costs a call. It may not touch the core.
"""

from __future__ import annotations

import ctypes
from typing import Final

__all__ = ["FEWER", "HBONE_WEIGHT", "Returner", "give_back"]

FEWER: Final = 1000
"""So many fewer connections than there were: some 1.5 MB. The call walks every arena and keeps each
one locked meanwhile, a millisecond or two, which less is not worth."""


HBONE_WEIGHT: Final = 64
"""An HBONE connection in as many connections of applications, by memory: 145 KB against 1.5 KB when
it has carried a hundred streams, and less when it has not."""


class Returner:
    """Decides from the number of open connections, told at regular times."""

    def __init__(self) -> None:
        self._peak = 0
        self._last = 0

    def due(self, applications: int, hbone: int) -> bool:
        """Return whether to give memory back now: far fewer than before, and no longer falling."""
        connections = applications + HBONE_WEIGHT * hbone
        falling = connections < self._last
        self._last = connections
        self._peak = max(self._peak, connections)
        if falling or self._peak - connections < FEWER:
            return False
        self._peak = connections
        return True


def give_back() -> None:
    """Return free memory of the C library to the kernel; other threads run on. For glibc; where
    the C library has no such call, nothing happens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
