"""Of which time everything has been told: what `covered` is asked about, for the flows in memory.

This module owns which tunnels have told something since it began, each in spans without a gap. It
promises that what a tunnel counted and never told is a gap, and that it holds MAX_SPANS at most. It
is put to by one thread, and read on any. What is in the file has spans of its own (`_spans`).
"""

from __future__ import annotations

from typing import Final

from nodeagent.flows._coverage import LATE_SECONDS, Span, covered
from ztunnel.protocol import Flows

__all__ = ["Heard"]

MAX_SPANS: Final = 256
"""Kept at most, the last ones: more than an hour has, but of a tunnel that crashes all the time."""


class Heard:
    def __init__(self, now: float) -> None:
        """Begin at `now`, seconds since the epoch."""
        self._began = int(now)
        self._numbers: dict[int, int] = {}
        self._spans: tuple[Span, ...] = ()

    def add(self, process: int, message: Flows) -> None:
        """Note that `message` of a process (by when it was started) has come."""
        # What was said of times that have not come is taken back: the clock was put back.
        spans = [each for each in self._spans if each.begin <= message.until + LATE_SECONDS]
        last = max((n for n, each in enumerate(spans) if each.process == process), default=None)
        known = self._numbers.get(process)
        if last is not None and known is not None and known + 1 == message.number:
            before = spans.pop(last)
            begin, until = before.begin, before.until
        elif message.number == 1:
            begin = until = message.since
        elif known is None:
            # What it told before was told before we began.
            begin = until = min(self._began, message.until)
        else:
            # `until` is a whole second that was over: what was told then begins in the next one.
            begin = until = message.until + 1
        if not message.more:
            until = max(until, message.until)
        spans.append(Span(process, begin, until, message.last))
        self._spans = tuple(spans[-MAX_SPANS:])
        there = {each.process for each in self._spans}
        self._numbers = {each: n for each, n in self._numbers.items() if each in there}
        self._numbers[process] = message.number

    def since(self, now: float) -> int | None:
        """Return the moment from which on there is no gap up to `now`; None if there is one now."""
        return covered(self._spans, 0, int(now)).since
