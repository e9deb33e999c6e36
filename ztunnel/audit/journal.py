"""Audit lines as entries of systemd's journal, by its native protocol.

This module owns the datagram's form and the names of its fields. It promises that no value forges a
field: one that holds a line feed is sent with its length in front. It is pure.

Fields are those of `forms` in capitals behind AUDIT_, dots as underscores (`src.addr` is
AUDIT_SRC_ADDR), beside the journal's own: MESSAGE, PRIORITY, SYSLOG_FACILITY, SYSLOG_IDENTIFIER.
One of several values is there several times, as the journal allows.

Source: systemd, JOURNAL_NATIVE_PROTOCOL; systemd.journal-fields(7).
"""

from __future__ import annotations

import struct
from typing import Final

from ztunnel.audit.forms import Line, fields, message, severity, timestamp
from ztunnel.audit.syslog import APP_NAME, FACILITIES
from ztunnel.settings import Facility

__all__ = ["spell"]

_LENGTH: Final = struct.Struct("<Q")


def spell(line: Line, facility: Facility) -> bytes:
    own = [
        ("MESSAGE", message(line)),
        ("PRIORITY", str(int(severity(line)))),
        ("SYSLOG_FACILITY", str(FACILITIES[facility])),
        ("SYSLOG_IDENTIFIER", APP_NAME),
        ("AUDIT_TIME", timestamp(line.time)),
    ]
    for key, value in fields(line):
        name = f"AUDIT_{key.upper().replace('.', '_').removeprefix('AUDIT_')}"
        values = value if isinstance(value, tuple) else (str(value),)
        own += [(name, each) for each in values]
    return b"".join(_field(name, value.encode("utf-8", "replace")) for name, value in own)


def _field(name: str, value: bytes) -> bytes:
    if b"\n" in value:
        return b"%s\n%s%s\n" % (name.encode(), _LENGTH.pack(len(value)), value)
    return b"%s=%s\n" % (name.encode(), value)
