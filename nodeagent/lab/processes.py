"""The lab's processes: started in a namespace, recorded before they run, ended by descriptor.

This module owns starting and ending. It promises that a process is on record before its program
runs (a launcher waits at a gate until the record is written), that no signal ever reaches a process
that merely has a recycled number (a record holds the start time, signals go through a pidfd), and
that nothing is ended by name. It may not decide what is to run or where the record is kept.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import msgspec

import nodeagent
from nodeagent.lab import launch

__all__ = ["ProcessRecord", "end_all", "environment", "launch_argv", "members", "start"]

GRACE_SECONDS: Final = 5.0
"""From SIGTERM to SIGKILL: the daemons close their connections and write their last log lines."""

KILL_SECONDS: Final = 5.0
"""A killed process is gone within milliseconds, unless the kernel itself is stuck in a call."""

GATE: Final = 3
"""The launcher's descriptor of the gate, after standard input, output and error."""

START_TIME_FIELD: Final = 22 - 3
"""Place of `starttime` (field 22 of proc(5)) among the fields after the command's closing ')'."""
STATE_FIELD: Final = 0


class ProcessRecord(msgspec.Struct, frozen=True):
    """A process for ever: `start` is its start time in clock ticks since boot."""

    pid: int
    start: int

    def alive(self) -> bool:
        """True while it runs; a zombie has ended."""
        fields = _stat(self.pid)
        return (
            fields is not None
            and int(fields[START_TIME_FIELD]) == self.start
            and fields[STATE_FIELD] not in "ZX"
        )

    def open(self) -> int | None:
        """Return a pidfd of this very process, or None when it has ended."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        # Checked after opening: the descriptor keeps meaning the process that had the number then.
        if self.alive():
            return descriptor
        os.close(descriptor)
        return None

    def reap(self) -> None:
        """Let go of it if it has ended and `start` made it in this very process."""
        fields = _stat(self.pid)
        if fields is None or int(fields[START_TIME_FIELD]) != self.start:
            return
        # Not our child: whoever started it, or init, reaps it.
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG)

    def send(self, number: signal.Signals) -> bool:
        """Send a signal to this very process. False when it has ended."""
        descriptor = self.open()
        if descriptor is None:
            return False
        try:
            signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(descriptor)
        return True


def _stat(pid: int) -> list[str] | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()


def record_of(pid: int) -> ProcessRecord | None:
    fields = _stat(pid)
    return None if fields is None else ProcessRecord(pid, int(fields[START_TIME_FIELD]))


def environment() -> dict[str, str]:
    """Return this process's environment, in which a child finds the same `nodeagent`."""
    package = str(Path(nodeagent.__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": f"{package}:{inherited}" if inherited else package}


def launch_argv(place: launch.Place, argv: Iterable[str]) -> list[str]:
    """Return the command that runs `argv` in `place`."""
    script = launch.launch_script()
    return [sys.executable, "-I", "-S", script, json.dumps(place._asdict()), *argv]


def start(
    place: launch.Place,
    argv: Iterable[str],
    log: Path,
    record: Callable[[ProcessRecord], None],
) -> ProcessRecord:
    """Start `argv` in `place`, in a session of its own, its output appended to `log`.

    `record` is called before the program runs; when it raises, or this process dies first, the
    program never runs. Raises OSError.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        command = launch_argv(place._replace(gate=GATE), argv)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        pid = os.posix_spawn(
            command[0],
            command,
            environment(),
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
                (os.POSIX_SPAWN_DUP2, reading, GATE),
            ],
            setsid=True,
            setsigmask=[],
            setsigdef=[signal.SIGPIPE, signal.SIGINT],
        )
        started = record_of(pid)
        if started is None:
            raise OSError(errno.ESRCH, f"{log.stem} ended before it started; see {log}")
        record(started)
        os.write(writing, b"\n")
    finally:
        os.close(reading)
        os.close(writing)
    return started


def members(namespaces: set[tuple[int, int]]) -> list[ProcessRecord]:
    """Return every living process whose network namespace is one of `namespaces`, but this one."""
    found: list[ProcessRecord] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            status = (entry / "ns/net").stat()
        except OSError:
            continue
        if (status.st_dev, status.st_ino) in namespaces:
            one = record_of(int(entry.name))
            if one is not None and one.alive():
                found.append(one)
    return found


def end_all(records: Iterable[ProcessRecord], grace: float = GRACE_SECONDS) -> list[ProcessRecord]:
    """End these processes, politely first, and wait until they have ended (if only as zombies).

    Returns those that would not end.
    """
    opened = {one: descriptor for one in records if (descriptor := one.open()) is not None}
    try:
        _signal(opened.values(), signal.SIGTERM)
        left = _wait(opened, grace)
        if left:
            _signal(left.values(), signal.SIGKILL)
            left = _wait(left, KILL_SECONDS)
        return list(left)
    finally:
        for descriptor in opened.values():
            os.close(descriptor)


def _signal(descriptors: Iterable[int], number: signal.Signals) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, number)


def _wait(opened: dict[ProcessRecord, int], seconds: float) -> dict[ProcessRecord, int]:
    """Return those that have not ended within `seconds`."""
    left = dict(opened)
    deadline = time.monotonic() + seconds
    while left and (remaining := deadline - time.monotonic()) > 0:
        poller = select.poll()
        for descriptor in left.values():
            poller.register(descriptor, select.POLLIN)
        ended = {descriptor for descriptor, _ in poller.poll(remaining * 1000)}
        left = {one: descriptor for one, descriptor in left.items() if descriptor not in ended}
    return left
