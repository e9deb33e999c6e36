"""Tables for people: columns side by side in a given width, folded where they do not fit. Pure.

This module owns the layout. It promises that no line is wider than asked while there is anything
left to fold, that nothing is cut off, that a cell holds no control character of a terminal, and
that a table of 15,000 rows takes well under a second. Colour is a `Tone`, and whoever prints
decides what becomes of it; what a tone means, the words of the cell say too.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from nodeagent.cli.text import NONE, columns_of, printable

__all__ = ["Cell", "Column", "Segment", "Tone", "layout"]

GAP: Final = 2
"""Spaces between two columns: with one, two words of neighbours read as one cell. So there is one
only where that spares the table from being folded."""

NARROWEST: Final = 8
"""Columns to which a cell is folded at most: below, nobody can read it."""

_BREAKS: Final = (" ,/", "-")
"""A long cell is folded behind one of these, if one is near; sooner between names than in one."""


class Tone(enum.Enum):
    """What a reader should feel. Never the only bearer of a meaning."""

    PLAIN = ""
    GOOD = "green"
    CAREFUL = "yellow"
    BAD = "red"
    FAINT = "bright_black"


class Cell(NamedTuple):
    text: str
    tone: Tone = Tone.PLAIN


class Column(NamedTuple):
    """`right` aligns numbers. `folds`: this column gives way where there is no room."""

    heading: str
    right: bool = False
    folds: bool = True


class Segment(NamedTuple):
    """A piece of a line in one tone."""

    text: str
    tone: Tone


def layout(
    columns: Sequence[Column], rows: Iterable[Sequence[Cell | str]], width: int | None
) -> Iterator[list[Segment]]:
    """Yield the lines of the table, headings first; `width` None folds nothing.

    Every row has a cell for each column; an empty one is shown as `<none>`.
    """
    made = [[Cell(column.heading) for column in columns]]
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"{len(row)} cells in a table of {len(columns)} columns")
        made.append([_cell(each) for each in row])
    widths = [max(columns_of(row[at].text) for row in made) for at in range(len(columns))]
    gap = GAP
    if width is not None and sum(widths) + GAP * (len(widths) - 1) > width:
        if sum(widths) + len(widths) - 1 <= width:
            gap = 1
        else:
            narrowest = [columns_of(column.heading) for column in columns]
            _shrink(widths, narrowest, columns, width)
    for row in made:
        yield from _lines(row, columns, widths, gap)


def _cell(given: Cell | str) -> Cell:
    cell = Cell(given) if isinstance(given, str) else given
    return cell._replace(text=printable(cell.text) or NONE)


def _shrink(
    widths: list[int], headings: Sequence[int], columns: Sequence[Column], width: int
) -> None:
    """Take what is too much from the widest column that folds, again and again."""
    excess = sum(widths) + GAP * (len(widths) - 1) - width
    while excess > 0:
        able = [
            (widths[at], at)
            for at, column in enumerate(columns)
            if column.folds and widths[at] > max(NARROWEST, headings[at])
        ]
        if not able:
            return
        able.sort()
        most, at = able[-1]
        # Down to the second widest, so that the two then take turns.
        second = able[-2][0] if len(able) > 1 else 0
        lowest = max(NARROWEST, headings[at])
        step = min(excess, max(1, most - max(second, lowest)))
        widths[at] -= step
        excess -= step


def _lines(
    row: Sequence[Cell], columns: Sequence[Column], widths: Sequence[int], gap: int
) -> Iterator[list[Segment]]:
    if all(columns_of(cell.text) <= width for cell, width in zip(row, widths, strict=True)):
        yield _line(row, columns, widths, gap)
        return
    folded = [_fold(cell.text, width) for cell, width in zip(row, widths, strict=True)]
    for number in range(max(map(len, folded))):
        pieces = [
            cell._replace(text=parts[number] if number < len(parts) else "")
            for cell, parts in zip(row, folded, strict=True)
        ]
        yield _line(pieces, columns, widths, gap)


def _line(
    row: Sequence[Cell], columns: Sequence[Column], widths: Sequence[int], gap: int
) -> list[Segment]:
    segments: list[Segment] = []
    before = ""
    for cell, column, width in zip(row, columns, widths, strict=True):
        missing = " " * (width - columns_of(cell.text))
        left, right = (missing, "") if column.right else ("", missing)
        if cell.text:
            segments.append(Segment(before + left, Tone.PLAIN))
            segments.append(Segment(cell.text, cell.tone))
            before = right + " " * gap
        else:
            before += left + right + " " * gap
    return segments


def _fold(text: str, width: int) -> list[str]:
    parts = []
    start = 0
    while (end := _fitting(text, start, width)) < len(text):
        for marks in _BREAKS:
            near = max(text.rfind(mark, (start + end) // 2, end) for mark in marks)
            if near >= 0:
                end = near + 1
                break
        parts.append(text[start:end].rstrip(" "))
        start = end
    return [*parts, text[start:]]


def _fitting(text: str, start: int, width: int) -> int:
    """Return where the longest piece of `text` from `start` on ends that has `width` columns."""
    if text.isascii():
        return min(start + width, len(text))
    taken = 0
    for end in range(start, len(text)):
        taken += columns_of(text[end])
        if taken > width:
            return end
    return len(text)
