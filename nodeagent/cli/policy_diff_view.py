"""What `nodeagent policy diff` says: lines from a comparison, as values.

This module owns the words that an operator reads. It promises lines of at most WIDTH columns as far
as names allow, the answer in the first of them, and that what is left out is counted. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Final

from nodeagent.cli.text import duration, many, moment, wrapped
from nodeagent.whatif import (
    CallChange,
    Comparison,
    DiffReport,
    FlowChange,
    ModeChange,
    Replay,
    Side,
)

__all__ = ["lines"]

MOST_ENTRIES: Final = 20
"""Changes of one kind that are shown: a screen or two."""

MOST_NAMES: Final = 4
"""Callers or workloads that are named in one change."""

_REST: Final = "-o json has them all"

_ARRIVALS: Final = {"plaintext": "plaintext", "hbone": "mutual TLS", "direct": "same node, direct"}


def lines(report: DiffReport, now: datetime) -> Iterator[str]:
    """Yield the lines. `now` is when they are read."""
    yield from wrapped(_summary(report))
    yield f"  OLD  {report.old}"
    yield f"  NEW  {report.new}"
    if report.flows is not None:
        yield from _replay(report.flows, now)
    yield from _comparison(report.comparison)


def _summary(report: DiffReport) -> str:
    replay, comparison = report.flows, report.comparison
    if replay is not None:
        if replay.breaks:
            broken = len(replay.breaks) + replay.left_out
            calls = sum(each.connections for each in replay.breaks)
            return f"WOULD BREAK: {many(broken, 'recorded caller')}, {many(calls, 'connection')}"
        if report.breaks:
            return "MAY BREAK: some recorded callers are not known one by one"
        looked = f"{many(replay.flows, 'flow')}, {many(replay.connections, 'connection')}"
        return f"NOTHING BREAKS of what was recorded: {looked}"
    if comparison.refused:
        found = many(len(comparison.refused), "kind")
        return f"WOULD REFUSE {found} of calls that are let in now"
    if report.breaks:
        return "CANNOT TELL: there is more than was looked at, and nothing refused so far"
    if not (comparison.modes or comparison.admitted):
        return "NO DIFFERENCE in who is let in"
    return "NOTHING that is let in now would be refused"


# --- recorded flows -----------------------------------------------------------------------------


def _replay(replay: Replay, now: datetime) -> Iterator[str]:
    yield ""
    age = duration((now - replay.since).total_seconds())
    yield from wrapped(
        f"Recorded calls of the last {age} ({replay.source}): {many(replay.flows, 'flow')}, "
        f"{many(replay.connections, 'connection')}"
    )
    if replay.oldest is not None and replay.oldest > replay.since:
        yield from wrapped(f"nothing older than {moment(replay.oldest)} is kept", 2)
    for count, unit, what in (
        (replay.unknown, "connection", "not recorded one by one: may break"),
        (replay.otherwise, "flow", "judged otherwise when recorded than by OLD"),
        (replay.elsewhere, "flow", "to workloads of neither configuration"),
        (replay.removed, "flow", "to workloads that NEW has not, where nobody will judge"),
        (replay.unjudged, "flow", "refused for reasons that are no policy's"),
    ):
        if count:
            yield from wrapped(f"{many(count, unit)} {what}", 2)
    if replay.truncated:
        yield from wrapped("there are more; the last seen were looked at: ask for less time", 2)
    for title, changes in (("Would break:", replay.breaks), ("Would be let in:", replay.admits)):
        if changes:
            yield ""
            yield title
            for change in changes[:MOST_ENTRIES]:
                yield from _flow(change, now)
            yield from _more(len(changes) - MOST_ENTRIES)


def _flow(change: FlowChange, now: datetime) -> Iterator[str]:
    yield from wrapped(f"{_who(change)} -> {change.destination}:{change.port}", 2)
    seen = duration((now - change.last).total_seconds())
    calls = many(change.connections, "connection") if change.connections else "an open connection"
    yield from wrapped(f"{calls}, last seen {seen} ago; {_becomes(change.old, change.new)}", 4)


def _who(change: FlowChange) -> str:
    shown = list(change.sources[:MOST_NAMES])
    rest = change.source_count - len(shown)
    sources = ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")
    arrival = _ARRIVALS.get(change.arrival, change.arrival)
    name = change.identity or change.workload
    return f"{name} ({sources}, {arrival})" if name else f"{sources} ({arrival})"


# --- the comparison -----------------------------------------------------------------------------


def _comparison(comparison: Comparison) -> Iterator[str]:
    if comparison.modes:
        yield ""
        yield "Mutual TLS modes that change:"
        for mode in comparison.modes[:MOST_ENTRIES]:
            yield from _mode(mode)
        yield from _more(len(comparison.modes) - MOST_ENTRIES)
    for title, changes in (
        ("Calls that would be refused, and are let in now:", comparison.refused),
        ("Calls that would be let in, and are refused now:", comparison.admitted),
    ):
        if changes:
            yield ""
            yield title
            for change in changes[:MOST_ENTRIES]:
                yield from _call(change)
            yield from _more(len(changes) - MOST_ENTRIES)
    yield from _notes(comparison)


def _notes(comparison: Comparison) -> Iterator[str]:
    notes: list[str] = []
    for title, workloads in (
        ("Workloads that come", comparison.workloads_added),
        ("Workloads that go, and are judged by nobody then", comparison.workloads_removed),
    ):
        if workloads:
            notes.append(f"{title}: {_names(workloads)}")
    if comparison.sampled:
        notes.append("Too many callers to ask for each: of those alike, a few stand for all.")
    if comparison.unlooked:
        notes.append(f"Not looked at: {comparison.unlooked} pairs of caller and workload.")
    if comparison.left_out:
        notes.append(f"Left out of this report: {comparison.left_out} changes.")
    if notes:
        yield ""
    for note in notes:
        yield from wrapped(note)


def _mode(change: ModeChange) -> Iterator[str]:
    port = f", port {change.port}" if change.port else ""
    text = f"{_names(change.workloads)}{port}: {change.old} -> {change.new}, by {change.origin}"
    yield from wrapped(text, 2)


def _call(change: CallChange) -> Iterator[str]:
    ports = ", ".join(change.ports)
    kind = "port" if len(change.ports) == 1 and ports.isdecimal() else "ports"
    yield from wrapped(f"{_names(change.workloads)}, {kind} {ports}", 2)
    yield from wrapped(f"from {_names(change.callers)}", 4)
    yield from wrapped(_becomes(change.old, change.new), 4)


def _becomes(old: Side, new: Side) -> str:
    return f"{_said(new)}; was {_said(old)}"


def _said(side: Side) -> str:
    if not side.judged:
        return "judged by nobody: outside the mesh"
    if side.allowed:
        return f"let in by {side.origin}" if side.origin else "let in"
    return f"{side.reason}: {side.origin}" if side.origin else side.reason


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MOST_NAMES])
    rest = len(names) - MOST_NAMES
    return f"{shown} and {rest} more" if rest > 0 else shown


def _more(rest: int) -> Iterator[str]:
    if rest > 0:
        yield f"  and {rest} more: {_REST}"
