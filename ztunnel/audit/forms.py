"""How an audit line is spelled: as people read it, as JSON, and as fields for other forms.

This module owns the names and the order of the fields. It promises that they are only added to
(`VERSION` is raised otherwise), that each line is printable ASCII, and that no value forges a line
or a field: of names, identities and paths whatever is not printable, and every quote, is escaped as
JSON does it. It is pure.

Text is the well-known form, with what else is known behind it:

    TIME [[NODE]] WARN SPIFFE "spiffe://…" AUTHORIZED|UNAUTHORIZED policy=NAME audit_flag: "…" …
    TIME [[NODE]] WARN Unknown Identity UNAUTHORIZED policy=NAME audit_flag: "…" …
    TIME [[NODE]] WARN NUMBER AUTHORIZED|UNAUTHORIZED lines left out event="left_out" cause="…"

The word WARN is a part of that form. How serious a line is, JSON, syslog and the journal say: a
refusal is a warning, an AUDIT rule that matched a notice, all else information.
"""

from __future__ import annotations

import enum
import functools
import json
import re
import time
from collections.abc import Sequence
from typing import Final

import msgspec

from ztunnel.audit.entry import Entry, Event
from ztunnel.authorize import Verdict
from ztunnel.observe import labels as label_sets
from ztunnel.observe.access_log import quoted
from ztunnel.policy import DryRun, Match

__all__ = [
    "VERSION",
    "Field",
    "LeftOut",
    "Line",
    "Severity",
    "fields",
    "json_line",
    "message",
    "severity",
    "severity_of",
    "text_line",
    "timestamp",
]

VERSION: Final = 1
"""Of the fields. Raised when one changes its meaning or goes away."""

MAX_VALUE: Final = 1000
"""Characters of one value: a path may have 4,096, and a datagram must take the line."""

Value = str | int | tuple[str, ...]
Field = tuple[str, Value]


class Severity(enum.IntEnum):
    """RFC 5424, table 2; the journal's priorities are the same numbers."""

    WARNING = 4
    NOTICE = 5
    INFO = 6


class LeftOut(msgspec.Struct, frozen=True):
    """So many lines were not written. `cause` is why; `what` they were, "" for all kinds."""

    time: float
    lines: int
    cause: str
    what: str = ""


Line = Entry | LeftOut


@functools.lru_cache(maxsize=4)
def _second(whole: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole))


def timestamp(seconds: float) -> str:
    """RFC 3339 in UTC with microseconds, which is what RFC 5424 (6.2.3) allows at most."""
    whole, microseconds = divmod(round(seconds * 1_000_000), 1_000_000)
    return f"{_second(whole)}.{microseconds:06d}Z"


def severity_of(verdict: Verdict | None) -> Severity:
    """Return how serious a line on `verdict` is; None: the caller never got that far."""
    if verdict is None or not verdict.allow:
        return Severity.WARNING
    return Severity.NOTICE if verdict.audits else Severity.INFO


def severity(line: Line) -> Severity:
    return Severity.WARNING if isinstance(line, LeftOut) else severity_of(line.verdict)


_PLAIN: Final = re.compile(r"[A-Za-z0-9._:-]+")


def message(line: Line) -> str:
    """Return the sentence of the line: who, what became of it, and by which policy."""
    if isinstance(line, LeftOut):
        what = f"{line.what} lines" if line.what else "lines"
        return f"{line.lines} {what} left out"
    who = f"SPIFFE {quoted(line.identity)}" if line.identity else "Unknown Identity"
    name = line.policy.name
    named = name if _PLAIN.fullmatch(name) else quoted(name)
    return f"{who} {_word(allow=line.allow)} policy={named}"


def _word(*, allow: bool) -> str:
    return "AUTHORIZED" if allow else "UNAUTHORIZED"


