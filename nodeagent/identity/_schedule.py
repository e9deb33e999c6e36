"""When an SVID is renewed, when a failure is tried again, and when an SVID is of no more use.

This module owns these decisions and the constants behind them. It promises that they depend on
their arguments alone: time and chance come in as numbers. It may not read a clock or wait.

Two clocks. Waiting is measured by the monotonic clock, which no administrator and no NTP server
turns; but certificates end by the wall clock. So both are asked, and whichever says "renew" or
"expired" first is believed: a jump forward is noticed by the wall clock, and after a jump backward
the monotonic clock still knows how old the SVID really is.
"""

from __future__ import annotations

import dataclasses
from typing import Final

__all__ = ["RECHECK_SECONDS", "Now", "Timing", "backoff", "plan"]

RECHECK_SECONDS: Final = 60.0
"""The wall clock is read at least so often: a jump is noticed within a minute."""

_RENEW_FROM: Final = 0.60
_RENEW_TO: Final = 0.70
"""Renewal falls into this part of the lifetime: around two thirds, spread so that workloads that
started together do not renew together, with a third left for an issuer that is down."""

_LATE_PART: Final = 0.3
"""An SVID that is already past its renewal point when it comes (some issuers hand out cached ones)
is renewed after this part of what is left."""

_SHORTEST_SECONDS: Final = 1.0
"""No identity is asked for more often, whatever lifetimes an issuer gives."""

_BACKOFF_FIRST_SECONDS: Final = 1.0
_BACKOFF_MOST_SECONDS: Final = 60.0
"""Below a twentieth of the default lifetime's last third: many attempts fit before expiry."""
_BACKOFF_MOST_DOUBLINGS: Final = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Now:
    """One reading of both clocks, in seconds."""

    wall: float
    monotonic: float


@dataclasses.dataclass(frozen=True, slots=True)
class Timing:
    """When an SVID in hand is due and when it ends, by both clocks."""

    begins_wall: float
    renew_wall: float
    renew_monotonic: float
    ends_wall: float
    ends_monotonic: float

    def due(self, now: Now) -> bool:
        """Whether to renew. Before its beginning (a clock turned back) nobody accepts the SVID."""
        return (
            now.monotonic >= self.renew_monotonic
            or now.wall >= self.renew_wall
            or now.wall < self.begins_wall
        )

    def expired(self, now: Now) -> bool:
        return now.wall >= self.ends_wall or now.monotonic >= self.ends_monotonic

    def next_change(self, now: Now) -> float:
        """Return in how many seconds `due` or `expired` can change, if no clock jumps."""
        moments = (
            self.renew_monotonic - now.monotonic,
            self.renew_wall - now.wall,
            self.ends_monotonic - now.monotonic,
            self.ends_wall - now.wall,
        )
        return min((moment for moment in moments if moment > 0), default=0.0)


def plan(not_before: float, not_after: float, now: Now, chance: float) -> Timing:
    """Return the timing of an SVID that came at `now`; `chance` is in [0, 1)."""
    part = _RENEW_FROM + chance * (_RENEW_TO - _RENEW_FROM)
    delay = not_before + part * (not_after - not_before) - now.wall
    left = not_after - now.wall
    if delay <= 0:
        delay = _LATE_PART * left
    delay = max(delay, _SHORTEST_SECONDS)
    return Timing(
        begins_wall=not_before,
        renew_wall=now.wall + delay,
        renew_monotonic=now.monotonic + delay,
        ends_wall=not_after,
        ends_monotonic=now.monotonic + left,
    )


def backoff(failures: int, chance: float, *, retryable: bool) -> float:
    """Return the seconds before the next attempt after `failures` (at least 1) in a row.

    What is not retryable is asked for again at the slowest rate, and not never: an operator who
    has repaired it should not have to restart anything.
    """
    doublings = min(failures - 1, _BACKOFF_MOST_DOUBLINGS)
    ceiling = min(_BACKOFF_FIRST_SECONDS * 2.0**doublings, _BACKOFF_MOST_SECONDS)
    if not retryable:
        ceiling = _BACKOFF_MOST_SECONDS
    return ceiling * (0.5 + chance / 2)
