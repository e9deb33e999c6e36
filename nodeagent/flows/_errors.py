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
_NOT_OURS: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


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
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & _PRIMARY
        if code in _NOT_OURS:
            raise UnusableError(f"is damaged: {error}") from None
        if code == sqlite3.SQLITE_FULL:
            raise StoreError(
                f"{path}: no room: the disk is full, or flows.max_megabytes is too small"
            ) from error
        raise StoreError(f"{path}: {error}") from error
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror or error}") from error
