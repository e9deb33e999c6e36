"""Why a connection ended: the closed set of tokens, what each means, and how dashboards see it.

This module owns the one table that joins the core's numbers, the access log's words and Istio's
`response_flags`. It promises that every token has a flag and a sentence naming the likely cause,
and that a core built from another list is refused at start. It may not know of connections.
"""

from __future__ import annotations

import enum
from typing import Final

__all__ = [
    "BROKE_LATER",
    "CAUSES",
    "FLAGS",
    "NO_FLAG",
    "RESPONSE_FLAGS",
    "Reason",
    "ReasonsMismatchError",
    "check",
    "explain",
    "flag",
]


class Reason(enum.StrEnum):
    """The tokens of `_core/reasons.h`, in its order: a member's position is its number."""

    CLOSED = "closed"
    CLIENT_RESET = "client_reset"
    SERVER_RESET = "server_reset"
    PEER_RESET = "peer_reset"
    CONNECT_REFUSED = "connect_refused"
    CONNECT_TIMEOUT = "connect_timeout"
    CONNECT_UNREACHABLE = "connect_unreachable"
    NO_CREDENTIAL = "no_credential"
    TLS_TIMEOUT = "tls_timeout"
    TLS_FAILED = "tls_failed"
    TLS_ALERT = "tls_alert"
    TLS_ALPN = "tls_wrong_alpn"
    TLS_TRUNCATED = "tls_truncated"
    CERT_MISSING = "certificate_missing"
    CERT_EXPIRED = "certificate_expired"
    CERT_NOT_YET_VALID = "certificate_not_yet_valid"
    CERT_UNTRUSTED = "certificate_untrusted"
    CERT_INVALID = "certificate_invalid"
    TRUST_DOMAIN = "trust_domain_mismatch"
    IDENTITY_MISMATCH = "identity_mismatch"
    TRUST_WITHDRAWN = "trust_withdrawn"
    H2_TIMEOUT = "h2_timeout"
    H2_PROTOCOL = "h2_protocol"
    H2_LIMIT = "h2_limit"
    H2_GOAWAY = "h2_goaway"
    KEEPALIVE_TIMEOUT = "keepalive_timeout"
    IDLE = "idle"
    ANSWER_TIMEOUT = "connect_answer_timeout"
    PEER_DENIED = "denied_by_peer"
    PEER_BAD_REQUEST = "bad_request_by_peer"
    PEER_UNAVAILABLE = "unavailable_by_peer"
    PEER_STATUS = "unexpected_status_by_peer"
    PEER_LOST = "peer_connection_lost"
    BAD_REQUEST = "bad_request"
    AUTHORITY_MISMATCH = "authority_mismatch"
    STRICT_PLAINTEXT = "strict_requires_mtls"
    POLICY_DENIED = "policy_denied"
    POLICY_MISSING = "policy_missing"
    POLICY_CHANGED = "policy_changed"
    SELF_CALL = "self_call"
    FOREIGN_SOURCE = "foreign_source_address"
    UNKNOWN_WORKLOAD = "unknown_workload"
    UNKNOWN_PORT = "unknown_port"
    NO_ENDPOINTS = "no_endpoints"
    DECISION_TIMEOUT = "decision_timeout"
    NO_DESCRIPTORS = "no_descriptors"
    NO_MEMORY = "no_memory"
    NO_PORTS = "no_ephemeral_ports"
    POD_QUESTIONS = "pod_question_limit"
    POD_REMOVED = "pod_removed"
    SHUTDOWN = "shutdown"
    INTERNAL = "internal_error"
    FIRST_BYTE_TIMEOUT = "first_byte_timeout"
    REQUEST_TIMEOUT = "connect_request_timeout"
    STREAM_TIMEOUT = "stream_wait_timeout"
    HALF_CLOSED_TIMEOUT = "half_closed_timeout"
    CLIENT_LOST = "client_lost"
    SERVER_LOST = "server_lost"
    DRAIN_TIMEOUT = "drain_timeout"
    POD_CONNECTIONS = "pod_connection_limit"
    POD_DESCRIPTORS = "pod_descriptor_limit"
    POD_DIALS = "pod_dial_limit"
    POD_HANDSHAKES = "pod_handshake_limit"
    POD_HELD = "pod_held_bytes_limit"


