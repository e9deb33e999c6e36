"""A line in the access log for the beginning of each connection, for those who ask for it.

This module owns the memory of which connections have been told. It promises one line, two where a
connection is handed over between two pods of this node, for each that was open: within LOOK_SECONDS
for one that stays open for as long, else with the line of its end, before it; and that both lines
have the same start, whatever becomes of the node's clock between them. The core tells of
ends and not of beginnings, so that what is open is looked at; and each end is asked about, which
takes it out of the core's own lines (`Events.decided`). Who does not ask for beginnings pays for
neither. It may not judge, nor write.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import msgspec

from ztunnel.reasons import Reason

if TYPE_CHECKING:
    from ztunnel._core import Ended, Listed
    from ztunnel.events import Events
    from ztunnel.observe.access_log import Line, Sink

__all__ = ["LOOK_SECONDS", "Beginnings", "Told"]

LOOK_SECONDS: Final = 1.0
"""Between two looks. One takes about 3 microseconds for each connection that is open."""

MAX_TOLD: Final = 1 << 18
"""Connections that are remembered: twice what one look can show. Beyond it some are told again."""

_CLOSED: Final = list(Reason).index(Reason.CLOSED)

_Key = tuple[int, int, bytes, int, bytes, int, int]
"""What a connection has both while it is open and at its end, where it has no number. Streams that
one client's HBONE connection begins at once may share it: they are counted."""


def _key(each: Listed | Ended) -> _Key:
    return (
        each.kind,
        each.pod,
        each.source,
        each.source_port,
        each.destination,
        each.destination_port,
        each.started_us,
    )


class Told:
    """Which connections have the line of their beginning."""

    def __init__(self) -> None:
        self._numbers: set[int] = set()
        self._open: Counter[_Key] = Counter()
        """Those that have been told, and whose end has not been reported."""
        self._starts: dict[_Key, float] = {}
        """When these began, as it was told."""
        self._looking = False
        self._ended: Counter[_Key] = Counter()
        """Those that ended untold during a look, which may still show them."""

    def look(self) -> None:
        """Begin a look at what is open."""
        self._looking = True

    def is_new(self, listed: Listed) -> bool:
        """Return whether the beginning of what is open is to be told now."""
        if listed.number in self._numbers:
            return False
        self._numbers.add(listed.number)
        return not _taken(self._ended, _key(listed))

    def begun(self, listed: Listed, start: float) -> float:
        """Remember that it is told now, and return the start to tell."""
        key = _key(listed)
        self._open[key] += 1
        return self._starts.setdefault(key, start)

    def looked(self, seen: dict[int, Listed], *, whole: bool) -> None:
        """End a look, which has shown `seen`, and if it was `whole` all there is."""
        self._looking = False
        self._ended.clear()
        if whole or len(self._numbers) > MAX_TOLD:
            # Numbers are never used again: those of connections that are gone are of no use.
            self._numbers = set(seen)
        if len(self._open) > MAX_TOLD:
            # Ends that the core could not report.
            self._open = Counter(map(_key, seen.values()))
            self._starts = {key: self._starts[key] for key in self._open if key in self._starts}

    def ended(self, event: Ended) -> float | None:
        """Take in an end; return the start that has been told, None if none has."""
        key = _key(event)
        if _taken(self._open, key):
            return self._starts.get(key) if key in self._open else self._starts.pop(key, None)
        if self._looking:
            self._ended[key] += 1
        return None


def _with_start(lines: list[Line], start: float) -> list[Line]:
    return [msgspec.structs.replace(line, start=start) for line in lines]


def _carried(event: Ended) -> bool:
    """Return whether a connection was open at some time, as far as its end can tell."""
    return event.reason == _CLOSED or bool(event.received or event.sent)


def _taken(counts: Counter[_Key], key: _Key) -> bool:
    """Take one of `key` out of `counts`; False if there is none."""
    found = counts.get(key, 0)
    if found > 1:
        counts[key] = found - 1
    elif found:
        del counts[key]
    return found > 0


class Beginnings:
    """`state` is the core's number for a connection that is open."""

    def __init__(self, events: Events, sink: Sink, state: int) -> None:
        self._events = events
        self._sink = sink
        self._state = state
        self._told = Told()
        events.beginnings = self

    def before(self, event: Ended, end: Callable[[], list[Line]]) -> Callable[[], list[Line]]:
        """Return `end`, which makes the lines of an end, with the beginning before it if need be.

        That has neither bytes nor duration.
        """
        start = self._told.ended(event)
        if start is not None:
            return lambda: _with_start(end(), start)
        if not _carried(event):
            return end

        def both() -> list[Line]:
            ends = end()
            begun = _with_start(self._events.opened(event), ends[0].start)
            replace = msgspec.structs.replace
            return [replace(line, received=0, sent=0, duration_us=0) for line in begun] + ends

        return both

    async def look(self, at: Callable[[Callable[[list[Listed]], None]], Awaitable[int]]) -> None:
        """Tell what is new. `at` shows all connections, as `Listing.look` does."""
        seen: dict[int, Listed] = {}

        def take(listed: list[Listed]) -> None:
            opened = {each.number: each for each in listed if each.state == self._state}
            seen.update(opened)
            lines: list[Line] = []
            for each in filter(self._told.is_new, opened.values()):
                begun = self._events.opened(each)
                if begun:
                    lines += _with_start(begun, self._told.begun(each, begun[0].start))
            if lines:
                self._sink.write(lines)

        whole = False
        self._told.look()
        try:
            whole = not await at(take)
        finally:
            self._told.looked(seen, whole=whole)
