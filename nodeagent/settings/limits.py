"""The section `limits` of the settings: how much of the tunnel one pod may take.

This module owns the section's fields and the range of each. It promises that what it returns is
complete (a field that is left out has the tunnel's default) and within range, or that the mistake
is told with its place. It may not know how a limit is kept; docs/configuration.md says what each is
for, and `_core/base.h` why its default is what it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Final

import msgspec

from nodeagent.api import Check
from ztunnel.protocol import Limits

__all__ = ["Section", "resolve"]

_MOST: Final = 1_000_000
"""Of anything that is counted one by one: as many descriptors as the unit allows."""

_MIB: Final = 1024 * 1024


def _between(least: int, most: int, *, zero: bool) -> Callable[[int], int]:
    def check(value: int) -> int:
        if not (least <= value <= most or (zero and value == 0)):
            none = ", or 0 for no limit" if zero else ""
            raise ValueError(f"{value} is not between {least} and {most}{none}")
        return value

    return check


_Count = Annotated[int, Check(_between(1, _MOST, zero=True))]


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """The fields as the file spells them."""

    connections: _Count | None = None
    dials: _Count | None = None
    questions: Annotated[int, Check(_between(16, 65536, zero=False))] | None = None
    handshakes: Annotated[int, Check(_between(16, 65536, zero=False))] | None = None
    held_bytes: Annotated[int, Check(_between(_MIB, 1 << 40, zero=False))] | None = None
    failure_lines: _Count | None = None


def resolve(section: Section | None) -> Limits:
    """Return the limits in force: the section's, and the defaults of those it leaves out."""
    if section is None:
        return Limits()
    given = msgspec.structs.asdict(section)
    return Limits(**{name: value for name, value in given.items() if value is not None})
