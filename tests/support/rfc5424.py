"""A strict reader of syslog messages, written from the ABNF of RFC 5424 (6) and nothing else.

Owns the grammar for tests: what it does not allow is an error, however readable it is.
"""

from __future__ import annotations

import datetime as dt
import re
from typing import Final, NamedTuple

__all__ = ["Message", "parse", "unframe"]

BOM: Final = b"\xef\xbb\xbf"

PRINTUSASCII: Final = rb"[\x21-\x7e]"
SD_NAME: Final = rb"[\x21\x23-\x3c\x3e-\x5c\x5e-\x7e]{1,32}"
"""1*32PRINTUSASCII but '=', SP, ']' and '"'."""

HEADER: Final = re.compile(
    rb"<(?P<pri>0|[1-9][0-9]{0,2})>"
    rb"(?P<version>[1-9][0-9]{0,2}) "
    rb"(?P<timestamp>-|[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}"
    rb"(?:\.[0-9]{1,6})?(?:Z|[+-][0-9]{2}:[0-9]{2})) "
    rb"(?P<hostname>-|" + PRINTUSASCII + rb"{1,255}) "
    rb"(?P<app>-|" + PRINTUSASCII + rb"{1,48}) "
    rb"(?P<process>-|" + PRINTUSASCII + rb"{1,128}) "
    rb"(?P<what>-|" + PRINTUSASCII + rb"{1,32}) "
)
NAME: Final = re.compile(SD_NAME)
VALUE: Final = re.compile(rb'(?:[^"\\\]]|\\["\\\]])*')
"""In PARAM-VALUE '"', '\\' and ']' MUST be escaped (6.3.3); a backslash before anything else is one
that was not."""

MAX_PRIORITY: Final = 191


class Message(NamedTuple):
    facility: int
    severity: int
    time: dt.datetime
    hostname: str
    app: str
    process: str
    what: str
    elements: dict[str, list[tuple[str, str]]]
    text: str


def parse(data: bytes) -> Message:
    """Return the message. Raises ValueError at the first octet that the grammar does not allow."""
    head = HEADER.match(data)
    if head is None:
        raise ValueError(f"no header: {data!r}")
    priority = int(head["pri"])
    if priority > MAX_PRIORITY or head["version"] != b"1":
        raise ValueError(f"no such priority or version: {data!r}")
    elements, rest = _structured(data[head.end() :])
    if rest[:1] not in (b"", b" "):
        raise ValueError(f"neither an end nor a message behind the structured data: {rest!r}")
    text = rest[1:]
    # MSG-UTF8 begins with a byte order mark; without one it is MSG-ANY, and read here as ASCII.
    said = text[len(BOM) :].decode("utf-8") if text.startswith(BOM) else text.decode("ascii")
    facility, severity = divmod(priority, 8)
    return Message(
        facility=facility,
        severity=severity,
        time=dt.datetime.fromisoformat(head["timestamp"].decode()),
        hostname=head["hostname"].decode(),
        app=head["app"].decode(),
        process=head["process"].decode(),
        what=head["what"].decode(),
        elements=elements,
        text=said,
    )


def _structured(data: bytes) -> tuple[dict[str, list[tuple[str, str]]], bytes]:
    if data[:1] == b"-":
        return {}, data[1:]
    elements: dict[str, list[tuple[str, str]]] = {}
    while data[:1] == b"[":
        name, data = _name(data[1:])
        if name in elements:
            raise ValueError(f"SD-ID {name!r} is there twice (6.3.2)")
        found = elements[name] = []
        while data[:1] == b" ":
            key, data = _name(data[1:])
            data = _expect(data, b'="')
            value = VALUE.match(data)
            assert value is not None
            found.append((key, re.sub(rb'\\(["\\\]])', rb"\1", value[0]).decode("utf-8")))
            data = _expect(data[value.end() :], b'"')
        data = _expect(data, b"]")
    if not elements:
        raise ValueError(f"neither '-' nor an element: {data!r}")
    return elements, data


def _name(data: bytes) -> tuple[str, bytes]:
    found = NAME.match(data)
    if found is None:
        raise ValueError(f"no SD-NAME: {data!r}")
    return found[0].decode("ascii"), data[found.end() :]


def _expect(data: bytes, wanted: bytes) -> bytes:
    if not data.startswith(wanted):
        raise ValueError(f"no {wanted!r}: {data!r}")
    return data[len(wanted) :]


def unframe(stream: bytes) -> tuple[list[bytes], bytes]:
    """Return the whole messages of a stream with octet counting (RFC 6587, 3.4.1), and the rest."""
    messages: list[bytes] = []
    while found := re.match(rb"([1-9][0-9]*) ", stream):
        end = found.end() + int(found[1])
        if len(stream) < end:
            break
        messages.append(stream[found.end() : end])
        stream = stream[end:]
    return messages, stream
