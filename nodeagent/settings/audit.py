"""The section `audit` of the settings: where the audit log goes, and how much of it.

This module owns the section's fields and what each may be. It promises that what it returns is
complete (a field that is left out has the tunnel's default) and can be used, or that the mistake is
told with its place. It may not open anything; docs/operations.md says what the audit log is.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import PurePosixPath
from typing import Annotated, Final

import msgspec

from nodeagent.api import Check, values
from ztunnel.protocol import AuditForm, AuditSettings, Authorized, Facility, Syslog, Transport

__all__ = ["Section", "receiver", "resolve"]

MAX_RATE: Final = 100_000
"""Lines of one kind in a second; no disk takes more."""

MAX_SOCKET_PATH: Final = 107
"""Bytes of a unix socket's path (sun_path of unix(7), with its final NUL)."""

_REMOTE: Final = re.compile(r"(udp|tcp)://(?:\[([0-9a-f:.]+)\]|([0-9.]+)):([1-9][0-9]{0,4})")


def _rate(value: int) -> int:
    if not 0 <= value <= MAX_RATE:
        raise ValueError(f"{value} is not between 0 (no limit) and {MAX_RATE}")
    return value


def _file(value: str) -> str:
    path = PurePosixPath(values.text(value))
    if not path.is_absolute() or ".." in path.parts or value.endswith("/"):
        raise ValueError(f"{value!r} is no file: write an absolute path without '..' parts")
    return str(path)


def _socket(value: str) -> str:
    path = _file(value)
    if len(path.encode()) > MAX_SOCKET_PATH:
        raise ValueError(f"a socket's path is longer than {MAX_SOCKET_PATH} bytes")
    return path


def _syslog(value: str) -> Syslog:
    if value.startswith("/"):
        return Syslog(Transport.UNIX, _socket(value))
    found = _REMOTE.fullmatch(value)
    if found is not None:
        try:
            host = ipaddress.ip_address(found[2] or found[3])
            port = values.port(int(found[4]))
        except ValueError:
            pass
        else:
            return Syslog(Transport(found[1]), str(host), port)
    raise ValueError(
        f"{value!r} is no syslog receiver: write the path of a socket, udp://ADDRESS:PORT or "
        "tcp://ADDRESS:PORT, IPv6 in brackets; names are not resolved"
    )


def receiver(found: Syslog) -> str:
    """Return a receiver as the file spells it."""
    if found.transport is Transport.UNIX:
        return found.address
    host = f"[{found.address}]" if ":" in found.address else found.address
    return f"{found.transport.value}://{host}:{found.port}"


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """The fields as the file spells them."""

    authorized: Authorized | None = None
    lines_per_second: Annotated[int, Check(_rate)] | None = None
    form: AuditForm | None = None
    stdout: bool | None = None
    file: Annotated[str, Check(_file)] | None = None
    journal: Annotated[str, Check(_socket)] | None = None
    syslog: Annotated[str, Check(_syslog)] | None = None
    facility: Facility | None = None


def resolve(section: Section | None) -> AuditSettings:
    """Return the settings in force: the section's, and the defaults of those it leaves out."""
    if section is None:
        return AuditSettings()
    given = msgspec.structs.asdict(section)
    return AuditSettings(**{name: value for name, value in given.items() if value is not None})
