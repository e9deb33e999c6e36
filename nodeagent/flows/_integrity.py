"""Whether the file still holds what was written: a mark on each row, and a look at all of them.

This module owns the marks. It promises that a row of which any part has changed on the disk (a name
or a time by which the plaintext report judges) is found, and so is one that is gone: SQLite itself
looks after the shape of a file (PRAGMA quick_check), not after what is in it. It may not change
anything. Numbers of connections and bytes carry no mark: no verdict rests on them.

Numbers are marked in SQL, so that a row that is updated where it lies is marked anew there, and
half a million of them are looked at in a tenth of a second.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Iterable
from typing import Final

__all__ = ["damage", "of_numbers", "of_texts"]

_MODULUS: Final = 4_294_967_291
"""The greatest prime of 32 bits."""

_FACTORS: Final = (486_187_739, 265_443_577, 224_682_251, 326_648_991, 374_761_393)
"""One for each place, so that numbers cannot change places; products of times and these fit 64
bits."""


def of_numbers(*columns: str) -> str:
    """Return the SQL of the mark of these columns or other expressions.

    Raises ValueError for more than there are factors: the last would go unmarked.
    """
    factors = _FACTORS[: len(columns)]
    terms = (f"({each}) % {_MODULUS} * {by}" for each, by in zip(columns, factors, strict=True))
    return f"(({' + '.join(terms)}) % {_MODULUS})"


def of_texts(values: Iterable[str | int]) -> int:
    """Return the mark of a row's values."""
    return zlib.crc32("\0".join(map(str, values)).encode("utf-8", "surrogatepass"))


_WRONG: Final = {
    "a sum": f"""
        SELECT 1 FROM hourly WHERE mark IS NOT {of_numbers("hour", "flow", "first", "last")}
        OR hour IS NOT last / ?1 LIMIT 1
    """,  # noqa: S608 - our own names, as below
    "a sum's flow": """
        SELECT 1 FROM hourly LEFT JOIN flow ON flow.id = hourly.flow WHERE flow.id IS NULL LIMIT 1
    """,
    "a span": f"""
        SELECT 1 FROM span
        WHERE mark IS NOT {of_numbers("process", "number", "begin", "until", "ended")} LIMIT 1
    """,  # noqa: S608 - as above
}
"""What is not as it was written, and a row where that is so; ?1 are the seconds of a sum."""


def damage(connection: sqlite3.Connection, columns: str, hour: int) -> str:
    """Return what is wrong with the file, "" if nothing is found.

    `columns` are the key of a flow, `hour` the seconds of a sum. May raise sqlite3.Error.
    """
    found: str = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        return found
    for what, query in _WRONG.items():
        if connection.execute(query, (hour,) if "?" in query else ()).fetchone() is not None:
            return f"{what} is not as it was written"
    for what, query in {
        "a flow": f"SELECT mark, {columns} FROM flow",  # noqa: S608 - our own names
        "who is watched": "SELECT mark, workload, pod, begin FROM watched",
    }.items():
        for mark, *values in connection.execute(query):
            if mark != of_texts(values):
                return f"{what} is not as it was written"
    return ""
