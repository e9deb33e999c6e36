"""The access log: a line for each connection at its end, as text or JSON, never in the way.

This module owns the forms of the line; its way to the file is `log_writer`'s. It promises that
`write` returns at once whatever the disk does, that lines which found no room are counted and said,
and that no value can forge a line or a field (control characters and quotes are escaped). It may
not look anything up. What repeats from line to line is put together once (`_json_frame`,
`_text_frame`): each line delays some connection on a busy node. Of connections that end as they
should the core fills in the rest (`AccessLog.form`), and the lines come back ready (`put`).

JSON has the reference's keys (`scope`, `src.addr` … `error`) plus `reason`, `response_flags`,
`connection_security_policy`, `same_node`, `cert`, `policy`, `client`, `audit_flag`, `audit_rules`
and `dry_run`, and `trace_id` of what is traced. Text is Envoy's familiar shape with the same keys
behind it:

    [START] "TCP 10.0.0.2:80" reason FLAGS "error" RECEIVED SENT MS mTLS_Origin: "spiffe://…"
    mTLS_Destination: "spiffe://…" cert: "By=…;Hash=…;Subject="";URI=…" audit_flag: "false"
    key="value" …

`bytes_recv` came from the client, `bytes_sent` went to it; `duration` is in milliseconds. `cert` is
of the client of an HBONE connection that came in (docs/access-log.md).
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

import msgspec

from ztunnel.log_writer import File, Writer
from ztunnel.observe import labels as label_sets
from ztunnel.observe.labels import Labels
from ztunnel.reasons import BROKE_LATER, NO_FLAG, RESPONSE_FLAGS, Reason

__all__ = [
    "FIELDS",
    "AccessLog",
    "Form",
    "Line",
    "Sink",
    "certificate",
    "json_line",
    "quoted",
    "text_line",
]

QUEUE_LINES: Final = 20_000
"""Lines that wait for the disk, about 1 KB each: two seconds at full connection rate. The data
path never waits for them."""

SAME_NODE: Final = "direct"
"""Value of `same_node`, which only lines have of connections that went between two pods of this
node without encryption (setting `same_node: direct`)."""


class Line(msgspec.Struct, frozen=True):
    """One connection that ended, or one HBONE connection that failed by itself (`handshake`).

    With `opened` it is one that has begun: its bytes and duration are those of so far, and there is
    no reason and no error yet.

    `start` is in seconds since the epoch. `received` came from the client, `sent` went to it. What
    was judged, of what comes in: `policy` decided, `client` is the kind of caller, `audit_rules`
    matched, and `dry_run` is what policies of a dry run would have done. `flags` are the metrics'
    `response_flags`. `cert` is what `certificate` returns. `trace` is the id of its trace, in
    hexadecimal, if there is one.
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
    audit_rules: str = ""
    dry_run: str = ""
    flags: str = NO_FLAG
    cert: str = ""
    opened: bool = False
    trace: str = ""


def certificate(by: str, digest: str, subject: str, uri: str) -> str:
    """Return a client's certificate as Envoy spells it (`X-Forwarded-Client-Cert`).

    `by` and `uri` are SPIFFE IDs, in which nothing needs an escape. `digest` is the SHA-256 of the
    client's certificate, DER, in hexadecimal; `subject` is RFC 4514.
    """
    escaped = subject.replace("\\", r"\\").replace('"', r"\"")
    return f'By={by};Hash={digest};Subject="{escaped}";URI={uri}'


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
def quoted(value: str) -> str:
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
        return tuple((key, quoted(value)) for key, value in found if value)

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
        quoted(security),
        quoted(origin or "-"),
        quoted(destination or "-"),
        quoted(SAME_NODE) if label_sets.is_handed_over(labels) else "",
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


def _message(reason: Reason, *, handshake: bool, opened: bool) -> str:
    if opened:
        return '"connection opened"'
    if not handshake:
        return '"connection complete"'
    if reason in BROKE_LATER:
        return '"HBONE connection broken"'
    return '"handshake failed"'


_Judged = tuple[str, str, str, str]
_JUDGED: Final = ("policy", "client", "audit_rules", "dry_run")
_RULES: Final = _JUDGED.index("audit_rules")


def _audit_flag(direction: str, rules: str, *, handshake: bool) -> str:
    """Return whether an AUDIT rule matched; NO_FLAG where none was asked."""
    if handshake or direction != "inbound":
        return NO_FLAG
    return "true" if rules else "false"


def _judged(values: _Judged) -> list[tuple[str, str]]:
    """What was judged, escaped; without what is empty."""
    return [(key, quoted(value)) for key, value in zip(_JUDGED, values, strict=True) if value]


_Told = tuple[Reason, str, str, str, bool]
"""Reason, flags, error and certificate, and whether it has only begun."""


def _repeats(line: Line) -> tuple[str, str, str, Labels, _Told, _Judged, bool]:
    """What of a line is the same in many others, as a key that hashes quickly."""
    return (
        line.direction,
        line.destination,
        line.hbone_destination,
        line.labels,
        (line.reason, line.flags, line.error, line.cert, line.opened),
        (line.policy, line.client, line.audit_rules, line.dry_run),
        line.handshake,
    )


def _unescaped(cert: str) -> str:
    """Return a certificate without the escapes of the quotes around an empty subject.

    That is how Envoy's text has it, and what reads it expects; of a subject that is not empty all
    quotes stay escaped.
    """
    return quoted(cert)[1:-1].replace(_EMPTY_SUBJECT, 'Subject="";')


_EMPTY_SUBJECT: Final = r"Subject=\"\";"


