"""rtnetlink(7): dumps and changes of the calling thread's namespace.

This module owns the sockets that speak with the kernel's routing and traffic control. It promises
that a dump which something changed meanwhile is read again, that many changes go in one system
call, and that each change's outcome is reported in the kernel's own words. It may not know what the
messages mean. All of it blocks.

pyroute2's message classes encode and decode. Its own sockets are left out: each runs an event loop,
which took longer than all the work in the kernel; so are its decodings of what is the same in every
pod, which callers keep by the bytes (`dump` returns equal bytes for equal things).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self

from pyroute2.netlink import nlmsg

__all__ = [
    "ACK",
    "CREATE",
    "DUMP",
    "EXCLUSIVE",
    "Attributes",
    "Outcome",
    "Rtnetlink",
    "Selection",
    "Template",
    "decode",
    "encode",
    "get",
]

REQUEST: Final = 0x1
ACK: Final = 0x4
DUMP: Final = 0x300
EXCLUSIVE: Final = 0x200
CREATE: Final = 0x400
"""Flags of a request (linux/netlink.h)."""

_DUMP_INTERRUPTED: Final = 0x10
_ACK_TLVS: Final = 0x200
_ERROR_KIND: Final = 2
_DONE_KIND: Final = 3
_ERROR_TEXT: Final = 1

_SOL_NETLINK: Final = 270
_CAP_ACK: Final = 10
_EXT_ACK: Final = 11
_STRICT: Final = 12
"""NETLINK_GET_STRICT_CHK, since Linux 4.20: the kernel itself leaves out what was not asked for."""

MOST_MESSAGES: Final = 64
"""Messages of one send: their acknowledgements fit the smallest default receive buffer."""

RECEIVE_SIZE: Final = 64 * 1024
"""Bytes of one receive: the kernel fills at most 32 KiB of a dump into one datagram."""

DUMP_TRIES: Final = 8
"""Dumps begun again because something changed meanwhile; then what was read last is taken."""

TIMEOUT: Final = 10.0
"""Seconds. The kernel answers within the send; this only bounds what should never happen."""

_HEADER: Final = struct.Struct("=IHHII")
_ATTRIBUTE: Final = struct.Struct("=HH")
_LENGTH: Final = struct.Struct("=I")
_CODE: Final = struct.Struct("=i")
_SEQUENCE: Final = struct.Struct("=II")
_SEQUENCE_OFFSET: Final = 8
_ERROR_BODY: Final = 20
"""Bytes of struct nlmsgerr: the code and, with NETLINK_CAP_ACK, the request's bare header."""

_KIND_MASK: Final = 0x3FFF
"""Without NLA_F_NESTED and NLA_F_NET_BYTEORDER."""

Attributes = Sequence[tuple[str, Any]]
"""By pyroute2's names, with values as it takes them."""

Outcome = tuple[int, str]
"""errno of one change, 0 for success, and the kernel's explanation, often empty."""


def encode(
    form: type[nlmsg], kind: int, flags: int, fields: Mapping[str, int], attributes: Attributes = ()
) -> bytes:
    """Return a request; its sequence number is set when it is sent."""
    message = form()
    for name, value in fields.items():
        message[name] = value
    message["attrs"] = list(attributes)
    message["header"]["type"] = kind
    message["header"]["flags"] = REQUEST | flags
    message.encode()
    return bytes(message.data)


class Template:
    """A request that is encoded once, and then filled in for each use."""

    def __init__(self, request: bytes, *holes: bytes) -> None:
        """`holes` stand in `request`, once each, where `fill` puts other bytes. Raises ValueError
        if one does not.
        """
        places = [(request.find(hole), len(hole)) for hole in holes]
        if any(request.count(hole) != 1 for hole in holes):
            raise ValueError("a hole is not in the request once")
        self._request = request
        self._places = tuple(places)

    def fill(self, *values: bytes) -> bytes:
        """Return the request with `values` in the holes, in their order and of their sizes."""
        made = bytearray(self._request)
        for (start, size), value in zip(self._places, values, strict=True):
            if len(value) != size:
                raise ValueError(f"{len(value)} bytes for a hole of {size}")
            made[start : start + size] = value
        return bytes(made)


class Selection:
    """Takes what nobody asks for out of a message, before pyroute2 decodes it.

    An attribute takes pyroute2 longer to decode than the kernel to make; and what is left is the
    same more often, so that callers know it by its bytes.
    """

    def __init__(self, form: type[nlmsg], names: Sequence[str]) -> None:
        """`names` are pyroute2's, of attributes of `form`. Raises ValueError for an unknown one."""
        known = {entry[-2]: number for number, entry in enumerate(form.nla_map)}
        missing = [name for name in names if name not in known]
        if missing:
            raise ValueError(f"{form.__name__} has no {', '.join(missing)}")
        self._kinds = frozenset(known[name] for name in names)
        self._start = _HEADER.size + struct.calcsize(
            "=" + "".join(entry[1] for entry in form.fields)
        )

    def of(self, data: bytes) -> bytes:
        """Return the message with the chosen attributes only. Raises OSError if it is malformed."""
        parts = [data[: self._start]]
        offset, end = self._start, len(data)
        while offset + _ATTRIBUTE.size <= end:
            length, kind = _ATTRIBUTE.unpack_from(data, offset)
            if length < _ATTRIBUTE.size:
                raise OSError(errno.EBADMSG, "netlink: malformed attribute")
            following = offset + ((length + 3) & ~3)
            if kind & _KIND_MASK in self._kinds:
                parts.append(data[offset:following])
            offset = following
        made = bytearray(b"".join(parts))
        _LENGTH.pack_into(made, 0, len(made))
        return bytes(made)


