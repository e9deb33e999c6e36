"""Lines of ztunnel's access log and audit log, read back: text or JSON, one form out. Pure.

This module owns the reading of both logs' lines and the words in which `nodeagent logs` says them.
It promises that a line which is of neither log, or broken, is no entry and no error; that an
entry's keys are those of the JSON form, whatever form it was read from; and that reading is linear
in the line.

Sources: docs/operations.md (the audit log), docs/access-log.md.
"""

from __future__ import annotations

import enum
import json
import re
from datetime import UTC, datetime, tzinfo
from typing import Any, Final

import msgspec

from nodeagent.cli.text import duration, size

__all__ = ["Entry", "Log", "read", "sentence"]

MAX_LINE: Final = 64 * 1024
"""Characters of a line that is looked at: ours have a few thousand at most."""


class Log(enum.StrEnum):
    ACCESS = "access"
    AUDIT = "audit"


class Entry(msgspec.Struct, frozen=True):
    """One line. `fields` are its values by the keys of the JSON form."""

    log: Log
    time: datetime
    fields: dict[str, Any]

    def text(self, key: str) -> str:
        """Return a value as text, empty if it is not there."""
        value = self.fields.get(key, "")
        return value if isinstance(value, str) else json.dumps(value)

    @property
    def refused(self) -> bool:
        """Whether somebody was turned away or cut by a judgement."""
        if self.log is Log.AUDIT:
            return self.text("verdict") == "UNAUTHORIZED"
        return self.text("reason") in REFUSALS

    @property
    def failed(self) -> bool:
        """Whether it came to nothing, or ended otherwise than the applications wanted."""
        return self.refused or self.text("reason") not in ENDS


REFUSALS: Final = frozenset(
    {
        "strict_requires_mtls",
        "policy_denied",
        "policy_missing",
        "policy_changed",
        "trust_withdrawn",
        "trust_domain_mismatch",
        "identity_mismatch",
        "certificate_missing",
        "certificate_expired",
        "certificate_not_yet_valid",
        "certificate_untrusted",
        "certificate_invalid",
        "foreign_source_address",
        "authority_mismatch",
        "unknown_workload",
        "denied_by_peer",
        "self_call",
    }
)
"""Reasons by which a connection was judged, here or by the peer, and not only failed."""

ENDS: Final = frozenset({"", "-", "closed", "client_reset", "server_reset", "peer_reset"})
"""Reasons of an end that either application chose; "" has who is let in and still connected."""


def read(line: str) -> Entry | None:
    """Return the entry that a line is, None for a line of anything else."""
    text = line.strip()
    if len(text) > MAX_LINE:
        return None
    if text.startswith("{"):
        return _of_json(text)
    return _of_access_text(text) or _of_audit_text(text)


def _of_json(text: str) -> Entry | None:
    try:
        fields = msgspec.json.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    when = _time(str(fields.pop("time", "")))
    if when is None:
        return None
    if "audit_version" in fields:
        return Entry(Log.AUDIT, when, fields)
    if "direction" in fields and "src.addr" in fields:
        return Entry(Log.ACCESS, when, fields)
    return None


_QUOTED: Final = r'"(?:[^"\\]|\\.)*"'
_HEAD: Final = re.compile(
    rf'\[(?P<time>[^\]\s]+)\] "(?P<kind>TCP|TLS) (?P<to>[^"]*)" (?P<reason>\S+) '
    rf"(?:(?P<flags>[A-Z_,]+|-) )?(?P<error>{_QUOTED}) (?P<received>\d+) (?P<sent>\d+) (?P<ms>\d+) "
    r"(?P<rest>.*)",
    re.DOTALL,
)
_AUDIT_HEAD: Final = re.compile(
    rf"(?P<time>\S+) \[\[(?P<node>[^\]\s]*)\]\] WARN "
    rf"(?P<message>(?:SPIFFE (?P<identity>{_QUOTED})|Unknown Identity|\d+)\s"
    rf"(?P<verdict>AUTHORIZED|UNAUTHORIZED)?.*?)(?P<rest> (?:audit_flag: |event=).*)",
    re.DOTALL,
)
_CERTIFICATE: Final = re.compile(r'cert: "(?P<cert>.*?)" (?=audit_flag: "(?:true|false|-)")')
"""Envoy's XFCC has bare quotes in it, where the subject is empty; all others are escaped."""
_FIELD: Final = re.compile(rf"(?P<key>[A-Za-z][\w.]*)(?:=|: )(?P<value>{_QUOTED}|[^\s\"]+)")


