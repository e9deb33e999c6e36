"""The section `traces` of the settings: where spans go, and of how many connections there are any.

This module owns the section's fields and what each may be. It promises that what it returns can be
used, or that the mistake is told with its place. It may not open anything; docs/traces.md says what
a trace of a connection is.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Final

import msgspec

from nodeagent.api import Check, values
from ztunnel.protocol import Receiver, TraceSettings

__all__ = ["Section", "endpoint", "resolve"]

MAX_PATH: Final = 200
"""Characters: a prefix behind which a gateway keeps its receivers."""

MAX_ONE_IN: Final = 1_000_000
"""Connections, of which one is traced: fewer would be none on any node."""

MAX_NAME: Final = 253
"""Characters of a host name (RFC 1035, 2.3.4)."""

_ENDPOINT: Final = re.compile(
    r"(https?)://(?:\[([0-9a-f:.]+)\]|([A-Za-z0-9.-]+)):([1-9][0-9]{0,4})"
    r"((?:/[A-Za-z0-9._~-]+)*)/?"
)
_LABEL: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
"""Of a host name (RFC 1123, 2.1)."""


def _endpoint(value: str) -> Receiver:
    found = _ENDPOINT.fullmatch(value)
    if found is not None and len(found[5]) <= MAX_PATH:
        try:
            host = str(ipaddress.ip_address(found[2])) if found[2] else _host(found[3].lower())
            return Receiver(host, values.port(int(found[4])), found[5], found[1] == "https")
        except ValueError:
            pass
    raise ValueError(
        f"{value!r} is no receiver of OTLP/HTTP: write http://HOST:PORT or https://HOST:PORT, "
        "HOST a name or an address, IPv6 in brackets"
    )


def _host(text: str) -> str:
    """Return a name or an IPv4 address. Raises ValueError."""
    labels = text.split(".")
    if labels[-1].isdigit():  # no name ends so (RFC 3696, 2)
        return str(ipaddress.IPv4Address(text))
    if len(text) > MAX_NAME or not all(map(_LABEL.fullmatch, labels)):
        raise ValueError("no host name")
    return text


def endpoint(receiver: Receiver) -> str:
    """Return a receiver as the file spells it."""
    host = f"[{receiver.address}]" if ":" in receiver.address else receiver.address
    return f"http{'s' if receiver.tls else ''}://{host}:{receiver.port}{receiver.path}"


def _file(value: str) -> str:
    if not value.startswith("/"):
        raise ValueError(f"{value!r} is no absolute path of a file")
    return value


def _one_in(value: int) -> int:
    if not 0 <= value <= MAX_ONE_IN:
        raise ValueError(f"{value} is not between 0 (none) and {MAX_ONE_IN}")
    return value


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """The fields as the file spells them."""

    endpoint: Annotated[str, Check(_endpoint)] | None = None
    ca_file: Annotated[str, Check(_file)] | None = None
    sample_one_in: Annotated[int, Check(_one_in)] | None = None


def resolve(section: Section | None) -> TraceSettings:
    """Return what is in force: the section's, and the defaults of what it leaves out."""
    if section is None:
        return TraceSettings()
    given = msgspec.structs.asdict(section)
    return TraceSettings(**{name: value for name, value in given.items() if value is not None})
