"""The access log: one line for each connection at its end, as text or JSON, never in the way.

This module owns the forms of the line and its way to the file. It promises that `write` returns at
once whatever the disk does (a bounded queue and one thread that formats and writes), that lines
which found no room are counted and said, that no value can forge a line or a field (control
characters and quotes are escaped), and that the file is reopened when asked, for logrotate. It may
not look anything up.

JSON has the reference's keys (`src.addr` … `error`) plus `reason`, `connection_security_policy`
and `policy`. Text is Envoy's familiar shape with the same keys behind it:

    [START] "TCP 10.0.0.2:80" reason "error" RECEIVED SENT MS mTLS_Origin: "spiffe://…"
    mTLS_Destination: "spiffe://…" key="value" …

`bytes_recv` came from the client, `bytes_sent` went to it; `duration` is in milliseconds.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final, Protocol

import msgspec
import structlog

from ztunnel import labels as label_sets
from ztunnel.labels import Labels
from ztunnel.reasons import NO_FLAG, RESPONSE_FLAGS, Reason

__all__ = ["AccessLog", "Line", "Sink", "json_line", "text_line"]

_log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("ztunnel.access_log")

QUEUE_LINES: Final = 20_000
"""Lines that wait for the disk, about 1 KB each: two seconds at full connection rate. The data
path never waits for them."""

BATCH_LINES: Final = 500
"""Lines written by one system call."""

STDOUT: Final = "-"


class Line(msgspec.Struct, frozen=True):
    """One connection that ended, or one handshake that failed (`handshake`).

    `start` is in seconds since the epoch. `received` came from the client, `sent` went to it.
    """

    start: float
    duration_us: int
    direction: str
    source: str
    destination: str
    hbone_destination: str
    labels: Labels
    received: int
    sent: int
    reason: Reason
    error: str
    policy: str
    handshake: bool = False


class Sink(Protocol):
    def write(self, line: Line, /) -> None:
        """Take a line; must not block."""


def _timestamp(seconds: float) -> str:
    """RFC 3339 in UTC with milliseconds."""
    whole, milliseconds = divmod(round(seconds * 1000), 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{milliseconds:03d}Z"


def _fields(line: Line) -> Iterator[tuple[str, str]]:
    """The reference's keys with their values, empty where nothing is known."""
    yield "src.addr", line.source
    for side, prefix in (("source", "src"), ("destination", "dst")):
        if side == "destination":
            yield "dst.addr", line.destination
            yield "dst.hbone_addr", line.hbone_destination
            yield "dst.service", label_sets.value(line.labels, "destination_service")
        yield f"{prefix}.workload", label_sets.value(line.labels, f"{side}_workload")
        yield f"{prefix}.namespace", label_sets.value(line.labels, f"{side}_workload_namespace")
        yield f"{prefix}.identity", label_sets.value(line.labels, f"{side}_principal")
    yield "direction", line.direction


def json_line(line: Line) -> str:
    record: dict[str, object] = {
        "time": _timestamp(line.start),
        "level": "info" if RESPONSE_FLAGS[line.reason] == NO_FLAG else "error",
        "message": "handshake failed" if line.handshake else "connection complete",
    }
    record.update((key, value) for key, value in _fields(line) if value)
    record["bytes_sent"] = line.sent
    record["bytes_recv"] = line.received
    record["duration"] = f"{line.duration_us / 1000:.0f}ms"
    record["reason"] = line.reason.value
    record["connection_security_policy"] = line.labels[
        label_sets.LABEL_NAMES.index("connection_security_policy")
    ]
    if line.policy:
        record["policy"] = line.policy
    if line.error:
        record["error"] = line.error
    return _escaped(record)


def _escaped(value: object) -> str:
    """Return `value` as JSON of printable ASCII only: json leaves just DEL as it is."""
    return json.dumps(value, separators=(",", ":")).replace("\x7f", "\\u007f")


