"""Who called the pods of this node, and whom they called, in numbers: each port and verdict.

This module owns that counting, beside the metrics' label sets, which know neither ports nor
addresses. It promises that a connection costs nothing here (the core counts, and is read
every REPORT_SECONDS), that what a decision has counted is told once and is not lost when the
decision goes, that it holds a bounded number of flows, of which one pod has a share (what finds no
room is counted by pod and verdict), and that who is told can tell whether anything was lost on the
way. It may not judge, nor wait for nodeagent.

A flow is fed by decisions, as a label set is, and lives in the core as a series of its own, for as
long as one of its decisions lives there. So the label set's numbers are its own and those of its
flows: `Series.flows`, and `Series.retired` for those that have gone.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Final

import msgspec

from ztunnel import protocol
from ztunnel.observe.series import Counters, Series
from ztunnel.protocol import Flow, FlowKey
from ztunnel.reasons import Reason

if TYPE_CHECKING:
    from ztunnel.corelike import CoreLike

__all__ = ["REPORT_SECONDS", "FlowTable", "LiveFlow"]

REPORT_SECONDS: Final = 5.0
"""Between two reports to nodeagent: what a crash loses. Reading a thousand flows takes less than
ten milliseconds on a busy machine, in portions."""

QUIET_SECONDS: Final = 30
"""Between two reports while nothing is counted: they say that nobody called. Each is a write to
nodeagent's disk, and after a crash the time since the last one counts as not recorded."""

STILL_OPEN_SECONDS: Final = 60
"""Between two reports of a flow of which nothing moves, but connections are open."""

MAX_FLOWS: Final = 8192
"""Flows that the core counts, and flows that wait to be told, each: as many as there are answers in
the cache of decisions. About 2 KB each with two workers, up to 5 KB with eight."""

MAX_OF_POD: Final = 1024
"""The same of one pod: somebody who scans its ports must not take the others' places."""

PORTION: Final = 128
"""Flows read before the loop turns: a millisecond on a busy machine."""

MAX_TOLD: Final = 1000
"""Flows of one message: some 300 KB, far below a frame's limit."""


_REASONS: Final = tuple(Reason)


class LiveFlow:
    """A flow that the core counts. `refs` counts the decisions that feed it."""

    __slots__ = ("key", "looked", "number", "refs", "seen", "series")

    def __init__(self, number: int, key: FlowKey, series: Series, seen: Counters) -> None:
        self.number = number
        self.key = key
        self.series = series
        self.refs = 0
        self.seen = seen
        """As of the last report."""
        self.looked = 0
        """When that was, seconds since the epoch."""


class _Tally:
    """What has been seen of a key and not been told yet."""

    __slots__ = ("carried", "connections", "first", "last", "open", "received", "sent", "settled")

    def __init__(self, now: int) -> None:
        self.first = now
        self.last = now
        self.connections = 0
        self.open: dict[int, int] = {}
        """By the flow's number: one key may have several, under different label sets."""
        self.carried = 0
        """What was open before, of the flows in `open`."""
        self.settled = False
        """`carried` is as it was told before, in vain: what is open now has begun since."""
        self.received = 0
        self.sent = 0


