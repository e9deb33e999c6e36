"""Telling those who wait that something has changed, not more often than they can use it.

This module owns one number that grows, and who waits for it to grow. It promises that nobody misses
a change, and that those who wait are woken at once after a quiet while, and a moment later at most
otherwise. It may not know what has changed. One event loop only.
"""

from __future__ import annotations

import asyncio
from typing import Final

__all__ = ["Progress"]

QUIET_SECONDS: Final = 0.05
"""Between two wakings: those that wait look at every pod, and a thousand pods that are enrolled at
once make thousands of steps."""


class Progress:
    """`count` is the number of changes so far."""

    def __init__(self) -> None:
        self.count = 0
        self._moved = asyncio.Event()
        self._waking: asyncio.TimerHandle | None = None
        self._quiet_until = 0.0

    def made(self) -> None:
        """Something has changed."""
        self.count += 1
        if self._waking is None:
            loop = asyncio.get_running_loop()
            self._waking = loop.call_later(max(0.0, self._quiet_until - loop.time()), self._wake)

    def _wake(self) -> None:
        self._waking = None
        self._quiet_until = asyncio.get_running_loop().time() + QUIET_SECONDS
        self._moved.set()
        self._moved = asyncio.Event()

    async def after(self, seen: int) -> None:
        """Return once `count` is no longer `seen`."""
        while self.count == seen:
            await self._moved.wait()
