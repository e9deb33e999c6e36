"""Since when nobody can have called unrecorded, and where there is a gap: pure.

This module owns the question whether "nobody called" is known. It promises that a moment counts as
covered only if whoever could have been let in then has been reported, and that the time between a
tunnel that ended in good order and the next one counts as covered too, for nobody is let in while
none runs; it is told apart. It may not read files or clocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

__all__ = ["LATE_SECONDS", "Covered", "Hole", "Span", "covered"]

LATE_SECONDS: Final = 90
"""Without a word of a tunnel, after which it counts as gone: three times as long as it is silent
when nobody calls (`ztunnel.observe.flows.QUIET_SECONDS`)."""

NOTHING: Final = "nothing was recorded before"
LOST: Final = "what was reported was not written: no room, a slow disk, or nodeagent was killed"
CRASHED: Final = "ztunnel ended without its last report"
SILENT: Final = "nothing has been reported since"
DOWN: Final = "ztunnel did not run: nobody was let in"


class Span(NamedTuple):
    """A process has reported everything from `begin` to `until`, seconds since the epoch.

    `ended`: that was its last word, and nobody was let in after it.
    """

    process: int
    begin: int
    until: int
    ended: bool


class Hole(NamedTuple):
    """A time of which not everything is known, and why."""

    begin: int
    until: int
    cause: str


class Covered(NamedTuple):
    """`since` is the moment from which on there is no gap up to now, None if there is one now.

    `gaps` are those of the time that was asked for, and `down` is when nobody was let in.
    """

    since: int | None
    gaps: tuple[Hole, ...]
    down: tuple[Hole, ...]


def covered(spans: Iterable[Span], since: int, now: int, expected: int | None = None) -> Covered:
    """Return what is known of the time from `since` to `now`, seconds since the epoch.

    A tunnel that has told nothing since `expected` is silent. It is known when somebody has asked;
    else it is LATE_SECONDS ago.
    """
    if expected is None:
        expected = now - LATE_SECONDS
    known = sorted(spans, key=lambda span: (span.begin, span.until))
    if not known:
        return Covered(None, (Hole(since, now, NOTHING),), ())
    down: list[Hole] = []
    gaps = [Hole(0, known[0].begin, NOTHING), *_broken(known, now)]
    for hole in _between(known, now, expected):
        (down if hole.cause == DOWN else gaps).append(hole)
    gaps = _merged(gaps)
    last = gaps[-1].until
    return Covered(
        since=None if last >= now else last,
        gaps=tuple(_clipped(gaps, since, now)),
        down=tuple(_clipped(down, since, now)),
    )


def _broken(known: Sequence[Span], now: int) -> Iterator[Hole]:
    """Yield what a process counted and did not get through, whatever others told meanwhile."""
    last: dict[int, Span] = {}
    for span in known:
        before = last.get(span.process)
        if before is not None:
            yield Hole(before.until, span.begin, LOST)
        last[span.process] = span
    newest = max(known, key=lambda span: span.until)
    for span in last.values():
        # It was replaced and is late. Where nobody else was there, it is a hole (`_between`).
        late = span.until < min(newest.until, now) - LATE_SECONDS
        if late and not span.ended and any(_goes_on(span, other) for other in known):
            yield Hole(span.until, span.until + LATE_SECONDS, CRASHED)


def _goes_on(span: Span, other: Span) -> bool:
    return other.process != span.process and other.begin <= span.until < other.until


def _between(known: Sequence[Span], now: int, expected: int) -> Iterator[Hole]:
    """Yield the times of which no process has told anything."""
    front = known[0]
    for span in known[1:]:
        if span.begin > front.until:
            yield Hole(front.until, span.begin, _cause(front, span))
        if span.until >= front.until:
            front = span
    if front.ended and now > front.until:
        yield Hole(front.until, now, DOWN)
    elif not front.ended and front.until < expected:
        yield Hole(front.until, now, SILENT)


def _cause(before: Span, after: Span) -> str:
    if before.ended:
        return DOWN
    return LOST if before.process == after.process else CRASHED


def _merged(gaps: Iterable[Hole]) -> list[Hole]:
    """Return them in order, those that overlap as one, by the cause of the first."""
    found: list[Hole] = []
    for gap in sorted(gaps):
        if found and gap.begin <= found[-1].until:
            until = max(found[-1].until, gap.until)
            found[-1] = found[-1]._replace(until=until)
        else:
            found.append(gap)
    return found


def _clipped(holes: Iterable[Hole], since: int, now: int) -> Iterator[Hole]:
    for hole in holes:
        if hole.begin <= now and hole.until > since:
            yield Hole(max(hole.begin, since), min(hole.until, now), hole.cause)
