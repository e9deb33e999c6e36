"""The settings of a node, as far as ztunnel must know them: part of the seam.

This module owns their types and defaults. It promises what `ztunnel.protocol` promises of its
messages, which carry them: they are strict and bounded. It may not read a file; who writes them
does that, and checks ranges.
"""

from __future__ import annotations

import enum

import msgspec

__all__ = [
    "AuditForm",
    "AuditSettings",
    "Authorized",
    "Deadlines",
    "Facility",
    "Limits",
    "Receiver",
    "SameNode",
    "Settings",
    "Syslog",
    "TraceSettings",
    "Transport",
]


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="t"):
    pass


class SameNode(enum.StrEnum):
    """How connections between two pods of one node go: like all others, or straight across."""

    HBONE = "hbone"
    DIRECT = "direct"


class Deadlines(_Part, frozen=True, kw_only=True, tag="deadlines"):
    """How long ztunnel waits for what, in whole seconds, by the names of its core's deadlines.

    The reason for each default is beside its namesake in `_core/base.h`.
    """

    decision: int = 15
    credential: int = 15
    connect: int = 10
    first_byte: int = 5
    tls_handshake: int = 10
    http2_settings: int = 10
    connect_request: int = 10
    connect_answer: int = 20
    stream_wait: int = 35
    half_closed: int = 3600
    ping_interval: int = 10
    ping_answer: int = 20
    ping_suspect: int = 3
    idle: int = 300
    idle_surplus: int = 3
    goodbye: int = 10
    drain: int = 3600


class Limits(_Part, frozen=True, kw_only=True, tag="limits"):
    """How much one pod may have at once, by the names of the core's limits; 0 is no limit.

    The reason for each default is beside its namesake in `_core/base.h`. `failure_lines` is not the
    core's: lines of one pod and one reason in the access log, in ten seconds.
    """

    connections: int = 0
    dials: int = 4096
    questions: int = 512
    handshakes: int = 512
    held_bytes: int = 128 * 1024 * 1024
    failure_lines: int = 100


class Authorized(enum.StrEnum):
    """Which of those who are let in have a line in the audit log; who is refused always has."""

    NONE = "none"
    CALLERS = "callers"
    CONNECTIONS = "connections"


class AuditForm(enum.StrEnum):
    """OCSF is JSON, too: an event of the Open Cybersecurity Schema Framework."""

    TEXT = "text"
    JSON = "json"
    OCSF = "ocsf"


class Transport(enum.StrEnum):
    """How syslog messages travel: a unix datagram socket, UDP (RFC 5426), TCP (RFC 6587)."""

    UNIX = "unix"
    UDP = "udp"
    TCP = "tcp"


class Facility(enum.StrEnum):
    """Who speaks, in syslog's words (RFC 5424, table 1); AUDIT is "log audit"."""

    USER = "user"
    DAEMON = "daemon"
    AUTH = "auth"
    AUTHPRIV = "authpriv"
    AUDIT = "audit"
    LOCAL0 = "local0"
    LOCAL1 = "local1"
    LOCAL2 = "local2"
    LOCAL3 = "local3"
    LOCAL4 = "local4"
    LOCAL5 = "local5"
    LOCAL6 = "local6"
    LOCAL7 = "local7"


class Syslog(_Part, frozen=True, tag="syslog"):
    """`address` is the path of a unix socket (`port` is 0), or an IP address."""

    transport: Transport
    address: str
    port: int = 0


class AuditSettings(_Part, frozen=True, kw_only=True, tag="audit"):
    """Where the audit log goes, and how much of it.

    `lines_per_second` is for each kind of line (refused, marked by AUDIT, and others); 0 is no
    limit. `stdout` has the form of the daemon's own logs; `form` is that of `file` and of syslog's
    message. `file` and `journal`, a socket, are paths, "" for none. `facility` is syslog's and the
    journal's.
    """

    authorized: Authorized = Authorized.CALLERS
    lines_per_second: int = 100
    form: AuditForm = AuditForm.TEXT
    stdout: bool = True
    file: str = ""
    journal: str = ""
    syslog: Syslog | None = None
    facility: Facility = Facility.AUTHPRIV


class Receiver(_Part, frozen=True, tag="receiver"):
    """Who takes spans by OTLP/HTTP. `address` is an IP address or a host name; `path` stands before
    "/v1/traces".
    """

    address: str
    port: int
    path: str = ""
    tls: bool = False


class TraceSettings(_Part, frozen=True, kw_only=True, tag="traces"):
    """Where spans of connections go, and of how many of those that begin on this node.

    Without `endpoint` nothing is traced. What a peer traces is traced here too, also if
    `sample_one_in` is 0: then nothing begins here. `ca_file`: who may have issued the receiver's
    certificate, by PEM; empty for those whom the system trusts.
    """

    endpoint: Receiver | None = None
    ca_file: str = ""
    sample_one_in: int = 100


class Settings(_Part, frozen=True, tag="settings"):
    """What ztunnel must know of the node that is no resource. `trust_domain` is the node's own.

    `node_plaintext`: plaintext from `node_addresses` passes STRICT (the kubelet's probes).
    """

    node: str
    cluster: str
    trust_domain: str
    locality: str = ""
    node_addresses: tuple[str, ...] = ()
    deadlines: Deadlines = Deadlines()
    same_node: SameNode = SameNode.HBONE
    limits: Limits = Limits()
    node_plaintext: bool = False
    audit: AuditSettings = AuditSettings()
    traces: TraceSettings = TraceSettings()
