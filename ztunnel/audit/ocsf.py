"""An audit line as an event of the Open Cybersecurity Schema Framework, for a SIEM.

This module owns the mapping. It promises events of OCSF 1.4.0 (schema.ocsf.io) with every attribute
that is required there: Network Activity (4001) with the profiles `security_control` and `host`, and
the base event (0) for lines that were left out. What the schema has no attribute for is in
`unmapped`, by the names of `forms`: nothing is lost. Each line is printable ASCII, and no value
forges another. It is pure.
"""

from __future__ import annotations

import enum
import functools
import importlib.metadata
import json
from typing import Any, Final

from ztunnel.audit.entry import Entry, Event
from ztunnel.audit.forms import Line, Severity, fields, message, severity
from ztunnel.reasons import NO_FLAG, RESPONSE_FLAGS, Reason

__all__ = ["SCHEMA", "ocsf_line"]

SCHEMA: Final = "1.4.0"
"""The first with the account that owns an endpoint, and with a policy beside what it decided."""

_CLASS: Final = 4001
_CATEGORY: Final = 4
_OTHER: Final = 99
_TCP: Final = 6
_INBOUND: Final = 1
_SERVER: Final = 1
"""`device.type_id`."""

_SEVERITIES: Final = {Severity.INFO: (1, "Informational"), Severity.NOTICE: (2, "Low")}
_WARNING: Final = (3, "Medium")


class _Activity(enum.IntEnum):
    """`activity_id`; its caption is the name."""

    OPEN = 1
    CLOSE = 2
    RESET = 3
    FAIL = 4
    REFUSE = 5


_CUTS: Final = frozenset({Reason.POLICY_CHANGED, Reason.TRUST_WITHDRAWN})

_ALLOWED: Final = {
    "action_id": 1,
    "action": "Allowed",
    "disposition_id": 1,
    "disposition": "Allowed",
}
_BLOCKED: Final = {
    "action_id": 2,
    "action": "Denied",
    "disposition_id": 2,
    "disposition": "Blocked",
}
_REVOKED: Final = {
    "action_id": 2,
    "action": "Denied",
    "disposition_id": 24,
    "disposition": "Access Revoked",
}

_MAPPED: Final = frozenset(
    {
        "bytes_recv",
        "bytes_sent",
        "dst.addr",
        "dst.identity",
        "dst.namespace",
        "dst.service",
        "dst.workload",
        "duration_us",
        "error",
        "event",
        "identity",
        "policy",
        "policy_namespace",
        "reason",
        "rule",
        "src.addr",
        "src.namespace",
        "src.workload",
        "verdict",
    }
)
"""Fields of `forms` that have a place in the schema."""

Attributes = dict[str, Any]


def ocsf_line(line: Line, node: str) -> str:
    """Return the event of `line` as JSON. `node` is where it comes from, "" if that has no name."""
    known = dict(fields(line))
    event = _common(line, node)
    if isinstance(line, Entry):
        event |= _network(line, known)
    else:
        event |= {
            "activity_id": _OTHER,
            "activity_name": "Lines left out",
            "category_uid": 0,
            "class_uid": 0,
            "type_uid": _OTHER,
        }
    rest = {key: value for key, value in known.items() if key not in _MAPPED}
    if rest:
        event["unmapped"] = rest
    return json.dumps(event, separators=(",", ":")).replace("\x7f", "\\u007f")


def _common(line: Line, node: str) -> Attributes:
    number, name = _SEVERITIES.get(severity(line), _WARNING)
    profiles = ["security_control"] if isinstance(line, Entry) else []
    found: Attributes = {
        "time": round(line.time * 1000),
        "severity_id": number,
        "severity": name,
        "message": message(line),
        "metadata": {
            "version": SCHEMA,
            "product": {"name": "ztunnel", "vendor_name": "nodeagent", "version": _version()},
            "log_name": "audit",
            "event_code": line.event.value if isinstance(line, Entry) else "left_out",
            "profiles": profiles,
        },
    }
    if node:
        profiles.append("host")
        found["device"] = {"hostname": node, "type_id": _SERVER, "type": "Server"}
    return found


@functools.cache
def _version() -> str:
    return importlib.metadata.version("nodeagent")


def _network(entry: Entry, known: dict[str, Any]) -> Attributes:
    activity = _activity(entry)
    name = activity.name.capitalize()
    failed = not entry.allow or RESPONSE_FLAGS[entry.line.reason] != NO_FLAG
    found: Attributes = {
        "category_uid": _CATEGORY,
        "category_name": "Network Activity",
        "class_uid": _CLASS,
        "class_name": "Network Activity",
        "activity_id": int(activity),
        "activity_name": name,
        "type_uid": _CLASS * 100 + activity,
        "type_name": f"Network Activity: {name}",
        "status_id": 2 if failed else 1,
        "status": "Failure" if failed else "Success",
        **_disposition(entry),
        "src_endpoint": _endpoint(known, "src", known.get("identity")),
        "dst_endpoint": _endpoint(known, "dst", known.get("dst.identity")),
        "connection_info": {
            "direction_id": _INBOUND,
            "direction": "Inbound",
            "protocol_num": _TCP,
            "protocol_name": "tcp",
        },
        "policy": _policy(known),
    }
    if "reason" in known:
        found["status_code"] = known["reason"]
    if "error" in known:
        found["status_detail"] = known["error"]
    if "duration_us" in known:
        received, sent = known["bytes_recv"], known["bytes_sent"]
        found["duration"] = round(known["duration_us"] / 1000)
        found["traffic"] = {"bytes_in": sent, "bytes_out": received, "bytes": received + sent}
    return found


def _activity(entry: Entry) -> _Activity:
    reason = entry.line.reason
    if entry.event is Event.CALLER:
        return _Activity.OPEN
    if entry.event is Event.HANDSHAKE:
        return _Activity.FAIL
    if not entry.allow:
        return _Activity.RESET if reason in _CUTS else _Activity.REFUSE
    if reason is Reason.CLOSED:
        return _Activity.CLOSE
    return _Activity.RESET if RESPONSE_FLAGS[reason] == NO_FLAG else _Activity.FAIL


def _disposition(entry: Entry) -> Attributes:
    if entry.allow:
        return _ALLOWED
    cut = entry.event is Event.CONNECTION and entry.line.reason in _CUTS
    return _REVOKED if cut else _BLOCKED


def _endpoint(known: dict[str, Any], side: str, identity: str | None) -> Attributes:
    """`name` is the workload, `owner` whom its key has proved it to be: its service account."""
    host, port = _address(known.get(f"{side}.addr", ""))
    found: Attributes = {"ip": host} if host else {}
    if port:
        found["port"] = port
    if f"{side}.workload" in known:
        namespace = known.get(f"{side}.namespace", "")
        found["name"] = f"{namespace}/{known[f'{side}.workload']}"
    if identity:
        found["owner"] = {"uid": identity}
    if f"{side}.service" in known:
        found["svc_name"] = known[f"{side}.service"]
    return found


def _address(text: str) -> tuple[str, int]:
    """Split "A.B.C.D:P" or "[V6]:P"; a caller has no port (0)."""
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, "0"
    return host.removeprefix("[").removesuffix("]"), int(port)


def _policy(known: dict[str, Any]) -> Attributes:
    found: Attributes = {"name": known["policy"], "is_applied": True}
    if "policy_namespace" in known:
        found["uid"] = f"{known['policy_namespace']}/{known['policy']}"
    if "rule" in known:
        found["desc"] = known["rule"]
    return found