def text_line(line: Line) -> str:
    policy = line.labels[label_sets.LABEL_NAMES.index("connection_security_policy")]
    mutual = policy == label_sets.MUTUAL_TLS
    origin = label_sets.value(line.labels, "source_principal") if mutual else ""
    destination = label_sets.value(line.labels, "destination_principal") if mutual else ""
    target = line.hbone_destination or line.destination
    kind = "TLS" if line.handshake else "TCP"
    parts = [
        f"[{_timestamp(line.start)}]",
        _escaped(f"{kind} {target}"),
        line.reason.value,
        _escaped(line.error or "-"),
        f"{line.received} {line.sent} {line.duration_us / 1000:.0f}",
        f"mTLS_Origin: {_escaped(origin or '-')}",
        f"mTLS_Destination: {_escaped(destination or '-')}",
        f"connection_security_policy={_escaped(policy)}",
        *(f"{key}={_escaped(value)}" for key, value in _fields(line) if value),
    ]
    if line.policy:
        parts.append(f"policy={_escaped(line.policy)}")
    return " ".join(parts)


class AccessLog:
    """Writes lines to `path` (STDOUT: standard output) on a thread of its own."""

    def __init__(self, path: str, form: Callable[[Line], str], capacity: int = QUEUE_LINES) -> None:
        self._path = path
        self._form = form
        self._queue: queue.Queue[Line | None] = queue.Queue(capacity)
        self._reopen = threading.Event()
        self._stopping = threading.Event()
        self._descriptor = self._open()
        self.written = 0
        self.dropped = 0
        """Lines that found no room or could not be written."""
        self._said = 0
        self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def write(self, line: Line, /) -> None:
        try:
            self._queue.put_nowait(line)
        except queue.Full:
            self.dropped += 1

    def reopen(self) -> None:
        """Open the file anew before the next line: logrotate has moved it away."""
        self._reopen.set()

    def stop(self, timeout: float) -> None:
        """Write what waits, within `timeout` seconds, and close the file."""
        self._stopping.set()
        try:
            self._queue.put(None, timeout=timeout)
        except queue.Full:
            _log.warning("access log did not drain", path=self._path, lines=self._queue.qsize())
        self._thread.join(timeout)

    def _open(self) -> int:
        if self._path == STDOUT:
            return os.dup(sys.stdout.fileno())
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(self._path, flags, 0o640)

    def _run(self) -> None:
        while True:
            batch = self._take()
            if self._reopen.is_set():
                self._reopen.clear()
                self._open_again()
            lines = [line for line in batch if line is not None]
            if lines:
                self._put(lines)
            if None in batch or (self._stopping.is_set() and not batch):
                break
        os.close(self._descriptor)

    def _take(self) -> list[Line | None]:
        """Wait for a line and take those behind it; a look at the flags every second."""
        try:
            batch = [self._queue.get(timeout=1.0)]
        except queue.Empty:
            return []
        while len(batch) < BATCH_LINES:
            try:
                batch.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return batch

    def _open_again(self) -> None:
        try:
            descriptor = self._open()
        except OSError as error:
            _log.error(
                "access log cannot be reopened; the old file stays in use",
                path=self._path,
                error=str(error),
            )
            return
        os.close(self._descriptor)
        self._descriptor = descriptor

    def _put(self, lines: list[Line]) -> None:
        data = "".join(f"{self._form(line)}\n" for line in lines).encode("utf-8", "replace")
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._descriptor, view) :]
            self.written += len(lines)
        except OSError as error:
            self.dropped += len(lines)
            if not self._said:
                _log.error(
                    "access log cannot be written; lines are dropped and counted",
                    path=self._path,
                    error=str(error),
                )
            self._said = self.dropped
            return
        if self.dropped != self._said:
            _log.warning(
                "access log lines were dropped",
                path=self._path,
                lines=self.dropped - self._said,
                total=self.dropped,
            )
            self._said = self.dropped
