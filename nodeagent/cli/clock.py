"""The time, as every command has it.

This module owns the one place at which a command asks for the time, so that whoever must know what
it says at a given moment can set it. It may not do anything else.
"""

from __future__ import annotations

from datetime import UTC, datetime

__all__ = ["now"]


def now() -> datetime:
    """Return the time, aware, in UTC."""
    return datetime.now(UTC)
