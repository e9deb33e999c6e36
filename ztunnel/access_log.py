"""The access log: one line for each connection at its end, as text or JSON, never in the way.

This module owns the forms of the line and its way to the file. It promises that `write` returns at
once whatever the disk does (a bounded queue and one thread that formats and writes), that lines
which found no room are counted and said, that no value can forge a line or a field (control
characters and quotes are escaped), and that the file is reopened when asked, for logrotate. It may
not look anything up. What repeats from line to line is put together once (`_json_frame`,
`_text_frame`): each line delays some connection on a busy node. Of connections that end as they
should the core fills in the rest (`AccessLog.form`), and the lines come back ready (`put`).

JSON has the reference's keys (`src.addr` … `error`) plus `reason`, `connection_security_policy`,
`same_node`, `policy`, `client`, `audit_flag` and `dry_run`. Text is Envoy's familiar shape with the
same keys behind it:

    [START] "TCP 10.0.0.2:80" reason "error" RECEIVED SENT MS mTLS_Origin: "spiffe://…"
    mTLS_Destination: "spiffe://…" key="value" …

`bytes_recv` came from the client, `bytes_sent` went to it; `duration` is in milliseconds.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

import msgspec
import structlog

from ztunnel import labels as label_sets
from ztunnel.labels import Labels
from ztunnel.reasons import NO_FLAG, RESPONSE_FLAGS, Reason

__all__ = ["FIELDS", "AccessLog", "Form", "Line", "Sink", "json_line", "text_line"]

_log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("ztunnel.access_log")

QUEUE_LINES: Final = 20_000
"""Lines that wait for the disk, about 1 KB each: two seconds at full connection rate. The data
path never waits for them."""

BATCH_LINES: Final = 500
"""Lines after which a system call writes what has been taken."""

STDOUT: Final = "-"

SAME_NODE: Final = "direct"
"""Value of `same_node`, which only lines have of connections that went between two pods of this
node without encryption (setting `same_node: direct`)."""


class Line(msgspec.Struct, frozen=True):
    """One connection that ended, or one HBONE connection that failed by itself (`handshake`).

    `start` is in seconds since the epoch. `received` came from the client, `sent` went to it. What
    was judged, of what comes in: `policy` decided, `client` is the kind of caller, `audit_flag` are
    the AUDIT rules that matched, and `dry_run` is what policies of a dry run would have done.
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
    client: str = ""
    audit_flag: str = ""
    dry_run: str = ""


class _Varying(NamedTuple):
    """What differs between the lines of connections under one decision, as it is spelled."""

    time: str
    source: str
    received: str
    sent: str
    milliseconds: str


FIELDS: Final = _Varying._fields
"""In the order of the core's LINE_FIELDS."""

_PLACES: Final = _Varying(*(chr(number) for number in range(1, len(FIELDS) + 1)))
"""What stands for each in a form. Nothing else in a line is a control character."""


class Sink(Protocol):
    def write(self, lines: Sequence[Line], /) -> None:
        """Take the lines of one turn; must not block."""

    def form(self, lines: Sequence[Line], /) -> bytes:
        """Return `lines` as `_core.Core.describe` takes them: with places for what differs."""

    def put(self, text: bytes, count: int, /) -> None:
        """Take `count` lines that are ready, each with its line feed; must not block."""


class Form(Protocol):
    def __call__(self, line: Line, varying: _Varying | None = None, /) -> str:
        """Spell a line; `varying` instead of the line's own."""


MAX_FORMATTED: Final = 1024
"""Label sets, texts and frames kept in their escaped form: a busy node repeats a few hundred."""


@functools.lru_cache(maxsize=4)
def _second(whole: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole))


def _timestamp(seconds: float) -> str:
    """RFC 3339 in UTC with milliseconds."""
    whole, milliseconds = divmod(round(seconds * 1000), 1000)
    return f"{_second(whole)}.{milliseconds:03d}Z"


@functools.lru_cache(maxsize=MAX_FORMATTED)
def _escaped(value: str) -> str:
    """Return `value` in quotes, printable ASCII only, as JSON spells it (json leaves DEL as is)."""
    return json.dumps(value).replace("\x7f", "\\u007f")


class _Known(NamedTuple):
    """What a label set contributes to each of its lines, escaped."""

    source: tuple[tuple[str, str], ...]
    destination: tuple[tuple[str, str], ...]
    security: str
    mtls_origin: str
    mtls_destination: str
    same_node: str


