"""What connections cost in memory: thousands that are held open, idle or at work.

This module owns those two scenarios. It promises that memory is read when it has come to rest, or
at a stated moment, and that no connection was lost meanwhile unless the values say so.
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import IO, Any, Final

import click

from meshbench import host, parse
from meshbench.bed import ECHO_PORT, Bed, FailedError

__all__ = [
    "BUSY",
    "CLOSED_SECONDS",
    "IDLE",
    "MANY",
    "WORK_SECONDS",
    "Steps",
    "idle",
    "many",
    "stepping",
]

IDLE: Final = 2000
"""Connections of the `memory` scenario: enough that a page more or less does not show."""
MANY: Final = 9000
BUSY: Final = 2000
WORK_SECONDS: Final = 4
CLOSED_SECONDS: Final = 10.0
"""From the closing of all connections to the last reading of memory."""

SETTLE_SECONDS: Final = 5.0
SETTLE_STEP_SECONDS: Final = 0.25
"""Memory is read when it has not changed for two steps, at the latest after the former: that it has
come to rest is no event, it shows only by time that passes."""
STEP_SECONDS: Final = 90.0
"""For each step of a load program: some times what the slowest subject takes."""

KIB_A_MB: Final = 1024


def settled(pid: int) -> int:
    """Return a process's resident memory in KiB once it has come to rest."""
    deadline = time.monotonic() + SETTLE_SECONDS
    last, same = host.resident_kb(pid), 0
    while same < 2 and time.monotonic() < deadline:
        time.sleep(SETTLE_STEP_SECONDS)
        now = host.resident_kb(pid)
        last, same = now, same + 1 if now == last else 0
    return last


class Steps:
    """A load program that goes from step to step when told. Each is bounded in time."""

    def __init__(self, process: subprocess.Popen[str], name: str) -> None:
        self._process = process
        self._name = name

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        if self._process.stdin is None or self._process.stdout is None:
            raise FailedError(f"{self._name} has no pipes")
        return self._process.stdin, self._process.stdout

    def _line(self) -> str:
        guard = threading.Timer(STEP_SECONDS, self._process.kill)
        guard.start()
        try:
            return self._pipes()[1].readline()
        finally:
            guard.cancel()

    def wait(self, word: str) -> None:
        """Wait until the program says so. Raises FailedError."""
        if self._line() != f"{word}\n":
            self._process.kill()
            trouble = self._process.communicate()[1].strip()
            raise FailedError(f"{self._name}: {trouble or f'did not say {word!r} in time'}")

    def tell(self) -> None:
        """Let it begin its next step. Raises FailedError."""
        try:
            self._pipes()[0].write("\n")
            self._pipes()[0].flush()
        except BrokenPipeError:
            raise FailedError(f"{self._name} ended early") from None

    def end(self, *, end_of_input: bool = False) -> dict[str, float]:
        """Begin the last step and return what the program reports."""
        if end_of_input:
            self._pipes()[0].close()
        else:
            self.tell()
        return parse.load(self._line())

    def remarks(self) -> str:
        """Return what it wrote on standard error, once it has ended."""
        return str(self._process.communicate()[1]).strip()


@contextlib.contextmanager
def stepping(bed: Bed, name: str, *arguments: str, pod: str = "client") -> Iterator[Steps]:
    """Start a load program in a pod, and end it."""
    process: subprocess.Popen[Any] = bed.popen(
        pod,
        [str(bed.tools / name), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield Steps(process, name)
    finally:
        process.kill()
        with contextlib.suppress(ValueError, OSError):
            process.communicate()


def idle(bed: Bed) -> dict[str, float]:
    """Resident memory after the first requests, and with connections that do nothing."""
    resting = {side: settled(pid) for side, pid in bed.tunnels.items()}
    values = {f"{side}_idle_kb": float(kb) for side, kb in resting.items()}
    values["idle_mb"] = max(resting.values()) / KIB_A_MB
    where = (bed.server, str(bed.http_port), str(IDLE))
    with stepping(bed, "load", "idle", *where) as program:
        program.wait("ready")
        for side, pid in bed.tunnels.items():
            loaded = settled(pid)
            values[f"{side}_held_kb"] = float(loaded)
            values[f"{side}_connection_kb"] = (loaded - resting[side]) / IDLE
        if program.end(end_of_input=True) != {"held": float(IDLE)}:
            raise FailedError("load idle: not every connection was held to the end")
    if bed.agents:
        values["agent_mb"] = max(settled(pid) for pid in bed.agents.values()) / KIB_A_MB
    return values


def many(bed: Bed) -> dict[str, float]:
    """9,000 connections, 2,000 of them at work; memory when open, and a while after closing."""
    resting = {side: settled(pid) for side, pid in bed.tunnels.items()}
    began = time.monotonic()
    arguments = (bed.server, str(ECHO_PORT), str(MANY), str(BUSY), str(WORK_SECONDS))
    with stepping(bed, "many", *arguments) as program:
        program.wait("open")
        opened = time.monotonic() - began
        loaded = {side: settled(pid) for side, pid in bed.tunnels.items()}
        with host.Meter(bed.tunnels.values()) as meter:
            program.tell()
            program.wait("worked")
        report = program.end()
        closed = time.monotonic()
        if report["errors"]:
            click.echo(f"  many: {program.remarks()}", err=True)
    time.sleep(max(0.0, closed + CLOSED_SECONDS - time.monotonic()))
    after = {side: host.resident_kb(pid) for side, pid in bed.tunnels.items()}
    return {
        "errors": report["errors"],
        "held": report["held"],
        "open_seconds": opened,
        "messages": report["messages"],
        "per_second": report["exchanged"] / report["seconds"],
        "tunnels_each_us": meter.used(bed.tunnels.values()) / max(report["exchanged"], 1.0) * 1e6,
        "connection_kb": max(loaded[side] - resting[side] for side in resting) / MANY,
        "after_closing": max(after[side] / resting[side] for side in resting),
        **{f"{side}_idle_kb": float(kb) for side, kb in resting.items()},
        **{f"{side}_open_kb": float(kb) for side, kb in loaded.items()},
        **{f"{side}_after_kb": float(kb) for side, kb in after.items()},
    }