def fields(line: Line) -> list[Field]:
    """Return what is known, in the order of every form; what is not known is left out."""
    if isinstance(line, LeftOut):
        return [("event", "left_out"), ("cause", line.cause), ("lines", line.lines)]
    found = [*_judged(line), *_parties(line), *_traffic(line)]
    return [(key, _bounded(value)) for key, value in found if value not in ("", ())]


def _bounded(value: Value) -> Value:
    match value:
        case str() if len(value) > MAX_VALUE:
            return f"{value[:MAX_VALUE]}…"
        case tuple():
            return tuple(str(_bounded(each)) for each in value)
        case _:
            return value


def _judged(entry: Entry) -> list[Field]:
    verdict = entry.verdict
    audits = verdict.audits if verdict is not None else ()
    dry_run = verdict.dry_run if verdict is not None else None
    mode = verdict.mode if verdict is not None else None
    return [
        ("audit_flag", "true" if audits else "false"),
        ("event", entry.event.value),
        ("verdict", _word(allow=entry.allow)),
        ("identity", entry.identity),
        ("client", entry.client.value),
        ("policy", entry.policy.name),
        ("policy_namespace", entry.policy.namespace),
        ("rule", entry.policy.origin),
        ("mode", mode.value if mode is not None else ""),
        *_matches("audit", audits),
        *_would(dry_run),
    ]


def _matches(prefix: str, audits: Sequence[Match]) -> list[Field]:
    unread = [field for audit in audits for field in audit.unread]
    return [
        (f"{prefix}_rules", tuple(audit.origin for audit in audits)),
        # Of layer 7, and not looked at: the rule may mean less than it matched here.
        (f"{prefix}_without", tuple(dict.fromkeys(unread))),
    ]


def _would(dry_run: DryRun | None) -> list[Field]:
    if dry_run is None:
        return []
    return [
        ("dry_run", _word(allow=dry_run.allow)),
        ("dry_run_rule", dry_run.origin),
        *_matches("dry_run_audit", dry_run.audits),
    ]


def _parties(entry: Entry) -> list[Field]:
    line = entry.line

    def known(name: str) -> str:
        return label_sets.value(line.labels, name)

    return [
        ("src.addr", line.source),
        ("src.workload", known("source_workload")),
        ("src.namespace", known("source_workload_namespace")),
        ("dst.addr", line.hbone_destination or line.destination),
        ("dst.workload", known("destination_workload")),
        ("dst.namespace", known("destination_workload_namespace")),
        ("dst.service", known("destination_service")),
        ("dst.identity", known("destination_principal")),
        ("connection_security_policy", known("connection_security_policy")),
    ]


def _traffic(entry: Entry) -> list[Field]:
    line = entry.line
    if entry.event is Event.CALLER:
        return []
    found: list[Field] = [("reason", line.reason.value), ("error", line.error)]
    if entry.event is Event.CONNECTION:
        found += [
            ("duration_us", line.duration_us),
            ("bytes_recv", line.received),
            ("bytes_sent", line.sent),
        ]
    return found


def json_line(line: Line, node: str) -> str:
    head: list[Field] = [
        ("time", timestamp(line.time)),
        ("level", severity(line).name.lower()),
        ("message", message(line)),
        ("node", node),
        ("audit_version", VERSION),
    ]
    spelled = json.dumps(dict(head + fields(line)), separators=(",", ":"))
    return spelled.replace("\x7f", "\\u007f")


_IN_MESSAGE: Final = frozenset({"audit_flag", "verdict", "identity", "policy", "lines"})


def text_line(line: Line, node: str) -> str:
    found = fields(line)
    flag = [f"audit_flag: {quoted(str(value))}" for key, value in found if key == "audit_flag"]
    rest = [f"{key}={_text(value)}" for key, value in found if key not in _IN_MESSAGE]
    head = f"{timestamp(line.time)} [[{node}]] WARN {message(line)}"
    return " ".join([head, *flag, *rest])


def _text(value: Value) -> str:
    match value:
        case tuple():
            return quoted("; ".join(value))
        case int():
            return str(value)
        case _:
            return quoted(value)
