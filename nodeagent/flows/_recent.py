"""The last hour of flows, in memory: what a short window is read from.

This module owns the recent reports. It promises that an answer is about the time that was asked
for, give or take a slice, where the file knows hours only; that it says from when on it has heard
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

SLICE_SECONDS: Final = 5
"""Of one sum, for FINE_SECONDS: as often as ztunnel reports. A window is longer than it was asked
for by as much at most."""

FINE_SECONDS: Final = 300

COARSE_SECONDS: Final = 60
"""Of one sum after that: nobody who looks at half an hour misses the seconds."""

MAX_ENTRIES: Final = 60_000
"""Sums that are kept, 20 MB with their keys: the whole hour of 500 flows in which something moves
all the time, and the last five minutes of 1,000."""

STILL_OPEN_SECONDS: Final = 150
"""For which what was open counts as open without another word: more than twice as long as ztunnel
takes to say so again (`ztunnel.observe.flows.STILL_OPEN_SECONDS`)."""


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
    """What was told from `begin` to before `end`."""

    begin: int
    end: int
    sums: dict[FlowKey, _Sum]


class Window(NamedTuple):
    """What was seen from `since` on. Nothing is missing of what was told since `began`."""

    since: int
    began: int
    flows: tuple[Recorded, ...]

    @property
    def whole(self) -> bool:
        return self.began <= self.since


class Recent:
    """The last reports. `add` and `read` may be called by different threads."""

    def __init__(self, now: float) -> None:
        """Begin at `now`, seconds since the epoch."""
        self._lock = threading.Lock()
        self._coarse: deque[_Slice] = deque()
        self._fine: deque[_Slice] = deque()
        self._keys: dict[FlowKey, FlowKey] = {}
        """One object for all slices that speak of a flow."""
        self._entries = 0
        self._since = int(now)

    def add(self, flows: Iterable[Flow], now: float) -> None:
        with self._lock:
            self._turn(int(now))
            newest = self._fine[-1].sums
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
        """Begin the slice of `now`, and let older ones become minutes."""
        begin = now // SLICE_SECONDS * SLICE_SECONDS
        if self._fine and begin < self._fine[-1].begin:
            # The clock was put back: nothing here has a time that means anything now.
            self._fine.clear()
            self._coarse.clear()
            self._keys.clear()
            self._entries = 0
            self._since = now
        if not self._fine or begin > self._fine[-1].begin:
            self._fine.append(_Slice(begin, begin + SLICE_SECONDS, {}))
        while self._fine[0].end <= now - FINE_SECONDS:
            self._coarsen(self._fine.popleft())

    def _coarsen(self, old: _Slice) -> None:
        begin = old.begin // COARSE_SECONDS * COARSE_SECONDS
        minute = _Slice(begin, begin + COARSE_SECONDS, old.sums)
        if self._coarse and self._coarse[-1].begin == begin:
            # Another object: somebody may be reading what is there.
            known = self._coarse.pop()
            minute = _Slice(begin, begin + COARSE_SECONDS, _summed((known, old)))
            self._entries += len(minute.sums) - len(known.sums) - len(old.sums)
        self._coarse.append(minute)

    def _make_room(self, now: int) -> None:
        oldest = now - RECENT_SECONDS - STILL_OPEN_SECONDS
        while self._coarse and self._coarse[0].end <= oldest:
            self._drop(self._coarse)
        while self._entries > MAX_ENTRIES and len(self._coarse) + len(self._fine) > 1:
            self._drop(self._coarse or self._fine)

    def _drop(self, slices: deque[_Slice]) -> None:
        gone = slices.popleft()
        self._entries -= len(gone.sums)
        self._since = max(self._since, gone.end)
        for key in gone.sums.keys() - self._fine[-1].sums.keys():
            self._keys.pop(key, None)

    def read(self, now: float, age: int) -> Window:
        """Return what was seen in the `age` seconds up to `now`."""
        with self._lock:
            slices = [*self._coarse, *self._fine]
            if slices:
                # The last one may yet grow.
                slices[-1] = slices[-1]._replace(sums=dict(slices[-1].sums))
            began = self._since
        asked = int(now) - age
        begins = (each.begin for each in slices if each.begin <= asked < each.end)
        since = next(begins, asked // SLICE_SECONDS * SLICE_SECONDS)
        found = _summed([each for each in slices if each.begin >= since])
        before = _summed(
            [each for each in slices if since - STILL_OPEN_SECONDS < each.end <= since]
        )
        for key, told in before.items():
            if key not in found and told.open:
                found[key] = _Sum(since, since, 0, told.open, 0, 0, told.open, told.open)
        recorded = tuple(_recorded(key, told) for key, told in found.items() if told.last >= since)
        if since < began <= asked:
            # In the slice in which it began, nothing is older than that.
            since = began
        return Window(since, began, recorded)


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
