"""What `nodeagent trace` says: a line for an event, and the last one. Pure.

This module owns the words. It promises that no name of a program or workload can steer a terminal.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import tzinfo

from nodeagent.cli.text import many, printable, size
from nodeagent.trace import Event

__all__ = ["line", "summary"]

_MILLI = 1000


def line(event: Event, zone: tzinfo | None = None) -> str:
    """Return one line; `zone` None is the machine's time zone."""
    when = event.time.astimezone(zone).isoformat(sep="T", timespec="milliseconds")
    arrow = "<-" if event.role == "server" else "->"
    who = f" ({event.peer})" if event.peer else ""
    program = f" {event.program}:" if event.program else ""
    said = (
        f"{when} {event.event} {event.pod} {event.role}:{program} "
        f"{event.local} {arrow} {event.remote}{who}{_more(event)}"
    )
    return printable(said)


def _more(event: Event) -> str:
    if event.event == "bypass":
        return ", opens a connection around the tunnel" if event.new else ", around the tunnel"
    if event.seconds is None:
        return ""
    lasted = f"{event.seconds:.1f} s" if event.seconds >= 1 else f"{event.seconds * _MILLI:.1f} ms"
    again = f", {many(event.retransmits, 'retransmit')}" if event.retransmits else ""
    return f", {lasted}, sent {size(event.sent or 0)}, received {size(event.received or 0)}{again}"


def summary(counts: Mapping[str, int], seconds: float, left_out: int, lost: int) -> str:
    """Return the last line: what was seen, and what of it was not said."""
    said = (
        f"{seconds:.0f} s: {many(counts.get('connection', 0), 'connection')}, "
        f"{many(counts.get('retransmit', 0), 'retransmit')}, "
        f"{many(counts.get('bypass', 0), 'flow')} around the tunnel"
    )
    if left_out:
        said += f"; {many(left_out, 'line')} left out, too many at once"
    if lost:
        said += f"; {many(lost, 'event')} lost, the ring was full"
    return said
