"""Connections of a pod that are older than its enrolment: whose they are, and cutting them.

This module owns sock_diag (sock_diag(7)). It promises to cut only connections that the capture has
marked as older, that leave the pod, and whose local port takes mutual TLS only; both ends then see
a reset; and to take no caller for a connection of the pod's own. It may not touch the tunnel's
connections. All functions run inside the namespace.

Plain netlink and not pyroute2: its DiagSocket neither destroys sockets nor reports errors (0.9).
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from nodeagent.capture.layout import MARK_OLDER
from nodeagent.capture.model import OlderCaller

__all__ = [
    "MAX_CALLERS",
    "Connection",
    "Cut",
    "callers",
    "connected",
    "cut",
    "look",
    "probe_destroy",
    "to_cut",
]

NETLINK_SOCK_DIAG: Final = 4
SOCK_DIAG_BY_FAMILY: Final = 20
SOCK_DESTROY: Final = 21
NLMSG_ERROR: Final = 2
NLMSG_DONE: Final = 3
NLM_F_REQUEST: Final = 0x1
NLM_F_ACK: Final = 0x4
NLM_F_DUMP: Final = 0x300
INET_DIAG_MARK: Final = 15

MADE: Final = sum(1 << state for state in (1, 4, 5, 8, 9, 11))
"""ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING (include/net/tcp_states.h)."""

LISTEN: Final = 1 << 10
"""The state of a socket that waits for callers (likewise)."""

MAX_CALLERS: Final = 200
"""Of one pod that are told one by one, those with the most connections: more than anybody reads."""

RECEIVE_SIZE: Final = 256 * 1024
"""Bytes of one receive: the kernel fills at most 32 KiB of a dump into one message."""

_HEADER: Final = struct.Struct("=IHHII")
_REQUEST: Final = struct.Struct("=BBBBI48s")
_ANSWER: Final = struct.Struct("=BBBB48s20s")
_ATTRIBUTE: Final = struct.Struct("=HH")


class Cut(NamedTuple):
    """How many older connections were ended, and how many go on."""

    ended: int
    left: int


class Connection(NamedTuple):
    """One TCP connection as sock_diag shows it; `key` names it to the kernel."""

    family: int
    key: bytes
    local_port: int
    remote: str
    mark: int


def connected() -> bool:
    """Whether the calling thread's namespace has any TCP socket, listening ones included."""
    for name in ("sockstat", "sockstat6"):
        try:
            text = Path(f"/proc/thread-self/net/{name}").read_text(encoding="ascii")
        except FileNotFoundError:
            continue
        for line in text.splitlines():
            fields = line.split()
            if fields[0] in ("TCP:", "TCP6:") and int(fields[2]):
                return True
    return False


def to_cut(
    connections: Iterable[Connection], own: frozenset[str], is_strict: Callable[[int], bool]
) -> list[Connection]:
    """Return the connections that may not live on. Pure."""
    return [item for item in connections if _must_end(item, own, is_strict)]


def _must_end(
    connection: Connection, own: frozenset[str], is_strict: Callable[[int], bool]
) -> bool:
    return _leaves(connection, own) and is_strict(connection.local_port)


def _leaves(connection: Connection, own: frozenset[str]) -> bool:
    """Return whether it is an older one, and not from the pod to itself."""
    if connection.mark != MARK_OLDER or connection.remote in own:
        return False
    return not ipaddress.ip_address(connection.remote).is_loopback


def callers(
    connections: Iterable[Connection],
    own: frozenset[str],
    served: Collection[int],
    chosen: range,
) -> tuple[OlderCaller, ...]:
    """Return who called the pod before it was captured, and is connected still. Pure.

    `served` are the ports that somebody listens on, `chosen` those from which the kernel takes one
    for whoever calls out: a connection from such a port that nobody serves is the pod's own call.
    The last entry stands for those that find no room, without address and port.
    """
    found = Counter(
        (each.remote, each.local_port)
        for each in connections
        if _leaves(each, own) and (each.local_port in served or each.local_port not in chosen)
    )
    told = [OlderCaller(*key, connections=count) for key, count in found.most_common(MAX_CALLERS)]
    rest = found.total() - sum(each.connections for each in told)
    return (*told, OlderCaller("", 0, connections=rest)) if rest else tuple(told)


