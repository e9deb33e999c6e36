"""The sockets that audit lines go to.

This module owns their opening, waiting and closing. It promises that a wait is bounded, so that the
thread that sends can end, and that after an error the next attempt begins with a new socket. It may
not know what a message says.
"""

from __future__ import annotations

import abc
import errno
import select
import socket
from collections.abc import Sequence
from typing import Final

from ztunnel.address import authority, pack
from ztunnel.audit.syslog import framed
from ztunnel.log_writer import Destination, MessageTooLongError
from ztunnel.settings import Syslog, Transport

__all__ = ["Datagrams", "Stream", "destination"]

SEND_SECONDS: Final = 1.0
"""For room in the other side's queue; then the thread looks whether it is to end."""

CONNECT_SECONDS: Final = 5.0
"""Two SYNs of a TCP connect: whoever answers at all answers in less."""

_THROWN_AWAY: Final = 4096
"""Bytes at once; syslog receivers send none."""

Address = str | tuple[str, int]


class _Socket(abc.ABC):
    """A connected socket, or none."""

    def __init__(self, family: int, kind: int, address: Address) -> None:
        self._family = family
        self._kind = kind
        self._address = address
        self._where = (
            address if isinstance(address, str) else authority(pack(address[0]), address[1])
        )
        self._socket: socket.socket | None = None

    def open(self) -> None:
        try:
            self._connect()
        except OSError as error:
            error.filename = self._where
            raise

    def _connect(self) -> None:
        self.close()
        made = socket.socket(self._family, self._kind | socket.SOCK_CLOEXEC)
        try:
            made.settimeout(CONNECT_SECONDS)
            made.connect(self._address)
            made.settimeout(SEND_SECONDS)
        except TimeoutError:
            made.close()
            # Not slow, as one is that does not take more: nobody is there. (Without a number, as
            # ETIMEDOUT would make it a TimeoutError again.)
            raise OSError("no answer to connect") from None
        except BaseException:
            made.close()
            raise
        self._socket = made

    def send(self, messages: Sequence[bytes], /) -> int:
        if self._socket is None:
            raise OSError(errno.ENOTCONN, "not connected")
        for number, message in enumerate(messages):
            try:
                self._send_one(self._socket, message)
            except (OSError, MessageTooLongError) as error:
                if number:
                    return number
                if isinstance(error, OSError):
                    error.filename = self._where
                raise
        return len(messages)

    @abc.abstractmethod
    def _send_one(self, connected: socket.socket, message: bytes) -> None:
        """Send a message whole. Raises as `Destination.send` does."""

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class Datagrams(_Socket):
    """One message a datagram: the journal, syslog on a unix socket, and UDP (RFC 5426)."""

    def __init__(self, family: int, address: Address) -> None:
        super().__init__(family, socket.SOCK_DGRAM, address)

    def _send_one(self, connected: socket.socket, message: bytes) -> None:
        try:
            connected.send(message)
        except OSError as error:
            if error.errno == errno.EMSGSIZE:
                raise MessageTooLongError from None
            raise


class Stream(_Socket):
    """Messages behind each other on TCP, counted (RFC 6587)."""

    def __init__(self, family: int, address: Address) -> None:
        super().__init__(family, socket.SOCK_STREAM, address)

    def _send_one(self, connected: socket.socket, message: bytes) -> None:
        if _has_ended(connected):
            raise OSError("the receiver has closed the connection")
        try:
            connected.sendall(framed(message))
        except TimeoutError:
            # A part may be on its way: the rest can only follow on another connection, whole.
            raise OSError("the receiver takes nothing") from None


def _has_ended(connected: socket.socket) -> bool:
    """True if the other side has closed: what is sent then is lost without an error.

    What a receiver says is not for us, and thrown away.
    """
    poll = select.poll()
    poll.register(connected, select.POLLIN)
    return bool(poll.poll(0)) and not connected.recv(_THROWN_AWAY)


def destination(syslog: Syslog) -> Destination:
    """Return where messages for `syslog` go."""
    if syslog.transport is Transport.UNIX:
        return Datagrams(socket.AF_UNIX, syslog.address)
    family = socket.AF_INET6 if ":" in syslog.address else socket.AF_INET
    kind = Stream if syslog.transport is Transport.TCP else Datagrams
    return kind(family, (syslog.address, syslog.port))
