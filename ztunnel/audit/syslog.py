"""Audit lines as syslog messages: RFC 5424, and RFC 6587 for streams.

This module owns the message's head, its structured data and the framing. It promises that a
message is what the grammar of RFC 5424 allows, whatever the values are, and that it is printable
ASCII: so MSG is the grammar's MSG-ANY, and needs no byte order mark, which would spoil JSON in it.
It is pure.

The structured data is one element, `audit@32473`. 32473 is the enterprise number that RFC 5612
keeps for examples: this software has none of its own. The parameters are the fields of `forms`; one
of several values is there several times (RFC 5424, 6.3.3).
"""

from __future__ import annotations

from typing import Final

from ztunnel.audit.entry import Entry
from ztunnel.audit.forms import Line, fields, severity, timestamp
from ztunnel.settings import Facility

__all__ = ["APP_NAME", "SD_ID", "framed", "spell"]

APP_NAME: Final = "ztunnel"
SD_ID: Final = "audit@32473"

FACILITIES: Final[dict[Facility, int]] = {
    Facility.USER: 1,
    Facility.DAEMON: 3,
    Facility.AUTH: 4,
    Facility.AUTHPRIV: 10,
    Facility.AUDIT: 13,
    Facility.LOCAL0: 16,
    Facility.LOCAL1: 17,
    Facility.LOCAL2: 18,
    Facility.LOCAL3: 19,
    Facility.LOCAL4: 20,
    Facility.LOCAL5: 21,
    Facility.LOCAL6: 22,
    Facility.LOCAL7: 23,
}
"""RFC 5424, table 1."""

_SEVERITIES: Final = 8

_NIL: Final = "-"


def spell(line: Line, text: str, facility: Facility, host: str, process: int) -> bytes:
    """Return the message of `line`; `text` is its MSG, of printable ASCII."""
    priority = FACILITIES[facility] * _SEVERITIES + severity(line)
    what = line.event.value if isinstance(line, Entry) else "left_out"
    head = f"<{priority}>1 {timestamp(line.time)} {host or _NIL} {APP_NAME} {process} {what}"
    return f"{head} {_structured(line)} {text}".encode("ascii")


def _structured(line: Line) -> str:
    found = [SD_ID]
    for key, value in fields(line):
        values = value if isinstance(value, tuple) else (str(value),)
        found += [f'{key}="{_escaped(each)}"' for each in values]
    return f"[{' '.join(found)}]"


def _escaped(value: str) -> str:
    """Return a PARAM-VALUE: RFC 5424 wants `"`, `\\` and `]` escaped (6.3.3).

    What is not printable ASCII is written as Python's repr does, before that.
    """
    plain = value if value.isascii() and value.isprintable() else ascii(value)[1:-1]
    return plain.replace("\\", "\\\\").replace('"', '\\"').replace("]", "\\]")


def framed(message: bytes) -> bytes:
    """Return `message` as a stream carries it: counted (RFC 6587, 3.4.1)."""
    return b"%d %s" % (len(message), message)
