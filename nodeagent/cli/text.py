"""Words and numbers as people read them on a terminal: pure.

This module owns the spelling of durations, moments, sizes and counts in every command, and the
escape of what a name must not do to a terminal. It promises that nothing it returns moves a cursor,
changes a colour or turns the direction of writing. The time and the time zone come in as values.
"""

from __future__ import annotations

import textwrap
import unicodedata
from datetime import datetime, tzinfo
from typing import Final

__all__ = [
    "NONE",
    "WIDTH",
    "columns_of",
    "duration",
    "many",
    "moment",
    "printable",
    "printable_lines",
    "size",
    "wrapped",
]

WIDTH: Final = 80
"""Columns of text where nothing says how many there are."""

NONE: Final = "<none>"
"""In a table, what is not there: an empty cell would shift what stands behind it for `awk`."""

_MINUTE: Final = 60
_HOUR: Final = 60 * _MINUTE
_DAY: Final = 24 * _HOUR

_TWO_UNITS_BELOW: Final = 10
"""Below ten of a unit the next smaller one still matters: "3m20s", but "15m"."""

_MARKS: Final = frozenset({"Mn", "Me"})
"""Categories: marks without a column of their own."""

_WIDE: Final = frozenset({"W", "F"})

_FROM_RIGHT_TO_LEFT: Final = frozenset({"R", "AL", "AN"})
"""Classes of UAX #9."""

_KILO: Final = 1000
_ONE_DIGIT_BELOW: Final = 10


def printable(text: str) -> str:
    """Return `text` in one line, whatever is in it: what is not printable is escaped.

    Control characters of a terminal, line feeds, spaces other than the ordinary one, and what turns
    the direction of writing, as Python spells them ("\\x1b", "\\u202e"). Letters that are written
    from right to left do that, too: terminals would show the cells behind them in another order.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(each if _stands(each) else _escaped(each) for each in text)


def printable_lines(text: str) -> str:
    """Return `text` with its line feeds, and with nothing else that is not printable."""
    return "\n".join(map(printable, text.split("\n")))


def columns_of(text: str) -> int:
    """Return how many columns of a terminal a printable text takes (UAX #11).

    Wide characters of East Asia take two, marks that stand over the one before them none.
    """
    if text.isascii():
        return len(text)
    return sum(map(_columns, text))


def _columns(character: str) -> int:
    if unicodedata.category(character) in _MARKS:
        return 0
    return 2 if unicodedata.east_asian_width(character) in _WIDE else 1


def _stands(character: str) -> bool:
    return (
        character.isprintable() and unicodedata.bidirectional(character) not in _FROM_RIGHT_TO_LEFT
    )


def _escaped(character: str) -> str:
    # A lone surrogate cannot be written at all.
    return character.encode("unicode_escape").decode("ascii")


def duration(seconds: float) -> str:
    """Return a short duration for people: 45s, 3m20s, 15m, 4h10m, 2d3h, 40d."""
    whole = max(0, int(seconds))
    for length, unit, smaller, small_unit in (
        (_DAY, "d", _HOUR, "h"),
        (_HOUR, "h", _MINUTE, "m"),
        (_MINUTE, "m", 1, "s"),
    ):
        if whole >= length:
            rest = whole % length // smaller
            if whole // length < _TWO_UNITS_BELOW and rest:
                return f"{whole // length}{unit}{rest}{small_unit}"
            return f"{whole // length}{unit}"
    return f"{whole}s"


def moment(when: datetime | None, zone: tzinfo | None = None) -> str:
    """Return RFC 3339 with the offset of `zone`, to the second; None is the machine's zone."""
    if when is None:
        return NONE
    return when.astimezone(zone).replace(microsecond=0).isoformat(sep="T")


def size(count: float) -> str:
    """Return a number of bytes: "812 B", "1.2 kB", "34 MB". A kilobyte has 1,000 bytes (SI)."""
    amount, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        # What would be rounded to 1000 is said in the next unit.
        if round(amount) < _KILO:
            break
        amount, unit = amount / _KILO, larger
    if unit != "B" and round(amount, 1) < _ONE_DIGIT_BELOW:
        return f"{amount:.1f} {unit}"
    return f"{amount:.0f} {unit}"


def many(number: int, what: str, several: str = "") -> str:
    """Return "1 error", "2 errors"; `several` is the plural where an s does not make it."""
    return f"{number} {what if number == 1 else several or f'{what}s'}"


def wrapped(text: str, indent: int = 0, first: str = "", width: int = WIDTH) -> list[str]:
    """Return `text` in lines of `width` columns; names and paths stay whole."""
    return textwrap.wrap(
        text,
        width,
        initial_indent=first or " " * indent,
        subsequent_indent=" " * (indent if first else indent + 2),
        break_long_words=False,
        break_on_hyphens=False,
    )