def _of_access_text(text: str) -> Entry | None:
    head = _HEAD.fullmatch(text)
    when = _time(head["time"]) if head is not None else None
    if head is None or when is None:
        return None
    opened = head["reason"] == "-"
    message = "connection opened" if opened else "connection complete"
    fields: dict[str, Any] = {
        "message": "handshake failed" if head["kind"] == "TLS" else message,
        "bytes_recv": int(head["received"]),
        "bytes_sent": int(head["sent"]),
        "duration": f"{head['ms']}ms",
    }
    own = {"reason": head["reason"], "response_flags": head["flags"] or "-"}
    own["error"] = _unquoted(head["error"])
    rest = head["rest"]
    certificate = _CERTIFICATE.search(rest)
    if certificate is not None:
        bare = certificate["cert"].replace('Subject="";', r"Subject=\"\";")
        own["cert"] = _unquoted(f'"{bare}"')
        rest = rest[: certificate.start()] + rest[certificate.end() :]
    fields |= {key: value for key, value in own.items() if value != "-"}
    return Entry(Log.ACCESS, when, fields | _fields(rest))


def _of_audit_text(text: str) -> Entry | None:
    head = _AUDIT_HEAD.fullmatch(text)
    when = _time(head["time"]) if head is not None else None
    if head is None or when is None:
        return None
    fields: dict[str, Any] = {"message": head["message"], "node": head["node"]}
    if head["verdict"] and not head["message"][0].isdigit():
        fields["verdict"] = head["verdict"]
    if head["identity"]:
        fields["identity"] = _unquoted(head["identity"])
    policy = re.search(rf"policy=({_QUOTED}|\S+)", head["message"])
    if policy is not None:
        fields["policy"] = _unquoted(policy[1])
    return Entry(Log.AUDIT, when, fields | _fields(head["rest"]))


def _fields(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in _FIELD.finditer(text):
        value = _unquoted(field["value"])
        if field["key"] in {"mTLS_Origin", "mTLS_Destination"}:
            continue
        if field["key"] == "audit_flag" and value == "-":
            continue
        found[field["key"]] = value
    return found


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value[1:-1]


def _time(text: str) -> datetime | None:
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return None
    return when if when.tzinfo is not None else when.replace(tzinfo=UTC)


# --- words --------------------------------------------------------------------------------------


def sentence(entry: Entry, zone: tzinfo | None = None) -> str:
    """Return the line for people: when, at whose side, who to whom, how, and what became of it."""
    parts = [
        entry.time.astimezone(zone).isoformat(sep="T", timespec="milliseconds"),
        "audit" if entry.log is Log.AUDIT else entry.text("direction"),
        f"{_who(entry)} -> {_whom(entry)}",
        _how(entry),
        _end(entry),
    ]
    if entry.text("event") == "left_out" or (entry.log is Log.AUDIT and not entry.text("verdict")):
        parts = [*parts[:2], entry.text("message"), f"cause {entry.text('cause')}"]
    return "  ".join(part for part in parts if part)


def _who(entry: Entry) -> str:
    name = _name(entry, "src")
    address = entry.text("src.addr")
    identity = entry.text("src.identity") or entry.text("identity")
    if name:
        return name
    return f"{identity} ({address})" if identity else address


def _whom(entry: Entry) -> str:
    name = _name(entry, "dst")
    address = entry.text("dst.hbone_addr") or entry.text("dst.addr")
    port = address.rpartition(":")[2]
    return f"{name}:{port}" if name and port else address


def _name(entry: Entry, side: str) -> str:
    namespace, name = entry.text(f"{side}.namespace"), entry.text(f"{side}.workload")
    return f"{namespace}/{name}" if name else ""


def _how(entry: Entry) -> str:
    if entry.text("same_node"):
        return "same node, direct"
    security = entry.text("connection_security_policy")
    return {"mutual_tls": "mutual TLS", "none": "plaintext"}.get(security, security)


def _end(entry: Entry) -> str:
    if entry.log is Log.AUDIT and not entry.refused:
        marked = ", marked by an AUDIT rule" if entry.text("audit_flag") == "true" else ""
        return f"AUTHORIZED by {_policy(entry)}{marked}"
    if entry.text("message") == "connection opened":
        return "opened"
    if not entry.failed:
        return f"{entry.text('reason')} after {_lasted(entry)}, {_bytes(entry)}"
    said = "REFUSED" if entry.refused else "FAILED"
    said = f"{said} {entry.text('reason')}"
    if entry.text("error"):
        said += f": {entry.text('error')}"
    policy = _policy(entry)
    return f"{said}; by {policy}" if policy else said


def _policy(entry: Entry) -> str:
    return entry.text("rule") or entry.text("policy")


def _lasted(entry: Entry) -> str:
    text = entry.text("duration").removesuffix("ms")
    micro = entry.text("duration_us")
    if micro.isascii() and micro.isdigit():
        text = str(int(micro) // 1000)
    if not (text.isascii() and text.isdigit()):
        return text or "?"
    return f"{text}ms" if int(text) < _SECOND_MS else duration(int(text) / _SECOND_MS)


_SECOND_MS: Final = 1000


def _bytes(entry: Entry) -> str:
    def count(key: str) -> str:
        text = entry.text(key)
        return size(int(text)) if text.isascii() and text.isdigit() else "?"

    return f"{count('bytes_recv')} in, {count('bytes_sent')} out"
