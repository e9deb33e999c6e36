"""What can be wrong with the file of recorded flows, as our own errors.

This module owns the translation of SQLite's errors and the system's. It promises that a full disk,
a file that is no good and a file that cannot be used now are told apart, and that each message says
which file, why, and what to do. It may not act on any of them.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Final

__all__ = ["DamagedError", "StoreError", "UnusableError", "told"]

_PRIMARY: Final = 0xFF
"""Of an extended result code (sqlite.org/rescode.html)."""
_NOT_OURS: Final = frozenset(
    {
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        # Our own questions are in order: it is the tables, or what is in them, that are others.
        sqlite3.SQLITE_ERROR,
        sqlite3.SQLITE_CONSTRAINT,
        sqlite3.SQLITE_MISMATCH,
    }
)


class StoreError(Exception):
    """The file cannot be used now; the message says why, and what to do."""


class DamagedError(StoreError):
    """What is there cannot be read, now or later."""


class UnusableError(Exception):
    """What lies there is no file of recorded flows, or no longer; the message ends "PATH …"."""


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Turn errors of SQLite and of the system into ours."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", _without_code(error)) & _PRIMARY
        if code in _NOT_OURS:
            raise UnusableError(f"is damaged: {error}") from None
        if code == sqlite3.SQLITE_FULL:
            raise StoreError(
                f"{path}: no room: the disk is full, or flows.max_megabytes is too small"
            ) from error
        raise StoreError(f"{path}: {error}") from error
    except UnicodeDecodeError:
        # Of a name, or of a message that has one in it.
        raise UnusableError("is damaged: it holds what is no text") from None
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror or error}") from error


def _without_code(error: sqlite3.Error) -> int:
    """Return the code of an error that Python's module raises by itself.

    It raises OperationalError for text that is none, others for what is asked wrongly.
    """
    ours = not isinstance(error, sqlite3.OperationalError)
    return sqlite3.SQLITE_MISUSE if ours else sqlite3.SQLITE_CORRUPT