NO_FLAG: Final = "-"

_DENY: Final = "DENY"
_CONNECT: Final = "CONNECT"
_TLS: Final = "TLS_FAILURE"
_H2: Final = "H2_HANDSHAKE_FAILURE"
_IDENTITY: Final = "IDENTITY_ERROR"
_NETWORK_POLICY: Final = "NETWORK_POLICY"
_REVOKED: Final = "CERT_REVOKED"

_R = Reason

_MAYBE_BLOCKED: Final = (
    "maybe a NetworkPolicy or firewall blocks HBONE port 15008, or the peer's node has no agent"
)

_TABLE: Final[dict[Reason, tuple[str, str]]] = {
    # An end that either application chose is no failure: bytes were carried as they asked.
    _R.CLOSED: (NO_FLAG, ""),
    _R.CLIENT_RESET: (NO_FLAG, "the client reset the connection"),
    _R.SERVER_RESET: (NO_FLAG, "the server reset the connection"),
    _R.PEER_RESET: (NO_FLAG, "the peer's tunnel reset the stream: its application did, or it cut"),
    _R.CONNECT_REFUSED: (
        _CONNECT,
        "connection refused: nothing listens there (the application may still be starting)",
    ),
    _R.CONNECT_TIMEOUT: (_CONNECT, "connection timed out: the destination does not answer"),
    _R.CONNECT_UNREACHABLE: (_CONNECT, "destination unreachable: no route, or a firewall rejects"),
    _R.NO_CREDENTIAL: (
        _IDENTITY,
        "no certificate for this pod's identity yet: see the agent's log for its CA or provider",
    ),
    _R.TLS_TIMEOUT: (_TLS, "TLS handshake timed out: the peer stopped in the middle of it"),
    _R.TLS_FAILED: (_TLS, "TLS handshake failed: the peer speaks no TLS 1.3 we accept, or not TLS"),
    _R.TLS_ALERT: (_TLS, "the peer refused our TLS handshake: it may not trust our certificate"),
    _R.TLS_ALPN: (_TLS, "the peer did not agree on HTTP/2 (ALPN h2): it is no HBONE peer"),
    _R.TLS_TRUNCATED: (_TLS, "the TLS connection ended without close_notify: peer or network died"),
    _R.CERT_MISSING: (_TLS, "the peer showed no certificate: mutual TLS needs one from each side"),
    _R.CERT_EXPIRED: (_IDENTITY, "the peer's certificate has expired: its renewal is failing"),
    _R.CERT_NOT_YET_VALID: (_IDENTITY, "the peer's certificate is not valid yet: compare clocks"),
    _R.CERT_UNTRUSTED: (
        _IDENTITY,
        "the peer's certificate does not chain to its trust domain's roots: another CA signed it",
    ),
    _R.CERT_INVALID: (_IDENTITY, "the peer's certificate breaks the X509-SVID rules"),
    _R.TRUST_DOMAIN: (_IDENTITY, "the peer's trust domain is not one that this node trusts"),
    _R.IDENTITY_MISMATCH: (
        _IDENTITY,
        "the peer proved another identity than the mesh expects there: stale state, or an intruder",
    ),
    _R.TRUST_WITHDRAWN: (
        _REVOKED,
        "the roots or certificates that the peer's identity rested on are trusted no more",
    ),
    _R.H2_TIMEOUT: (_H2, "HTTP/2 handshake timed out after TLS: the peer is overloaded or stuck"),
    _R.H2_PROTOCOL: (_H2, "the peer broke HTTP/2"),
    _R.H2_LIMIT: (_H2, "the peer exceeded an HTTP/2 limit (flood protection)"),
    _R.H2_GOAWAY: (_H2, "the peer is closing its HBONE connection (GOAWAY)"),
    _R.KEEPALIVE_TIMEOUT: (_NETWORK_POLICY, "HBONE peer went silent; " + _MAYBE_BLOCKED),
    _R.IDLE: (NO_FLAG, "closed after idling"),
    _R.ANSWER_TIMEOUT: (
        _CONNECT,
        "the peer's tunnel did not answer CONNECT: its application accepts no connections",
    ),
    _R.PEER_DENIED: (_DENY, "the peer's policy denied the connection (401)"),
    _R.PEER_BAD_REQUEST: (_CONNECT, "the peer's tunnel rejected our CONNECT (400): stale address?"),
    _R.PEER_UNAVAILABLE: (
        _CONNECT,
        "the peer's tunnel could not reach its application (503): is it listening on that port?",
    ),
    _R.PEER_STATUS: (_CONNECT, "the peer answered CONNECT with an unexpected status"),
    _R.PEER_LOST: (_CONNECT, "the HBONE connection that carried this one broke: peer or network"),
    _R.BAD_REQUEST: (_CONNECT, "the peer sent no valid CONNECT request"),
    _R.AUTHORITY_MISMATCH: (
        _DENY,
        "the peer asked for another address than the pod's it connected to",
    ),
    _R.STRICT_PLAINTEXT: (
        _DENY,
        "plaintext refused: PeerAuthentication says STRICT; is the client in the mesh?",
    ),
    _R.POLICY_DENIED: (_DENY, "denied by policy"),
    _R.POLICY_MISSING: (_DENY, "no policy has been received for this workload: closed until then"),
    _R.POLICY_CHANGED: (_DENY, "cut: a change of policy or identity no longer allows it"),
    _R.SELF_CALL: (_DENY, "the destination is loopback or one of the tunnel's own ports"),
    _R.FOREIGN_SOURCE: (_DENY, "the pod spoke from an address that is not its own"),
    _R.UNKNOWN_WORKLOAD: (_CONNECT, "no workload of the mesh is known here: agent still syncing?"),
    _R.UNKNOWN_PORT: (_CONNECT, "the service has no such port: check the ServiceEntry's ports"),
    _R.NO_ENDPOINTS: (_CONNECT, "the service has no healthy endpoint"),
    _R.DECISION_TIMEOUT: (_CONNECT, "no decision in time: the tunnel is overloaded"),
    _R.NO_DESCRIPTORS: (_CONNECT, "out of file descriptors: raise the service's LimitNOFILE"),
    _R.NO_MEMORY: (_CONNECT, "out of memory"),
    _R.NO_PORTS: (_CONNECT, "out of ephemeral ports in the pod's namespace"),
    _R.POD_QUESTIONS: (
        _CONNECT,
        "the pod waits for too many decisions at once (limits.questions): does it scan addresses?",
    ),
    _R.POD_REMOVED: (NO_FLAG, "the pod left the mesh"),
    _R.SHUTDOWN: (NO_FLAG, "the tunnel stopped"),
    _R.INTERNAL: (_CONNECT, "internal error: see the tunnel's log"),
    _R.FIRST_BYTE_TIMEOUT: (
        _TLS,
        "somebody connected to the HBONE port and said nothing: a port scan, or a lossy network",
    ),
    _R.REQUEST_TIMEOUT: (_H2, "the peer began a CONNECT and did not end it: it is stuck"),
    _R.STREAM_TIMEOUT: (
        _CONNECT,
        "the peer's tunnel allows no more streams, and none became free: it is overloaded",
    ),
    _R.HALF_CLOSED_TIMEOUT: (
        NO_FLAG,
        "one side ended and nothing moved on the other: it has probably gone (half_closed)",
    ),
    _R.CLIENT_LOST: (
        _CONNECT,
        "the connection to the client broke: no answer, no route, or somebody destroyed it",
    ),
    _R.SERVER_LOST: (
        _CONNECT,
        "the connection to the server broke: no answer, no route, or somebody destroyed it",
    ),
    _R.DRAIN_TIMEOUT: (
        NO_FLAG,
        "cut: an upgrade has replaced this tunnel, and the time for what it still carried is over",
    ),
    _R.POD_CONNECTIONS: (
        _CONNECT,
        "the pod has as many connections as one pod may have (limits.connections)",
    ),
    _R.POD_DESCRIPTORS: (
        _CONNECT,
        "the pod holds as many descriptors as are left for all: raise ztunnel's LimitNOFILE",
    ),
    _R.POD_DIALS: (
        _CONNECT,
        "too many connections of the pod wait for somebody to answer (limits.dials)",
    ),
    _R.POD_HANDSHAKES: (
        _TLS,
        "too many handshakes with the pod at once (limits.handshakes): a flood on its HBONE port",
    ),
    _R.POD_HELD: (
        _CONNECT,
        "the pod's applications leave too many bytes unread (limits.held_bytes)",
    ),
}

