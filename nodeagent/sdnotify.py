"""The service manager's notification socket and descriptor store (sd_notify, sd_listen_fds).

This module owns the one datagram socket to the service manager and the `NOTIFY_SOCKET`,
`WATCHDOG_USEC` and `LISTEN_FDS` variables. It promises that without a service manager every call
is a cheap no-op, that one which does not read delays the daemon by WAIT_SECONDS at most until it
takes messages again, and that descriptors handed over at start are close-on-exec and named. It may
not decide when the daemon is ready or which descriptors matter.

Source: sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3) of systemd 252.
"""

from __future__ import annotations

import array
import contextlib
import os
import re
import select
import socket
import stat
import time
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import MutableMapping, Sequence

__all__ = ["ServiceManager", "StoredDescriptor", "stored_descriptors"]

FIRST_DESCRIPTOR: Final = 3
"""SD_LISTEN_FDS_START: handed-over descriptors follow the standard three."""

MAX_STORED: Final = 20_000
"""Descriptors accepted from the manager; above it `LISTEN_FDS` is garbage, not a store."""

MAX_STATUS: Final = 200
"""Characters of a STATUS line: `systemctl status` shows one line."""

WAIT_SECONDS: Final = 1.0
"""For room in the manager's queue, which a thousand pods' descriptors fill many times over: a
descriptor that is not stored is lost in a crash. A manager that works has room in milliseconds."""

_NAME = re.compile(r"[ -9;-~]{1,255}")
"""What systemd takes as a descriptor's name: printable ASCII without the colon."""


class StoredDescriptor(msgspec.Struct, frozen=True):
    """A descriptor that the manager kept for us, and the name that it was stored under."""

    name: str
    fd: int


def stored_descriptors(environ: MutableMapping[str, str]) -> tuple[StoredDescriptor, ...]:
    """Take the descriptors that the service manager passed at start, and forget the variables.

    Call once, before anything opens descriptors. Descriptors that are not meant for this process
    (`LISTEN_PID`) are left alone. Children never inherit any of them.
    """
    pid = environ.pop("LISTEN_PID", "")
    count_text = environ.pop("LISTEN_FDS", "")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not (count_text.isascii() and count_text.isdigit()):
        return ()
    count = int(count_text)
    if count > MAX_STORED:
        return ()
    found: list[StoredDescriptor] = []
    for index in range(count):
        fd = FIRST_DESCRIPTOR + index
        try:
            os.set_inheritable(fd, False)
        except OSError:
            continue
        found.append(StoredDescriptor(names[index] if index < len(names) else "unknown", fd))
    return tuple(found)


class ServiceManager:
    """Tells the service manager about this daemon. Does nothing when there is none.

    A message that cannot be delivered at once is dropped: `failures` counts them. The watchdog
    repeats, and a missed READY=1 is repaired by the manager's own start timeout.
    """

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        """Read and remove `NOTIFY_SOCKET` and `WATCHDOG_*`, so that children do not notify."""
        self.failures = 0
        self.watchdog_seconds = _watchdog(environ)
        """Seconds within which WATCHDOG=1 must be sent, or None when no watchdog is asked for."""
        self._status = ""
        self._stuck = False
        self._socket: socket.socket | None = None
        path = environ.pop("NOTIFY_SOCKET", "")
        if not path.startswith(("/", "@")):
            return
        address = "\0" + path[1:] if path.startswith("@") else path
        connected = socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        )
        try:
            connected.connect(address)
        except OSError:
            connected.close()
            self.failures += 1
            return
        self._socket = connected

    @property
    def present(self) -> bool:
        """Whether a service manager listens."""
        return self._socket is not None

    def ready(self) -> None:
        self._send("READY=1")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def watchdog(self) -> None:
        self._send("WATCHDOG=1", wait=False)

    def status(self, text: str) -> None:
        """Show one line in `systemctl status`; repeated lines are sent once."""
        line = "".join(c if c.isprintable() else " " for c in text)[:MAX_STATUS]
        if line != self._status:
            self._status = line
            self._send(f"STATUS={line}", wait=False)

    def store(self, name: str, fd: int) -> None:
        """Keep `fd` over a restart. Storing a duplicate of a stored descriptor changes nothing.

        The descriptor stays open here. Raises ValueError for a name that systemd refuses.
        """
        _check_name(name)
        self._send(f"FDSTORE=1\nFDNAME={name}", (fd,))

    def forget(self, name: str) -> None:
        """Drop every stored descriptor of that name."""
        _check_name(name)
        self._send(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, text: str, fds: Sequence[int] = (), *, wait: bool = True) -> None:
        if self._socket is None:
            return
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        until = time.monotonic() + (WAIT_SECONDS if wait and not self._stuck else 0)
        while True:
            try:
                self._socket.sendmsg([text.encode()], ancillary, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                left = until - time.monotonic()
                if left <= 0:
                    self._stuck |= wait
                    break
                room = select.poll()
                room.register(self._socket, select.POLLOUT)
                room.poll(left * 1000)
            except OSError:
                break
            else:
                self._stuck = False
                return
        self.failures += 1


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot name a stored descriptor: 1 to 255 printable ASCII, no colon"
        )


def _watchdog(environ: MutableMapping[str, str]) -> float | None:
    microseconds = environ.pop("WATCHDOG_USEC", "")
    pid = environ.pop("WATCHDOG_PID", "")
    if pid and pid != str(os.getpid()):
        return None
    if not (microseconds.isascii() and microseconds.isdigit()) or int(microseconds) == 0:
        return None
    return int(microseconds) / 1_000_000


def is_socket(fd: int) -> bool:
    """Whether `fd` is open and a socket (the store may also hold namespaces)."""
    with contextlib.suppress(OSError):
        return stat.S_ISSOCK(os.fstat(fd).st_mode)
    return False
