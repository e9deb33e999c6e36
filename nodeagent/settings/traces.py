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

_ENDPOINT: Final = re.compile(
    r"http://(?:\[([0-9a-f:.]+)\]|([0-9.]+)):([1-9][0-9]{0,4})((?:/[A-Za-z0-9._~-]+)*)/?"
)


def _endpoint(value: str) -> Receiver:
    found = _ENDPOINT.fullmatch(value)
    if found is not None and len(found[4]) <= MAX_PATH:
        try:
            host = ipaddress.ip_address(found[1] or found[2])
            port = values.port(int(found[3]))
        except ValueError:
            pass
        else:
            return Receiver(str(host), port, found[4])
    raise ValueError(
        f"{value!r} is no receiver of OTLP/HTTP: write http://ADDRESS:PORT, IPv6 in brackets; "
        "names are not resolved, and https is for a collector on this machine to speak"
    )


def endpoint(receiver: Receiver) -> str:
    """Return a receiver as the file spells it."""
    host = f"[{receiver.address}]" if ":" in receiver.address else receiver.address
    return f"http://{host}:{receiver.port}{receiver.path}"


def _one_in(value: int) -> int:
    if not 0 <= value <= MAX_ONE_IN:
        raise ValueError(f"{value} is not between 0 (none) and {MAX_ONE_IN}")
    return value


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """The fields as the file spells them."""

    endpoint: Annotated[str, Check(_endpoint)] | None = None
    sample_one_in: Annotated[int, Check(_one_in)] | None = None


def resolve(section: Section | None) -> TraceSettings:
    """Return what is in force: the section's, and the defaults of what it leaves out."""
    if section is None:
        return TraceSettings()
    given = msgspec.structs.asdict(section)
    return TraceSettings(**{name: value for name, value in given.items() if value is not None})
