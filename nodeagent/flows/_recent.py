"""The last hour of flows, in memory: what a short window is read from.

This module owns the recent reports. It promises that an answer is about the seconds that were asked
for, to SLICE_SECONDS, where the file knows hours only; that it says from when on it has heard
everything; and that what it holds is bounded: the oldest slice gives way (MAX_ENTRIES). It is lost
with the process, and says so by beginning anew. It may not wait for the file.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Final, NamedTuple

from nodeagent.flows._model import Recorded
from ztunnel.protocol import Flow, FlowKey

__all__ = ["RECENT_SECONDS", "SLICE_SECONDS", "Recent", "Window"]

RECENT_SECONDS: Final = 3600
"""Kept at most: a longer time is read from the file, to whose hours it matters less."""

SLICE_SECONDS: Final = 15
"""Of one sum: a window is longer than it was asked for by as much at most."""

MAX_ENTRIES: Final = 60_000
"""Sums that are kept, 20 MB with their keys: 250 flows in which something moves all the time can be
told for the whole hour, 1,000 for a quarter of it."""

STILL_OPEN_SECONDS: Final = 150
"""For which what was open counts as open without another word: more than twice as long as ztunnel
takes to say so again (`ztunnel.flows.STILL_OPEN_SECONDS`)."""


_LAST_SECOND: Final = 253_402_300_799
"""Of the year 9999, behind which no time can be written."""


class _Sum(NamedTuple):
    """Of one flow in one slice; `open` is as of the last report."""

    first: int
    last: int
    connections: int
    most_open: int
    received: int
    sent: int
    carried: int
    open: int

    def then(self, later: _Sum) -> _Sum:
        """Return the sum of both; what was open before is what was open before the first."""
        return _Sum(
            min(self.first, later.first),
            max(self.last, later.last),
            self.connections + later.connections,
            max(self.most_open, later.most_open),
            self.received + later.received,
            self.sent + later.sent,
            self.carried,
            later.open,
        )


class _Slice(NamedTuple):
    begin: int
    sums: dict[FlowKey, _Sum]


class Window(NamedTuple):
    """What was seen from `since` on. Nothing is missing of what was told since `began`, and `heard`
    is when something last was.
    """

    since: int
    began: int
    heard: int
    flows: tuple[Recorded, ...]

    @property
    def whole(self) -> bool:
        return self.began <= self.since


class Recent:
    """The last reports. `add` and `read` may be called by different threads."""

    def __init__(self, now: float) -> None:
        """Begin at `now`, seconds since the epoch."""
        self._lock = threading.Lock()
        self._slices: deque[_Slice] = deque()
        self._keys: dict[FlowKey, FlowKey] = {}
        """One object for all slices that speak of a flow."""
        self._entries = 0
        self._since = int(now)
        self._heard = int(now)

    def add(self, flows: Iterable[Flow], now: float) -> None:
        with self._lock:
            self._turn(int(now))
            self._heard = int(now)
            newest = self._slices[-1].sums
            before = len(newest)
            for flow in flows:
                key = self._keys.setdefault(flow.key, flow.key)
                told = _Sum(
                    flow.first,
                    flow.last,
                    flow.connections,
                    flow.open,
                    flow.received,
                    flow.sent,
                    flow.carried,
                    flow.open,
                )
                known = newest.get(key)
                newest[key] = told if known is None else known.then(told)
            self._entries += len(newest) - before
            self._make_room(int(now))

    def _turn(self, now: int) -> None:
        begin = now // SLICE_SECONDS * SLICE_SECONDS
        if self._slices and begin < self._slices[-1].begin:
            # The clock was put back: nothing here has a time that means anything now.
            self._slices.clear()
            self._keys.clear()
            self._entries = 0
            self._since = now
        if not self._slices or begin > self._slices[-1].begin:
            self._slices.append(_Slice(begin, {}))

    def _make_room(self, now: int) -> None:
        oldest = now - RECENT_SECONDS - STILL_OPEN_SECONDS - SLICE_SECONDS
        while len(self._slices) > 1 and (
            self._entries > MAX_ENTRIES or self._slices[0].begin < oldest
        ):
            gone = self._slices.popleft()
            self._entries -= len(gone.sums)
            self._since = max(self._since, self._slices[0].begin)
            for key in gone.sums.keys() - self._slices[-1].sums.keys():
                self._keys.pop(key, None)

    def read(self, now: float, age: int) -> Window:
        """Return what was seen in the `age` seconds up to `now`."""
        with self._lock:
            slices = tuple(self._slices)
            if slices:
                slices = (*slices[:-1], _Slice(slices[-1].begin, dict(slices[-1].sums)))
            began, heard = self._since, self._heard
        since = (int(now) - age) // SLICE_SECONDS * SLICE_SECONDS
        before = [each for each in slices if since - STILL_OPEN_SECONDS <= each.begin < since]
        found = _summed([each for each in slices if each.begin >= since])
        for key, told in _summed(before).items():
            if key not in found and told.open:
                found[key] = _Sum(since, since, 0, told.open, 0, 0, told.open, told.open)
        recorded = tuple(_recorded(key, told) for key, told in found.items() if told.last >= since)
        return Window(since, began, heard, recorded)


def _summed(slices: Sequence[_Slice]) -> dict[FlowKey, _Sum]:
    found: dict[FlowKey, _Sum] = {}
    for each in slices:
        for key, told in each.sums.items():
            known = found.get(key)
            found[key] = told if known is None else known.then(told)
    return found


def _moment(seconds: int) -> datetime:
    return datetime.fromtimestamp(min(seconds, _LAST_SECOND), UTC)


def _recorded(key: FlowKey, told: _Sum) -> Recorded:
    return Recorded(
        identity=key.identity,
        source=key.source,
        workload=key.workload,
        arrival=key.arrival.value,
        destination=key.destination,
        address=key.address,
        port=key.port,
        allowed=key.allowed,
        reason=key.reason,
        first=_moment(told.first),
        last=_moment(told.last),
        connections=told.connections,
        most_open=told.most_open,
        received=told.received,
        sent=told.sent,
        carried=told.carried,
        outbound=key.outbound,
        service=key.service,
        policy=key.policy,
    )
