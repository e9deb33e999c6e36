"""Telling the service manager how it goes: sd_notify(3), without libsystemd.

This module owns one datagram socket. It promises that a missing, full or broken service manager
never stops the daemon and delays it by WAIT_SECONDS at most: so long what the manager has to know
waits for room, once, until the manager takes messages again. The variables are taken out of the
environment, and given again to a successor only. It may not decide when something is ready.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import MutableMapping
from typing import Final

__all__ = ["Notifier"]

MAX_STATUS: Final = 200
"""Characters of a status line: `systemctl status` shows one line."""

WAIT_SECONDS: Final = 1.0
"""For room in the manager's queue, which holds ten messages where nobody has set
net.unix.max_dgram_qlen: one that works makes room in milliseconds."""

_MICROSECONDS: Final = 1_000_000


class Notifier:
    """Speaks to the socket that `environ` names; does nothing when it names none."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        path = environ.pop("NOTIFY_SOCKET", "")
        microseconds = environ.pop("WATCHDOG_USEC", "")
        pid = environ.pop("WATCHDOG_PID", "") or str(os.getpid())
        self.watchdog_seconds = 0.0
        """How often the manager wants a sign of life at least; 0: it does not ask."""
        if pid == str(os.getpid()) and microseconds.isascii() and microseconds.isdigit():
            self.watchdog_seconds = int(microseconds) / _MICROSECONDS
        self.environment: dict[str, str] = {}
        """For a successor of this process, which the manager is to follow in our place."""
        if path:
            self.environment["NOTIFY_SOCKET"] = path
        if self.watchdog_seconds:
            self.environment["WATCHDOG_USEC"] = microseconds
        self._status = ""
        self._stuck = False
        self._socket: socket.socket | None = None
        # "@" stands for the zero byte of an abstract address.
        if path.startswith(("/", "@")):
            self._connect(f"\0{path[1:]}" if path.startswith("@") else path)

    def _connect(self, path: str) -> None:
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        notifying = socket.socket(socket.AF_UNIX, kind)
        try:
            notifying.connect(path)
        except OSError:
            notifying.close()
            return
        self._socket = notifying

    def ready(self) -> None:
        self._send("READY=1")

    def reloading(self) -> None:
        """A reload begins; `ready` or `handed_over` ends it."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send(f"RELOADING=1\nMONOTONIC_USEC={now}")

    def handed_over(self, pid: int) -> None:
        """Process `pid` is the service from now on, and says everything further."""
        self._send(f"MAINPID={pid}\nREADY=1")
        self.close()

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def alive(self) -> None:
        self._send("WATCHDOG=1", wait=False)

    def status(self, text: str) -> None:
        """Set the line that `systemctl status` shows; the same line is sent once."""
        line = "".join(c if c.isprintable() else " " for c in text)[:MAX_STATUS]
        if line != self._status:
            self._status = line
            self._send(f"STATUS={line}", wait=False)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, message: str, *, wait: bool = True) -> None:
        if self._socket is None:
            return
        until = time.monotonic() + (WAIT_SECONDS if wait and not self._stuck else 0)
        while True:
            try:
                self._socket.send(message.encode("utf-8", "replace"), socket.MSG_NOSIGNAL)
            except BlockingIOError:
                left = until - time.monotonic()
                if left <= 0:
                    self._stuck |= wait
                    return
                room = select.poll()
                room.register(self._socket, select.POLLOUT)
                room.poll(left * 1000)
            except OSError:
                return  # the manager restarts: READY=1 missing ends in its own start timeout
            else:
                self._stuck = False
                return
