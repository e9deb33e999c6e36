"""The section `deadlines` of the settings: how long the tunnel waits for what.

This module owns the section's fields and the range of each. It promises that what it returns is
complete (a field that is left out has the tunnel's default) and within range, or that the mistake
is told with its place. It may not know how a deadline is kept; docs/configuration.md says what
each is for, and `_core/base.h` why its default is what it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Final

import msgspec

from nodeagent.api import Check
from ztunnel.protocol import Deadlines

__all__ = ["Section", "resolve"]

_WEEK: Final = 7 * 24 * 3600
"""Seconds; the core's own limit. What is meant as "never" leaks what it was to free."""


def _between(least: int, most: int) -> Callable[[int], int]:
    def check(value: int) -> int:
        if not least <= value <= most:
            raise ValueError(f"{value} is not between {least} and {most} seconds")
        return value

    return check


_Short = Annotated[int, Check(_between(1, 60))]
"""Waits for a peer that has nothing else to do: beyond a minute it only holds descriptors."""

_Wait = Annotated[int, Check(_between(1, 300))]
"""Waits for a third: beyond five minutes the application has long given up."""


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """The fields as the file spells them."""

    decision: _Short | None = None
    credential: _Wait | None = None
    connect: _Wait | None = None
    first_byte: _Short | None = None
    tls_handshake: _Short | None = None
    http2_settings: _Short | None = None
    connect_request: _Short | None = None
    connect_answer: _Wait | None = None
    stream_wait: _Wait | None = None
    half_closed: Annotated[int, Check(_between(60, _WEEK))] | None = None
    ping_interval: _Wait | None = None
    ping_answer: _Wait | None = None
    ping_suspect: _Short | None = None
    idle: Annotated[int, Check(_between(5, _WEEK))] | None = None
    idle_surplus: Annotated[int, Check(_between(1, _WEEK))] | None = None
    goodbye: _Short | None = None
    drain: Annotated[int, Check(_between(1, _WEEK))] | None = None


def resolve(section: Section | None) -> Deadlines:
    """Return the deadlines in force: the section's, and the defaults of those it leaves out."""
    if section is None:
        return Deadlines()
    given = msgspec.structs.asdict(section)
    return Deadlines(**{name: value for name, value in given.items() if value is not None})
