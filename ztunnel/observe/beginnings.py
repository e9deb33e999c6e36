"""A line in the access log for each connection that has opened, for those who ask for it.

This module owns the memory of which connections have been told. It promises one line, two where a
connection is handed over between two pods of this node, within LOOK_SECONDS for each that stays
open for as long; one that is over before it is looked at has the line of its end, which has its
start. The core tells of ends and not of beginnings, so that what is open is looked at: without this
nothing is. It may not judge, nor write.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ztunnel._core import Listed
    from ztunnel.events import Events
    from ztunnel.observe.access_log import Sink

__all__ = ["LOOK_SECONDS", "Beginnings"]

LOOK_SECONDS: Final = 1.0
"""Between two looks. One takes about 3 microseconds for each connection that is open."""

MAX_TOLD: Final = 1 << 18
"""Connections that are remembered: twice what one look can show. Beyond it some are told again."""


class Beginnings:
    """`state` is the core's number for a connection that is open."""

    def __init__(self, events: Events, sink: Sink, state: int) -> None:
        self._events = events
        self._sink = sink
        self._state = state
        self._told: set[int] = set()

    async def look(self, at: Callable[[Callable[[list[Listed]], None]], Awaitable[int]]) -> None:
        """Tell what is new. `at` shows all connections, as `Listing.look` does."""
        seen: set[int] = set()

        def take(listed: list[Listed]) -> None:
            opened = [each for each in listed if each.state == self._state]
            lines = [
                line
                for each in opened
                if each.number not in self._told
                for line in self._events.opened(each)
            ]
            seen.update(each.number for each in opened)
            self._told.update(each.number for each in opened)
            if lines:
                self._sink.write(lines)

        missed = await at(take)
        if not missed or len(self._told) > MAX_TOLD:
            # Numbers are never used again: those of connections that are gone are of no use.
            self._told = seen
