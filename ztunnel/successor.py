"""Starting the next ztunnel: the same command line, from whatever package is installed now.

This module owns the starting of that process and the descriptor that names it. It promises that
the process is a child of the service manager (or of init) from its first instruction and not of
this one, so that the manager sees its end; that it has our environment, output and command line;
that it does not run before this process can follow it; and that what is signalled is that very
process. It may not know why a successor is wanted, nor what it does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

__all__ = ["Started", "Successor", "launch"]

START_SECONDS: Final = 10.0
"""For a bare interpreter to fork: tens of milliseconds, on a node that swaps a few seconds."""

_MAX_REPORT: Final = 32
"""Bytes of a process id and a newline."""

_GATE: Final = 3
_REPORT: Final = 4

_LAUNCHER: Final = f"""
import os, sys
pid = os.fork()
if pid:
    os.write({_REPORT}, b"%d\\n" % pid)
    os._exit(0)
os.close({_REPORT})
if os.read({_GATE}, 1):
    os.close({_GATE})
    os.execv(sys.argv[1], sys.argv[2:])
"""
"""Forks once more, so that the process's parent has gone; it waits for a byte before it begins."""


class Started(Protocol):
    """A process that was started to take over."""

    pid: int

    async def ended(self) -> None:
        """Return once it has ended."""

    def signal(self, number: signal.Signals) -> None: ...

    def close(self) -> None:
        """Follow it no more."""


class Successor:
    """The process that `pidfd` names; the descriptor is owned here."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self._pidfd = pidfd

    async def ended(self) -> None:
        loop = asyncio.get_running_loop()
        gone = asyncio.Event()
        loop.add_reader(self._pidfd, gone.set)
        try:
            await gone.wait()
        finally:
            loop.remove_reader(self._pidfd)

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def close(self) -> None:
        os.close(self._pidfd)


async def launch(
    environment: Mapping[str, str], argv: Sequence[str] = tuple(sys.orig_argv)
) -> Successor:
    """Start `argv` with this interpreter's executable. Raises OSError, and nothing runs then."""
    gate, open_gate = os.pipe2(os.O_CLOEXEC)
    report, write_report = os.pipe2(os.O_CLOEXEC)
    try:
        helper = [sys.executable, "-I", "-S", "-c", _LAUNCHER, sys.executable, *argv]
        child = os.posix_spawn(  # noqa: ASYNC221 - it does not wait for the process
            helper[0],
            helper,
            {**os.environ, **environment},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, gate, _GATE),
                (os.POSIX_SPAWN_DUP2, write_report, _REPORT),
            ],
            # As `__main__` blocks it, from the beginning: it comes to all processes of the unit.
            setsigmask=[signal.SIGUSR1],
            setsigdef=[signal.SIGPIPE],
        )
        os.close(write_report)
        write_report = -1
        pid = await asyncio.to_thread(_told, child, report)
        pidfd = os.pidfd_open(pid)
        # Only now, so that its number cannot have passed to another process.
        os.write(open_gate, b"\n")
    finally:
        for descriptor in (gate, open_gate, report, write_report):
            if descriptor >= 0:
                os.close(descriptor)
    return Successor(pid, pidfd)


def _told(child: int, report: int) -> int:
    """Return the process id that the helper reports, and reap the helper."""
    said = b""
    with open(report, "rb", closefd=False, buffering=0) as stream:
        while not said.endswith(b"\n") and (more := stream.read(_MAX_REPORT)):
            said += more
    _, status = os.waitpid(child, 0)
    if not said.strip().isdigit():
        raise ChildProcessError(
            f"the helper ended with {os.waitstatus_to_exitcode(status)} and started nothing"
        )
    return int(said)