def decode(form: type[nlmsg], data: bytes) -> Any:  # noqa: ANN401 - pyroute2 is untyped
    """Return what `Rtnetlink.dump` has read, as pyroute2 understands it."""
    message = form(data)
    message.decode()
    return message


def get(message: Any, name: str) -> int:  # noqa: ANN401 - as above
    """Return a number among the attributes, 0 if it is not there."""
    value: int | None = message.get_attr(name)
    return value or 0


def _attributes(data: bytes, offset: int) -> dict[int, bytes]:
    """Return the attributes of an acknowledgement by kind: pyroute2 has no class for them."""
    found: dict[int, bytes] = {}
    while offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < _ATTRIBUTE.size:
            break
        found[kind & _KIND_MASK] = data[offset + _ATTRIBUTE.size : offset + length]
        offset += (length + 3) & ~3
    return found


class Rtnetlink:
    """A socket in the namespace of the thread that makes it. Close it, or use it as a context."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._sequence = 0
        try:
            self._socket.settimeout(TIMEOUT)
            for option in (_CAP_ACK, _EXT_ACK, _STRICT):
                self._socket.setsockopt(_SOL_NETLINK, option, 1)
            self._socket.bind((0, 0))
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def dump(self, request: bytes) -> list[bytes]:
        """Return the messages that answer a dump request (`encode`). Raises OSError."""
        found, interrupted = self._dump(request)
        tries = 1
        while interrupted and tries < DUMP_TRIES:
            found, interrupted = self._dump(request)
            tries += 1
        return found

    def _dump(self, request: bytes) -> tuple[list[bytes], bool]:
        self._sequence += 1
        sent = bytearray(request)
        _SEQUENCE.pack_into(sent, _SEQUENCE_OFFSET, self._sequence, 0)
        self._socket.send(sent)
        found: list[bytes] = []
        interrupted = False
        for answer, flags, sequence, payload in self._messages():
            if sequence != self._sequence:
                continue
            interrupted |= bool(flags & _DUMP_INTERRUPTED)
            if answer in (_DONE_KIND, _ERROR_KIND):
                code = -_CODE.unpack_from(payload)[0] if len(payload) >= _CODE.size else 0
                if code:
                    raise OSError(code, f"netlink dump: {os.strerror(code)}")
                break
            # Without flags, sequence number and port, which differ for equal things.
            found.append(_HEADER.pack(_HEADER.size + len(payload), answer, 0, 0, 0) + payload)
        return found, interrupted

    def change(self, messages: Sequence[bytes]) -> list[Outcome]:
        """Send requests that ask for an ACK; return the outcome of each in turn. Raises OSError."""
        outcomes: list[Outcome] = []
        for start in range(0, len(messages), MOST_MESSAGES):
            outcomes += self._change(messages[start : start + MOST_MESSAGES])
        return outcomes

    def _change(self, messages: Sequence[bytes]) -> list[Outcome]:
        data = bytearray()
        first = self._sequence + 1
        for request in messages:
            self._sequence += 1
            start = len(data)
            data += request
            _SEQUENCE.pack_into(data, start + _SEQUENCE_OFFSET, self._sequence, 0)
        self._socket.send(data)
        outcomes: list[Outcome] = [(0, "")] * len(messages)
        left = len(messages)
        for answer, flags, sequence, payload in self._messages():
            if answer != _ERROR_KIND or not 0 <= sequence - first < len(messages):
                continue
            code = -_CODE.unpack_from(payload)[0]
            words = _attributes(payload, _ERROR_BODY) if flags & _ACK_TLVS else {}
            said = words.get(_ERROR_TEXT, b"").rstrip(b"\0").decode("utf-8", "replace")
            outcomes[sequence - first] = code, said
            left -= 1
            if not left:
                break
        return outcomes

    def _messages(self) -> Iterator[tuple[int, int, int, bytes]]:
        """Yield kind, flags, sequence number and payload of what comes, for ever."""
        while True:
            data = self._socket.recv(RECEIVE_SIZE)
            if not data:
                raise OSError(errno.EPIPE, "netlink: the kernel has closed the socket")
            offset = 0
            while offset + _HEADER.size <= len(data):
                length, kind, flags, sequence, _port = _HEADER.unpack_from(data, offset)
                if length < _HEADER.size:
                    raise OSError(errno.EBADMSG, "netlink: malformed message")
                yield kind, flags, sequence, data[offset + _HEADER.size : offset + length]
                offset += (length + 3) & ~3