def _constant(text: str) -> str:
    """Return `text` as it must stand in a format string."""
    return text.replace("%", "%%")


@functools.lru_cache(maxsize=MAX_FORMATTED)
def _json_frame(
    direction: str,
    destination: str,
    hbone: str,
    labels: Labels,
    told: _Told,
    judged: _Judged,
    handshake: bool,  # noqa: FBT001 - positional: lru_cache keys keywords at a cost
) -> str:
    """The line with places for time, source, bytes sent and received, and milliseconds."""
    reason, flags, error, cert, opened = told
    known = _known(labels)
    failed = RESPONSE_FLAGS[reason] != NO_FLAG
    before = [
        ("level", '"error"' if failed else '"info"'),
        ("scope", '"access"'),
        ("message", _message(reason, handshake=handshake, opened=opened)),
    ]
    middle = _keyed(known, direction, destination, hbone)
    after = [] if opened else [("reason", f'"{reason.value}"')]
    if flags != NO_FLAG:
        after.append(("response_flags", f'"{flags}"'))
    after.append(("connection_security_policy", known.security))
    if known.same_node:
        after.append(("same_node", known.same_node))
    if cert:
        after.append(("cert", quoted(cert)))
    flag = _audit_flag(direction, judged[_RULES], handshake=handshake)
    if flag != NO_FLAG:
        after.append(("audit_flag", f'"{flag}"'))
    after += _judged(judged)
    if error:
        after.append(("error", quoted(error)))

    def joined(fields: list[tuple[str, str]]) -> str:
        return _constant(",".join([f'"{key}":{value}' for key, value in fields]))

    return (
        f'{{"time":"%s",{joined(before)},"src.addr":"%s",{joined(middle)},'
        f'"bytes_sent":%s,"bytes_recv":%s,"duration":"%sms",{joined(after)}}}'
    )


def json_line(line: Line, varying: _Varying | None = None, /) -> str:
    own = varying or _varying(line)
    frame = _json_frame(*_repeats(line))
    said = frame % (own.time, own.source, own.sent, own.received, own.milliseconds)
    # Not in the frame: it is another one each time.
    return f'{said[:-1]},"trace_id":"{line.trace}"}}' if line.trace else said


@functools.lru_cache(maxsize=MAX_FORMATTED)
def _text_frame(
    direction: str,
    destination: str,
    hbone: str,
    labels: Labels,
    told: _Told,
    judged: _Judged,
    handshake: bool,  # noqa: FBT001 - as _json_frame
) -> str:
    """The line with places for time, bytes received and sent, milliseconds, and source."""
    reason, flags, error, cert, opened = told
    known = _known(labels)
    kind = "TLS" if handshake else "TCP"
    keyed = " ".join(
        [f"{key}={value}" for key, value in _keyed(known, direction, destination, hbone)]
    )
    why = NO_FLAG if opened else reason.value
    head = f'"{kind} {hbone or destination}" {why} {flags} {quoted(error or "-")}'
    flag = _audit_flag(direction, judged[_RULES], handshake=handshake)
    tail = (
        f"mTLS_Origin: {known.mtls_origin} mTLS_Destination: {known.mtls_destination} "
        f'cert: "{_unescaped(cert) or "-"}" audit_flag: "{flag}" '
        f"connection_security_policy={known.security}"
    )
    rest = keyed + (f" same_node={known.same_node}" if known.same_node else "")
    rest += "".join(f" {key}={value}" for key, value in _judged(judged))
    return f'[%s] {_constant(head)} %s %s %s {_constant(tail)} src.addr="%s" {_constant(rest)}'


def text_line(line: Line, varying: _Varying | None = None, /) -> str:
    own = varying or _varying(line)
    frame = _text_frame(*_repeats(line))
    said = frame % (own.time, own.received, own.sent, own.milliseconds, own.source)
    return f'{said} trace_id="{line.trace}"' if line.trace else said


_Given = Sequence[Line] | bytes
"""Lines, or the text of lines that are spelled already."""


class AccessLog:
    """Writes lines to `path` (STDOUT: standard output) on a thread of its own."""

    def __init__(self, path: str, form: Form, capacity: int = QUEUE_LINES) -> None:
        """Raises OSError if the file cannot be opened."""
        self.path = path
        self._form = form
        self._writer: Writer[_Given] = Writer("access log", File(path), self._spelled, capacity)
        self._writer.open()

    @property
    def written(self) -> int:
        return self._writer.written

    @property
    def dropped(self) -> int:
        """Lines that found no room or could not be written."""
        return sum(self._writer.lost.values())

    def start(self) -> None:
        self._writer.start()

    def write(self, lines: Sequence[Line], /) -> None:
        room = self._writer.room
        if len(lines) > room:
            self._writer.overflowed(len(lines) - room)
            lines = lines[:room]
        if lines:
            self._writer.give(lines, len(lines))

    def form(self, lines: Sequence[Line], /) -> bytes:
        return "".join(f"{self._form(line, _PLACES)}\n" for line in lines).encode()

    def put(self, text: bytes, count: int, /) -> None:
        self._writer.give(text, count)

    def reopen(self) -> None:
        """Open the file anew before the next line: logrotate has moved it away."""
        self._writer.reopen()

    def stop(self, timeout: float) -> None:
        """Write what waits, within `timeout` seconds, and close the file."""
        self._writer.finish()
        self._writer.join(timeout)

    def _spelled(self, given: _Given) -> bytes:
        if isinstance(given, bytes):
            return given
        return "".join(f"{self._form(line)}\n" for line in given).encode("utf-8", "replace")
