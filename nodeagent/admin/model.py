"""The published shape of `/status`: values only.

This module owns the types that `/status` encodes and `nodeagent status` decodes. It promises that
within one `SCHEMA` fields are only added, never renamed, retyped or removed. Times are RFC 3339 in
UTC. Nothing in here is a secret. Pure: no sockets, no clocks.
"""

from __future__ import annotations

import enum
from collections import Counter
from datetime import datetime
from typing import Any, Final

import msgspec

__all__ = [
    "SCHEMA",
    "AuthorizationReport",
    "CertificateReport",
    "ConfigReport",
    "OlderReport",
    "PodReport",
    "PodState",
    "PortMode",
    "Problem",
    "RecordingReport",
    "Status",
    "UnenforcedReport",
    "ZtunnelReport",
    "pods_by_state",
]

SCHEMA: Final = 1
"""Raised when a field changes its meaning; readers refuse what they do not know."""


class PodState(enum.StrEnum):
    """Where a pod stands. Closed: metrics have one series for each."""

    WAITING = "Waiting"
    """Its network namespace does not exist yet."""
    ENROLLING = "Enrolling"
    ENROLLED = "Enrolled"
    """Captured, and the last audit found it as it must be."""
    DEGRADED = "Degraded"
    """Captured, but the last audit found something that could not be put right: closed there."""
    FAILED = "Failed"
    """Not captured; tried again with backoff."""
    REMOVING = "Removing"


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """A document that was refused; its file's last good version stays in force."""

    file: str
    line: int
    column: int
    field: str
    reason: str


class PortMode(msgspec.Struct, frozen=True, kw_only=True):
    port: int
    mode: str
    origin: str


class AuthorizationReport(msgspec.Struct, frozen=True, kw_only=True):
    """A policy on who may call. `policy` is "kind/namespace/name", `origin` has file and line."""

    policy: str
    action: str
    origin: str
    dry_run: bool = False


class CertificateReport(msgspec.Struct, frozen=True, kw_only=True):
    """One identity of this node. `error` is the last renewal's, empty after a success.

    `failures` counts since the last success, `failed` since the start, as `renewals` does.
    """

    identity: str
    not_before: datetime | None = None
    not_after: datetime | None = None
    renewals: int = 0
    failures: int = 0
    error: str = ""
    failed: int = 0


class OlderReport(msgspec.Struct, frozen=True, kw_only=True):
    """Connections to a pod that are older than its capture; without address: those that are left.

    Nobody has judged them; they end where their port becomes STRICT.
    """

    source: str
    port: int
    connections: int


class PodReport(msgspec.Struct, frozen=True, kw_only=True):
    """One bound workload. `repaired` counts deviations that audits have put right since start."""

    workload: str
    identity: str
    netns: str
    state: PodState
    since: datetime
    uid: str = ""
    netns_cookie: int = 0
    addresses: tuple[str, ...] = ()
    mode: str = ""
    mode_origin: str = ""
    port_modes: tuple[PortMode, ...] = ()
    certificate: CertificateReport | None = None
    error: str = ""
    deviations: tuple[str, ...] = ()
    repaired: int = 0
    drops: dict[str, int] = {}
    """What the capture has refused since enrolment, by reason."""
    authorizations: tuple[AuthorizationReport, ...] = ()
    """In the order in which they are asked."""
    older: tuple[OlderReport, ...] = ()
    """Who is connected to it since before its capture."""


class DrainReport(msgspec.Struct, frozen=True, kw_only=True):
    """A replaced ztunnel that serves what it still carries; None: it has not said how much.

    `cut` counts the connections that the drain's deadline has ended.
    """

    pid: int
    since: datetime
    connections: int | None = None
    hbone_connections: int | None = None
    cut: int = 0


class ZtunnelReport(msgspec.Struct, frozen=True, kw_only=True):
    """The seam, and what ztunnel says of itself: `own`, by ztunnel's schema, or `error`."""

    connected: bool
    pid: int = 0
    since: datetime | None = None
    wanted_version: int = 0
    acknowledged_version: int = 0
    rejected: str = ""
    rejections: int = 0
    oversized: tuple[str, ...] = ()
    own: dict[str, Any] | None = None
    error: str = ""
    draining: tuple[DrainReport, ...] = ()


class UnenforcedReport(msgspec.Struct, frozen=True, kw_only=True):
    """An AuthorizationPolicy ("namespace/name") that is in force otherwise than it is written.

    `fields` are those that are not evaluated, `effect` says what is done instead.
    """

    policy: str
    action: str
    origin: str
    fields: tuple[str, ...]
    effect: str


class ConfigReport(msgspec.Struct, frozen=True, kw_only=True):
    source: str
    loaded: bool
    version: int = 0
    documents: int = 0
    problems: tuple[Problem, ...] = ()
    warnings: tuple[str, ...] = ()
    unresolved: tuple[Problem, ...] = ()
    """References of documents in force that lead nowhere: what depends on them is closed."""
    unenforced: tuple[UnenforcedReport, ...] = ()


class RecordingReport(msgspec.Struct, frozen=True, kw_only=True):
    """How the recording of callers goes: reports of flows since start, and bytes on the disk.

    `lost` reports could not be written. `problem` is why, empty while it works.
    """

    recorded: int
    lost: int
    bytes: int
    problem: str = ""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """`missing` names what keeps the node from being ready; `ready` is its emptiness.

    `same_node` is how two pods of this node are joined: "hbone", or "direct", not encrypted.
    """

    schema: int
    time: datetime
    version: str
    node: str
    cluster: str
    trust_domain: str
    pid: int
    started: datetime
    ready: bool
    missing: tuple[str, ...]
    same_node: str = "hbone"
    ztunnel: ZtunnelReport
    config: ConfigReport
    pods: tuple[PodReport, ...] = ()
    certificates: tuple[CertificateReport, ...] = ()
    recording: RecordingReport | None = None
    """None: the settings do not ask for it (`flows.retention_hours: 0`)."""


def pods_by_state(pods: tuple[PodReport, ...]) -> dict[PodState, int]:
    """Return a number for every state, zero included."""
    counts = Counter(pod.state for pod in pods)
    return {state: counts[state] for state in PodState}