class FlowTable:
    """The flows of one core. `wall` is seconds since the epoch. For the loop's thread only."""

    def __init__(
        self,
        core: CoreLike,
        numbers: Iterator[int],
        wall: Callable[[], float],
        *,
        limit: int = MAX_FLOWS,
        limit_of_pod: int = MAX_OF_POD,
        came_in: Callable[[FlowKey, int], None] = lambda _key, _number: None,
        gone: Callable[[FlowKey, Counters], None] = lambda _key, _counters: None,
    ) -> None:
        """`came_in` is told of connections and how many they are, when they are looked at.

        `gone` is told of each flow that goes, and of all that it has counted.
        """
        self._came_in = came_in
        self._core = core
        self._numbers = numbers
        self._wall = wall
        self._limit = limit
        self._limit_of_pod = limit_of_pod
        self._gone = gone
        self._live: dict[tuple[FlowKey, int], LiveFlow] = {}
        self._of_pod: Counter[tuple[bool, str]] = Counter()
        self._untold: dict[FlowKey, _Tally] = {}
        self._untold_of: Counter[tuple[bool, str]] = Counter()
        self.folded = 0
        """Times that a flow found no room."""
        # The first whole second of which everything is counted.
        self._since = math.ceil(wall())
        self._number = 0
        """Of the last message that was told."""
        self._told = 0
        """Until when everything has been told, seconds since the epoch."""
        self._ended = False
        self._telling = asyncio.Lock()

    def __len__(self) -> int:
        return len(self._live)

    def acquire(self, key: FlowKey, series: Series) -> LiveFlow:
        """Return the flow of `key`, counted for the label set `series` too, for one decision."""
        flow = self._live.get((key, series.number))
        if flow is None and self._is_full(key.owner):
            self.folded += 1
            key = key.folded()
            flow = self._live.get((key, series.number))
        if flow is None:
            number = next(self._numbers)
            self._core.add_series(number)
            flow = LiveFlow(number, key, series, self._counters(number))
            self._live[key, series.number] = flow
            series.flows[number] = flow
            self._of_pod[key.owner] += 1
        flow.refs += 1
        return flow

    def _is_full(self, owner: tuple[bool, str]) -> bool:
        return len(self._live) >= self._limit or self._of_pod[owner] >= self._limit_of_pod

    def release(self, flow: LiveFlow) -> None:
        """Give a decision's hold back. With the last one its numbers become its label set's."""
        flow.refs -= 1
        if flow.refs:
            return
        self._look(flow, int(self._wall()))
        flow.series.retired = flow.series.retired.plus(flow.seen)
        self._gone(flow.key, flow.seen)
        del self._live[flow.key, flow.series.number]
        del flow.series.flows[flow.number]
        self._of_pod[flow.key.owner] -= 1
        if not self._of_pod[flow.key.owner]:
            del self._of_pod[flow.key.owner]
        self._core.remove_series(flow.number)

    async def look(self, destination: str | None) -> AsyncIterator[tuple[LiveFlow, Counters]]:
        """Read the counters of the flows to a workload (None: to all) that came in.

        The loop turns meanwhile. A flow without `refs` has gone since it was read.
        """
        flows = [
            flow
            for flow in self._live.values()
            if not flow.key.outbound and destination in (None, flow.key.destination)
        ]
        for count, flow in enumerate(flows, start=1):
            if count % PORTION == 0:
                await asyncio.sleep(0)
            if flow.refs:
                yield flow, self._counters(flow.number)

    def _counters(self, number: int) -> Counters:
        return Counters(*self._core.read_series(number))

    # --- what is told ---------------------------------------------------------------------------

    async def collect(self) -> int:
        """Look at all flows, and return from when they are; the loop turns meanwhile."""
        now = int(self._wall())
        for count, flow in enumerate(list(self._live.values()), start=1):
            if count % PORTION == 0:
                await asyncio.sleep(0)
            if flow.refs:
                self._look(flow, now)
        return now

    def _look(self, flow: LiveFlow, now: int) -> None:
        before, seen = flow.seen, self._counters(flow.number)
        # A clock that was put back makes it due, too.
        due = not 0 <= now - flow.looked < STILL_OPEN_SECONDS
        if seen == before and not (seen.open and due):
            return
        flow.seen, flow.looked = seen, now
        new = seen.attempts - before.attempts
        if new and not flow.key.outbound:
            self._came_in(flow.key, new)
        if not flow.key.allowed:
            self._tally(flow.key, now).connections += new
            return
        if seen.failed != before.failed:
            self._look_at_failures(flow.key, now, before.failed, seen.failed)
        if seen.carried != before.carried or seen.open:
            tally = self._tally(flow.key, now)
            tally.connections += seen.opened - before.opened
            if flow.number not in tally.open and not tally.settled:
                tally.carried += before.open
            tally.open[flow.number] = seen.open
            tally.received += seen.received - before.received
            tally.sent += seen.sent - before.sent

    def _look_at_failures(
        self, key: FlowKey, now: int, before: tuple[int, ...], seen: tuple[int, ...]
    ) -> None:
        for reason, was, count in itertools.zip_longest(_REASONS, before, seen, fillvalue=0):
            if count != was:
                failed = msgspec.structs.replace(key, reason=str(reason))
                self._tally(failed, now).connections += count - was

    def _tally(self, key: FlowKey, now: int) -> _Tally:
        tally = self._untold.get(key)
        full = len(self._untold) >= self._limit or self._untold_of[key.owner] >= self._limit_of_pod
        folded = key.folded()
        if tally is None and full and key != folded:
            self.folded += 1
            key = folded
            tally = self._untold.get(key)
        if tally is None:
            tally = self._untold[key] = _Tally(now)
            self._untold_of[key.owner] += 1
        tally.last = max(tally.last, now)
        return tally

    def take(self) -> tuple[Flow, ...]:
        """Take a portion of what has not been told, the oldest first."""
        keys = list(itertools.islice(self._untold, MAX_TOLD))
        self._untold_of -= Counter(key.owner for key in keys)
        return tuple(_told(key, self._untold.pop(key)) for key in keys)

    def give_back(self, flows: tuple[Flow, ...]) -> None:
        """Take back what could not be told."""
        for flow in flows:
            tally = self._tally(flow.key, flow.first)
            tally.first = min(tally.first, flow.first)
            tally.last = max(tally.last, flow.last)
            tally.connections += flow.connections
            tally.received += flow.received
            tally.sent += flow.sent
            tally.carried, tally.settled = flow.carried, True

    async def report(
        self,
        tell: Callable[[protocol.Flows], Awaitable[bool]],
        *,
        asked: bool = False,
        last: bool = False,
    ) -> None:
        """Tell what has been counted; what `tell` does not get through is kept for the next time.

        Without anything to tell it is told that there is nothing, once in QUIET_SECONDS, when
        somebody has `asked`, and at the end: `last`, after which nothing is told any more.

        May be cancelled at any point: then a portion that was on its way may be lost.
        """
        async with self._telling:
            now = await self.collect()
            quiet = not self._untold and 0 <= now - self._told < QUIET_SECONDS
            if not self._ended and (not quiet or asked or last):
                await self._tell(tell, now, last=last)

    async def _tell(
        self, tell: Callable[[protocol.Flows], Awaitable[bool]], now: int, *, last: bool
    ) -> None:
        # One round: what is counted meanwhile waits for the next report.
        for left in reversed(range(1 + len(self._untold) // MAX_TOLD)):
            flows = self.take()
            more = bool(left and self._untold)
            ends = last and not more
            message = protocol.Flows(flows, self._number + 1, self._since, now, more, ends)
            if not await tell(message):
                self.give_back(flows)
                return
            self._number += 1
            if not more:
                self._told = now
                self._ended = ends
                return


def _told(key: FlowKey, tally: _Tally) -> Flow:
    return Flow(
        key,
        tally.first,
        tally.last,
        tally.connections,
        sum(tally.open.values()),
        tally.received,
        tally.sent,
        tally.carried,
    )
