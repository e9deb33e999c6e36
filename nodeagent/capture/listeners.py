"""The tunnel's listening sockets in a pod: opening, adopting, checking.

This module owns their options. It promises that a socket it returns listens on its port in the
namespace it is meant for, is non-blocking and close-on-exec, and gives what it accepts the mark
of the side that it faces. It may not accept anything. `open_listener` runs inside the namespace.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from typing import Final

from nodeagent.capture.layout import (
    HBONE_PORT,
    MARK_DELIVERY,
    MARK_TUNNEL,
    OUTBOUND_PORT,
    PORTS,
)
from nodeagent.pods.netns import socket_cookie

__all__ = ["PortTakenError", "adopt_listener", "is_listening", "open_listener", "sock_cookie"]

BACKLOG: Final = 4096
"""Connections that wait while the tunnel restarts; the pod's own net.core.somaxconn caps it."""

KEEPALIVE_IDLE: Final = 180
KEEPALIVE_INTERVAL: Final = 180
KEEPALIVE_PROBES: Final = 9
"""Seconds, seconds, count: a vanished peer's connection ends after half an hour, as ztunnel's."""

_RESET_AT_CLOSE: Final = struct.pack("ii", 1, 0)
"""struct linger: on, for no time (socket(7))."""

# linux/in.h, linux/in6.h, asm-generic/socket.h: not in Python's socket module.
IP_TRANSPARENT: Final = 19
IPV6_TRANSPARENT: Final = 75
SO_COOKIE: Final = 57


class PortTakenError(Exception):
    """Something in the pod listens on one of the tunnel's ports."""

    def __init__(self, port: int) -> None:
        super().__init__(
            f"port {port} is taken by a process in the pod: the tunnel needs "
            f"{', '.join(str(p) for p in PORTS)}; move that process to another port"
        )
        self.port = port


def open_listener(port: int) -> socket.socket:
    """Listen on `port` of every address, both families. Raises PortTakenError and OSError."""
    try:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT:
            raise
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        _configure(sock, port)
        sock.bind(("::" if sock.family == socket.AF_INET6 else "0.0.0.0", port))  # noqa: S104 - of one pod, for whom it serves them all
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise PortTakenError(port) from None
        raise
    return sock


def _mark(port: int) -> int:
    """Return the mark that accepted sockets inherit.

    Those that face the outside take the pod's own routes and pass the guard. The outbound ones face
    the application, over lo, where the kernel may have to answer for it when it has gone: its
    answers reflect the mark (`fwmark_reflect`), and this one brings them back over lo. With the
    other they would leave by the device, and the tunnel's socket would never learn of the end.
    """
    return MARK_DELIVERY if port == OUTBOUND_PORT else MARK_TUNNEL


def _configure(sock: socket.socket, port: int) -> None:
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
    # Accepted sockets speak from addresses that are not the pod's.
    sock.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, _mark(port))
    # Inherited: an application that restarts may bind its port while we hold connections to it.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if port != HBONE_PORT:
        # Inherited: should the tunnel die, its applications see a reset and no clean end.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)


def adopt_listener(fd: int, port: int, netns_cookie: int) -> socket.socket:
    """Return a duplicate of a listening socket that somebody else made.

    It may have been destroyed since, and not listen any more: look at `is_listening`.
    Raises ValueError, which says what is wrong with it; `fd` stays the caller's.
    """
    sock = _duplicate(fd)
    wrong = _what_is_wrong(sock, port, netns_cookie)
    if wrong:
        sock.close()
        raise ValueError(f"the socket for port {port} {wrong}")
    sock.setblocking(False)
    return sock


def _what_is_wrong(sock: socket.socket, port: int, netns_cookie: int) -> str:
    if sock.type != socket.SOCK_STREAM or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return "is no TCP socket"
    if sock.getsockname()[1] != port:
        return "listens elsewhere"
    if socket_cookie(sock) != netns_cookie:
        return "belongs to another namespace"
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) != _mark(port):
        return "does not carry the tunnel's mark"
    return ""


def _duplicate(fd: int) -> socket.socket:
    copy = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    try:
        return socket.socket(fileno=copy)
    except OSError as error:
        os.close(copy)
        raise ValueError(f"descriptor {fd} is no socket ({error.strerror})") from None


def is_listening(sock: socket.socket) -> bool:
    """Whether it still listens: SOCK_DESTROY ends that without closing the descriptor."""
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def sock_cookie(sock: socket.socket) -> int:
    """Return the socket's own number (SO_COOKIE), which a socket map shows for its slots."""
    number: int = struct.unpack("Q", sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))[0]
    return number