def look(own: frozenset[str], chosen: range) -> tuple[tuple[OlderCaller, ...], bool]:
    """Return `callers`, and whether there is any older connection. Raises OSError.

    The kernel goes through every connection of the machine for it: milliseconds.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as sock:
        sock.bind((0, 0))
        found = list(_all(sock, MADE))
        served = {each.local_port for each in _all(sock, LISTEN)}
    there = any(each.mark == MARK_OLDER for each in found)
    return callers(found, own, served, chosen), there


def _all(sock: socket.socket, states: int) -> Iterator[Connection]:
    for family in (socket.AF_INET, socket.AF_INET6):
        yield from _dump(sock, family, states)


def cut(own: frozenset[str], is_strict: Callable[[int], bool]) -> Cut:
    """End the older connections that may not live on. Raises OSError.

    The kernel goes through every connection of the machine for it: milliseconds.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as sock:
        sock.bind((0, 0))
        found = list(_all(sock, MADE))
        ended = 0
        for connection in to_cut(found, own, is_strict):
            ended += _destroy(sock, connection)
        older = sum(connection.mark == MARK_OLDER for connection in found)
        return Cut(ended, older - ended)


def _send(
    sock: socket.socket, kind: int, flags: int, family: int, key: bytes, states: int = MADE
) -> None:
    body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, states, key)
    length = _HEADER.size + len(body)
    sock.send(_HEADER.pack(length, kind, NLM_F_REQUEST | flags, 0, 0) + body)


def _messages(sock: socket.socket) -> Iterator[tuple[int, bytes]]:
    while True:
        data = sock.recv(RECEIVE_SIZE)
        offset = 0
        while offset < len(data):
            length, kind, _flags, _sequence, _port = _HEADER.unpack_from(data, offset)
            yield kind, data[offset + _HEADER.size : offset + length]
            offset += (length + 3) & ~3


def _error(body: bytes) -> int:
    return -int(struct.unpack_from("=i", body)[0]) if len(body) >= 4 else 0  # noqa: PLR2004 - an int


def _dump(sock: socket.socket, family: int, states: int) -> Iterator[Connection]:
    _send(sock, SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, family, bytes(48), states)
    for kind, body in _messages(sock):
        if kind in (NLMSG_DONE, NLMSG_ERROR):
            code = _error(body)
            if code not in (0, errno.ENOENT):  # ENOENT: a kernel without this family
                raise OSError(code, f"sock_diag dump: {os.strerror(code)}")
            return
        connection = _parse(body)
        if connection is not None:
            yield connection


def _parse(body: bytes) -> Connection | None:
    family, _state, _timer, _retransmits, key, _rest = _ANSWER.unpack_from(body)
    local_port, _remote_port = struct.unpack_from("!HH", key)
    packed = key[20:36]
    if family == socket.AF_INET:
        remote = str(ipaddress.IPv4Address(packed[:4]))
    else:
        six = ipaddress.IPv6Address(packed)
        remote = str(six.ipv4_mapped or six)
    offset, mark = _ANSWER.size, 0
    while offset + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, offset)
        if length < _ATTRIBUTE.size:
            return None
        if kind == INET_DIAG_MARK:
            mark = struct.unpack_from("=I", body, offset + _ATTRIBUTE.size)[0]
        offset += (length + 3) & ~3
    return Connection(family, key, local_port, remote, mark)


def _try_destroy(sock: socket.socket, family: int, key: bytes) -> int:
    _send(sock, SOCK_DESTROY, NLM_F_ACK, family, key)
    _kind, body = next(_messages(sock))
    return _error(body)


def _destroy(sock: socket.socket, connection: Connection) -> bool:
    code = _try_destroy(sock, connection.family, connection.key)
    if code not in (0, errno.ENOENT):  # ENOENT: it has ended by itself
        raise OSError(code, f"sock_diag destroy: {os.strerror(code)}")
    return code == 0


def probe_destroy() -> int:
    """Return the errno of ending a connection that does not exist: ENOENT where it works."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as sock:
        sock.bind((0, 0))
        return _try_destroy(sock, socket.AF_INET, bytes(48))
