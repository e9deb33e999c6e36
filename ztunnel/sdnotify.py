"""Telling the service manager how it goes: sd_notify(3), without libsystemd.

This module owns one datagram socket. It promises that a missing, full or broken service manager
never stops or delays the daemon (a message is sent at once or not at all), and that the variables
are taken out of the environment, and given again to a successor only. It may not decide when
something is ready.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import MutableMapping
from typing import Final

__all__ = ["Notifier"]

MAX_STATUS: Final = 200
"""Characters of a status line: `systemctl status` shows one line."""

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
        self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        """Set the line that `systemctl status` shows; the same line is sent once."""
        line = "".join(c if c.isprintable() else " " for c in text)[:MAX_STATUS]
        if line != self._status:
            self._status = line
            self._send(f"STATUS={line}")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, message: str) -> None:
        if self._socket is None:
            return
        try:
            self._socket.send(message.encode("utf-8", "replace"), socket.MSG_NOSIGNAL)
        except OSError:
            # The manager restarts or is full: the watchdog repeats itself, and READY=1 missing
            # ends in its own start timeout.
            return
