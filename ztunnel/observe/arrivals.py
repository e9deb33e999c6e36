"""What came in to each workload of this node, in numbers, since this process began.

This module owns the counts that nobody else keeps by workload: flows that have gone (`flows`),
connections that ended before a decision, handshakes and the certificates that were shown. With the
flows that are there it makes a workload's whole count, in which each connection is once, those
that are open included: `whole`. It promises that the sum over all workloads never falls, also when
pods leave, and that it holds a bounded number of workloads. It may not judge, nor format.

What it counts itself costs nothing for a connection under a decision that is known: the core counts
those, and they are read when somebody asks.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Final

from ztunnel.protocol import Arrival, FlowKey
from ztunnel.reasons import Reason

if TYPE_CHECKING:
    from ztunnel.observe.flows import FlowTable
    from ztunnel.observe.series import Counters

__all__ = ["Arrivals", "Arrived", "whole"]

MAX_WORKLOADS: Final = 4096
"""Workloads with counts of their own, those of pods that have left among them: a node has a few
hundred pods. The longest untouched are then counted with others; about 2 KB each."""

_REASONS: Final = tuple(Reason)


class Arrived:
    """Counts of one workload, or of several. A connection that was opened is never in `failed`."""

    __slots__ = ("certificates", "closed", "failed", "handshake_failures", "handshakes", "opened")

    def __init__(self) -> None:
        self.opened: Counter[Arrival] = Counter()
        self.closed: Counter[Arrival] = Counter()
        self.failed: Counter[tuple[Arrival, Reason]] = Counter()
        self.handshakes = 0
        """As server, complete: the client's certificate was accepted."""
        self.handshake_failures: Counter[Reason] = Counter()
        """As server; and HBONE connections that broke later, by reasons of their own."""
        self.certificates = 0
        """Times that a pod was given a certificate to show."""

    def add(self, other: Arrived) -> None:
        self.opened += other.opened
        self.closed += other.closed
        self.failed += other.failed
        self.handshakes += other.handshakes
        self.handshake_failures += other.handshake_failures
        self.certificates += other.certificates

    def count(self, arrival: Arrival, counters: Counters) -> None:
        self.opened[arrival] += counters.opened
        self.closed[arrival] += counters.closed
        for number, failed in enumerate(counters.failed):
            if failed:
                self.failed[arrival, _REASONS[number]] += failed


class Arrivals:
    """Tallies by workload (its uid; "" for pods that nobody knows any more)."""

    def __init__(self, limit: int = MAX_WORKLOADS) -> None:
        self._limit = limit
        self._tallies: OrderedDict[str, Arrived] = OrderedDict()
        self._others = Arrived()

    def __contains__(self, workload: str) -> bool:
        return workload in self._tallies

    def _own(self, workload: str) -> Arrived:
        arrived = self._tallies.get(workload)
        if arrived is None:
            while len(self._tallies) >= self._limit:
                self._others.add(self._tallies.popitem(last=False)[1])
            arrived = self._tallies[workload] = Arrived()
        self._tallies.move_to_end(workload)
        return arrived

    def flow_gone(self, key: FlowKey, counters: Counters) -> None:
        """The core counts this flow no more: `counters` is all it has had."""
        if not key.outbound:
            self._own(key.destination).count(key.arrival, counters)

    def undecided(self, workload: str, arrival: Arrival, reason: Reason) -> None:
        """A connection ended before there was a decision on it."""
        self._own(workload).failed[arrival, reason] += 1

    def handshake(self, workload: str) -> None:
        self._own(workload).handshakes += 1

    def handshake_failed(self, workload: str, reason: Reason) -> None:
        self._own(workload).handshake_failures[reason] += 1

    def certificate(self, workload: str) -> None:
        self._own(workload).certificates += 1

    def of(self, workload: str | None) -> Arrived:
        """Return a copy of a workload's counts; None: of all."""
        found = Arrived()
        if workload is not None:
            known = self._tallies.get(workload)
            if known is not None:
                found.add(known)
            return found
        found.add(self._others)
        for known in self._tallies.values():
            found.add(known)
        return found


async def whole(arrivals: Arrivals, flows: FlowTable, workload: str | None) -> Arrived:
    """Return the whole count of a workload (None: of all), open connections included.

    The loop turns between portions. On the loop's thread only.
    """
    seen = [found async for found in flows.look(workload)]
    arrived = arrivals.of(workload)
    for flow, counters in seen:
        # One that has gone meanwhile is among what has gone.
        if flow.refs:
            arrived.count(flow.key.arrival, counters)
    return arrived