@functools.lru_cache(maxsize=MAX_FORMATTED)
def _known(labels: Labels) -> _Known:
    def some(keys: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        found = ((key, label_sets.value(labels, name)) for key, name in keys)
        return tuple((key, _escaped(value)) for key, value in found if value)

    security = label_sets.value(labels, "connection_security_policy") or label_sets.UNKNOWN
    mutual = security == label_sets.MUTUAL_TLS
    origin = label_sets.value(labels, "source_principal") if mutual else ""
    destination = label_sets.value(labels, "destination_principal") if mutual else ""
    return _Known(
        some(
            (
                ("src.workload", "source_workload"),
                ("src.namespace", "source_workload_namespace"),
                ("src.identity", "source_principal"),
            )
        ),
        some(
            (
                ("dst.service", "destination_service"),
                ("dst.workload", "destination_workload"),
                ("dst.namespace", "destination_workload_namespace"),
                ("dst.identity", "destination_principal"),
            )
        ),
        _escaped(security),
        _escaped(origin or "-"),
        _escaped(destination or "-"),
        _escaped(SAME_NODE) if label_sets.is_handed_over(labels) else "",
    )


def _varying(line: Line) -> _Varying:
    return _Varying(
        _timestamp(line.start),
        line.source,
        str(line.received),
        str(line.sent),
        f"{line.duration_us / 1000:.0f}",
    )


def _keyed(known: _Known, direction: str, destination: str, hbone: str) -> list[tuple[str, str]]:
    """The reference's keys with their escaped values; what is not known is left out.

    Addresses and directions are our own spelling: nothing in them needs an escape.
    """
    fields = [*known.source, ("dst.addr", f'"{destination}"')]
    if hbone:
        fields.append(("dst.hbone_addr", f'"{hbone}"'))
    fields += known.destination
    fields.append(("direction", f'"{direction}"'))
    return fields


_BROKE_LATER: Final = frozenset(
    {Reason.H2_LIMIT, Reason.H2_PROTOCOL, Reason.KEEPALIVE_TIMEOUT, Reason.TRUST_WITHDRAWN}
)
"""Ends of an HBONE connection whose handshake was complete."""


def _message(reason: Reason, *, handshake: bool) -> str:
    if not handshake:
        return '"connection complete"'
    if reason in _BROKE_LATER:
        return '"HBONE connection broken"'
    return '"handshake failed"'


_Judged = tuple[str, str, str, str]
_JUDGED: Final = ("policy", "client", "audit_flag", "dry_run")


def _judged(values: _Judged) -> list[tuple[str, str]]:
    """What was judged, escaped; without what is empty."""
    return [(key, _escaped(value)) for key, value in zip(_JUDGED, values, strict=True) if value]


def _repeats(line: Line) -> tuple[str, str, str, Labels, Reason, str, _Judged, bool]:
    """What of a line is the same in many others, as a key that hashes quickly."""
    return (
        line.direction,
        line.destination,
        line.hbone_destination,
        line.labels,
        line.reason,
        line.error,
        (line.policy, line.client, line.audit_flag, line.dry_run),
        line.handshake,
    )


def _constant(text: str) -> str:
    """Return `text` as it must stand in a format string."""
    return text.replace("%", "%%")


@functools.lru_cache(maxsize=MAX_FORMATTED)
def _json_frame(
    direction: str,
    destination: str,
    hbone: str,
    labels: Labels,
    reason: Reason,
    error: str,
    judged: _Judged,
    handshake: bool,  # noqa: FBT001 - positional: lru_cache keys keywords at a cost
) -> str:
    """The line with places for time, source, bytes sent and received, and milliseconds."""
    known = _known(labels)
    failed = RESPONSE_FLAGS[reason] != NO_FLAG
    before = [
        ("level", '"error"' if failed else '"info"'),
        ("message", _message(reason, handshake=handshake)),
    ]
    middle = _keyed(known, direction, destination, hbone)
    after = [("reason", f'"{reason.value}"'), ("connection_security_policy", known.security)]
    if known.same_node:
        after.append(("same_node", known.same_node))
    after += _judged(judged)
    if error:
        after.append(("error", _escaped(error)))

    def joined(fields: list[tuple[str, str]]) -> str:
        return _constant(",".join([f'"{key}":{value}' for key, value in fields]))

    return (
        f'{{"time":"%s",{joined(before)},"src.addr":"%s",{joined(middle)},'
        f'"bytes_sent":%s,"bytes_recv":%s,"duration":"%sms",{joined(after)}}}'
    )


def json_line(line: Line, varying: _Varying | None = None, /) -> str:
    own = varying or _varying(line)
    frame = _json_frame(*_repeats(line))
    return frame % (own.time, own.source, own.sent, own.received, own.milliseconds)


@functools.lru_cache(maxsize=MAX_FORMATTED)
def _text_frame(
    direction: str,
    destination: str,
    hbone: str,
    labels: Labels,
    reason: Reason,
    error: str,
    judged: _Judged,
    handshake: bool,  # noqa: FBT001 - as _json_frame
) -> str:
    """The line with places for time, bytes received and sent, milliseconds, and source."""
    known = _known(labels)
    kind = "TLS" if handshake else "TCP"
    keyed = " ".join(
        [f"{key}={value}" for key, value in _keyed(known, direction, destination, hbone)]
    )
    head = f'"{kind} {hbone or destination}" {reason.value} {_escaped(error or "-")}'
    tail = (
        f"mTLS_Origin: {known.mtls_origin} mTLS_Destination: {known.mtls_destination} "
        f"connection_security_policy={known.security}"
    )
    rest = keyed + (f" same_node={known.same_node}" if known.same_node else "")
    rest += "".join(f" {key}={value}" for key, value in _judged(judged))
    return f'[%s] {_constant(head)} %s %s %s {_constant(tail)} src.addr="%s" {_constant(rest)}'


def text_line(line: Line, varying: _Varying | None = None, /) -> str:
    own = varying or _varying(line)
    frame = _text_frame(*_repeats(line))
    return frame % (own.time, own.received, own.sent, own.milliseconds, own.source)


class _Ready(NamedTuple):
    """Lines that are spelled already."""

    text: bytes
    lines: int


class AccessLog:
    """Writes lines to `path` (STDOUT: standard output) on a thread of its own."""

    def __init__(self, path: str, form: Form, capacity: int = QUEUE_LINES) -> None:
        self._path = path
        self._form = form
        self._queue: queue.SimpleQueue[Sequence[Line] | _Ready | None] = queue.SimpleQueue()
        self._capacity = capacity
        self._given = 0  # lines, by the thread that writes here
        self._taken = 0  # lines, by the thread that formats
        self._reopen = threading.Event()
        self._descriptor = self._open()
        self.written = 0
        self.dropped = 0
        """Lines that found no room or could not be written."""
        self._said = 0
        self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def write(self, lines: Sequence[Line], /) -> None:
        room = self._capacity - (self._given - self._taken)
        if len(lines) > room:
            self.dropped += len(lines) - room
            lines = lines[:room]
        if lines:
            self._given += len(lines)
            self._queue.put(lines)

    def form(self, lines: Sequence[Line], /) -> bytes:
        return "".join(f"{self._form(line, _PLACES)}\n" for line in lines).encode()

    def put(self, text: bytes, count: int, /) -> None:
        if count > self._capacity - (self._given - self._taken):
            self.dropped += count
            return
        self._given += count
        self._queue.put(_Ready(text, count))

    def reopen(self) -> None:
        """Open the file anew before the next line: logrotate has moved it away."""
        self._reopen.set()

    def stop(self, timeout: float) -> None:
        """Write what waits, within `timeout` seconds, and close the file."""
        self._queue.put(None)
        self._thread.join(timeout)
        if self._thread.is_alive():
            _log.warning(
                "access log did not drain", path=self._path, lines=self._given - self._taken
            )

    def _open(self) -> int:
        if self._path == STDOUT:
            return os.dup(sys.stdout.fileno())
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(self._path, flags, 0o640)

    def _run(self) -> None:
        last = False
        while not last:
            ready, last = self._take()
            if self._reopen.is_set():
                self._reopen.clear()
                self._open_again()
            if ready.lines:
                self._write(ready)
        os.close(self._descriptor)

    def _take(self) -> tuple[_Ready, bool]:
        """Wait for lines and take those behind them; True with the last ones there will be.

        Returns without any once a second, to look at the flags.
        """
        texts: list[bytes] = []
        count, last = 0, False
        with contextlib.suppress(queue.Empty):
            given = self._queue.get(timeout=1.0)
            while given is not None:
                lines = given.lines if isinstance(given, _Ready) else len(given)
                self._taken += lines
                count += lines
                texts.append(given.text if isinstance(given, _Ready) else self._spelled(given))
                if count >= BATCH_LINES:
                    break
                given = self._queue.get_nowait()
            last = given is None
        return _Ready(b"".join(texts), count), last

    def _spelled(self, lines: Sequence[Line]) -> bytes:
        return "".join(f"{self._form(line)}\n" for line in lines).encode("utf-8", "replace")

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

    def _write(self, ready: _Ready) -> None:
        try:
            view = memoryview(ready.text)
            while view:
                view = view[os.write(self._descriptor, view) :]
            self.written += ready.lines
        except OSError as error:
            self.dropped += ready.lines
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
