"""The section `flows` of the settings: how long, and in how much room, callers are remembered.

This module owns the section's fields and the range of each. It promises that what it returns is
complete (a field that is left out has its default) and within range, or that the mistake is told
with its place. It may not know how they are kept; `nodeagent.flows` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Final

import msgspec

from nodeagent.api import Check

__all__ = ["Keep", "Section", "resolve"]

MAX_HOURS: Final = 366 * 24
"""A year: what runs once a year is worth knowing before a policy locks it out."""

MAX_MEGABYTES: Final = 4096


def _between(least: int, most: int, what: str) -> Callable[[int], int]:
    def check(value: int) -> int:
        if not least <= value <= most:
            raise ValueError(f"{value} is not between {least} and {most} {what}")
        return value

    return check


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """The fields as the file spells them."""

    retention_hours: Annotated[int, Check(_between(0, MAX_HOURS, "hours"))] | None = None
    max_megabytes: Annotated[int, Check(_between(1, MAX_MEGABYTES, "megabytes"))] | None = None


class Keep(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept: for so many hours (0: nothing is recorded), in a file of so many megabytes.

    Eight days by default, so that a week's job is in them whenever one looks.
    """

    retention_hours: int = 192
    max_megabytes: int = 64


def resolve(section: Section | None) -> Keep:
    """Return what is in force: the section's, and the defaults of what it leaves out."""
    if section is None:
        return Keep()
    given = msgspec.structs.asdict(section)
    return Keep(**{name: value for name, value in given.items() if value is not None})