RESPONSE_FLAGS: Final[dict[Reason, str]] = {reason: flag for reason, (flag, _) in _TABLE.items()}
"""Reason to the `response_flags` label; NO_FLAG marks ends that are no failure."""

FLAGS: Final = frozenset(RESPONSE_FLAGS.values())
"""Every value of that label."""

BROKE_LATER: Final = frozenset(
    {Reason.H2_LIMIT, Reason.H2_PROTOCOL, Reason.KEEPALIVE_TIMEOUT, Reason.TRUST_WITHDRAWN}
)
"""Ends of an HBONE connection whose handshake was complete: what it carried is told by itself."""

CAUSES: Final[dict[Reason, str]] = {reason: cause for reason, (_, cause) in _TABLE.items()}
"""Reason to a sentence for the operator; empty where nothing went wrong."""

HBONE_TIMEOUT_CAUSE: Final = "connection timed out, " + _MAYBE_BLOCKED
HBONE_REFUSED_CAUSE: Final = (
    "connection refused on HBONE port 15008: the peer is said to speak HBONE but no agent listens"
)


HANDSHAKE_BROKEN_OFF_CAUSE: Final = (
    "the peer broke off before the HBONE connection was up: a port scan, a health check, or it died"
)


def explain(reason: Reason, *, hbone: bool, handshake: bool = False) -> str:
    """Return the likely cause in words.

    `hbone`: the dial in question went to port 15008. `handshake`: an HBONE connection ended before
    it could carry anything.
    """
    if handshake and reason is Reason.PEER_LOST:
        return HANDSHAKE_BROKEN_OFF_CAUSE
    if hbone and reason in (Reason.CONNECT_TIMEOUT, Reason.CONNECT_UNREACHABLE):
        return HBONE_TIMEOUT_CAUSE
    if hbone and reason is Reason.CONNECT_REFUSED:
        return HBONE_REFUSED_CAUSE
    return CAUSES[reason]


def flag(reason: Reason, *, hbone: bool) -> str:
    """Return the `response_flags` value.

    A timeout towards 15008 is NETWORK_POLICY: the commonest cause by far.
    """
    if hbone and reason is Reason.CONNECT_TIMEOUT:
        return _NETWORK_POLICY
    return RESPONSE_FLAGS[reason]


class ReasonsMismatchError(Exception):
    """The core was built from another list of reasons than this module: rebuild the package."""


def check(core_reasons: tuple[str, ...]) -> None:
    """Raise ReasonsMismatchError unless the core's tokens are exactly these, in order."""
    ours = tuple(reason.value for reason in Reason)
    if core_reasons != ours:
        differing = sorted(set(core_reasons) ^ set(ours)) or ["(order)"]
        raise ReasonsMismatchError(
            f"ztunnel._core was built with other reasons ({', '.join(differing)}): rebuild it"
        )
