"""/stats: what came in to the pods of this node, by the names that Envoy's statistics have.

This module owns the names, and what each of them means for this tunnel (docs/access-log.md has it
for people). It promises that every name is always there, that a connection is counted once, in one
listener and in one of `tls_found` and `tls_not_found`, and that a value which is always 0 belongs
to what cannot happen here. It is pure: it counts nothing itself.

A connection is an application's: those that share an HBONE connection are counted each, while
`ssl.*` speaks of the HBONE connections' handshakes. Of Envoy's listeners there are three:

    0.0.0.0_15006               plaintext, as it was captured
    0.0.0.0_15008               HBONE: mutual TLS
    envoy_internal_same_node    handed over by a pod of this node (`same_node: direct`): no network,
                                and so no TLS that could be found or not
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple
from urllib.parse import parse_qsl

from ztunnel.observe.arrivals import Arrived
from ztunnel.protocol import Arrival
from ztunnel.reasons import Reason

__all__ = ["Query", "QueryError", "Stat", "parse", "render", "statistics"]

MAX_FILTER: Final = 512
"""Characters of a filter."""

FILTER_MEMORY: Final = 1 << 14
"""Bytes that a compiled filter may take: some 900 instructions. RE2's time is linear in the text,
but times the filter's size: the worst of this one take 20 ms for all names, of 1 MB more than 2 s,
in which nobody's new connection is decided on."""

MAX_PARAMETERS: Final = 16

LISTENERS: Final = {
    Arrival.PLAINTEXT: "listener.0.0.0.0_15006",
    Arrival.HBONE: "listener.0.0.0.0_15008",
    Arrival.DIRECT: "listener.envoy_internal_same_node",
}
"""As Envoy names those of a sidecar; each of ours takes IPv4 and IPv6."""

_OVERLOADED: Final = (
    Reason.POD_DESCRIPTORS,
    Reason.POD_DIALS,
    Reason.POD_HANDSHAKES,
    Reason.POD_HELD,
    Reason.POD_QUESTIONS,
)
_CERTIFICATE_REFUSED: Final = (
    Reason.CERT_EXPIRED,
    Reason.CERT_NOT_YET_VALID,
    Reason.CERT_UNTRUSTED,
    Reason.CERT_INVALID,
)
_TLS_ERRORS: Final = (
    Reason.FIRST_BYTE_TIMEOUT,
    Reason.PEER_LOST,
    Reason.TLS_ALERT,
    Reason.TLS_ALPN,
    Reason.TLS_FAILED,
    Reason.TLS_TIMEOUT,
    Reason.TLS_TRUNCATED,
)


class Stat(NamedTuple):
    """One value. `used`: it has changed at some time, though it may be 0 again."""

    name: str
    value: int
    gauge: bool = False
    used: bool = False


def statistics(arrived: Arrived, handshaking: int) -> list[Stat]:
    """Return every statistic, sorted. `handshaking`: handshakes under way now, as server."""
    found: list[Stat] = []
    for arrival in LISTENERS:
        found += _listener(arrived, arrival, handshaking if arrival is Arrival.HBONE else 0)
    found += _ssl(LISTENERS[Arrival.HBONE], arrived)
    # No TLS is spoken there: what is not TLS comes in there, and nothing else.
    found += _ssl(LISTENERS[Arrival.PLAINTEXT], Arrived())
    found += _inspector(arrived)
    return sorted(
        stat if stat.used or not stat.value else stat._replace(used=True) for stat in found
    )


def _failed(arrived: Arrived, arrival: Arrival, reasons: Iterable[Reason] = Reason) -> int:
    return sum(arrived.failed[arrival, reason] for reason in reasons)


def _total(arrived: Arrived, arrival: Arrival) -> int:
    return arrived.opened[arrival] + _failed(arrived, arrival)


def _listener(arrived: Arrived, arrival: Arrival, handshaking: int) -> Iterator[Stat]:
    prefix = LISTENERS[arrival]
    total = _total(arrived, arrival)
    # Between the reads of two counters a connection may end: never below 0.
    active = max(0, arrived.opened[arrival] - arrived.closed[arrival])
    shaken = arrived.handshake_failures if arrival is Arrival.HBONE else {}

    def early(*reasons: Reason) -> int:
        return _failed(arrived, arrival, reasons) + sum(shaken.get(each, 0) for each in reasons)

    yield Stat(f"{prefix}.downstream_cx_active", active, gauge=True, used=bool(total))
    for name, value in (
        ("downstream_cx_destroy", total - active),
        ("downstream_cx_overflow", early(Reason.POD_CONNECTIONS)),
        ("downstream_cx_overload_reject", early(*_OVERLOADED)),
        ("downstream_cx_total", total),
        ("downstream_cx_transport_socket_connect_timeout", shaken.get(Reason.TLS_TIMEOUT, 0)),
        ("downstream_global_cx_overflow", early(Reason.NO_DESCRIPTORS)),
        # As Envoy since 1.25 names `tls_inspector.read_error` and `.connection_closed`.
        ("downstream_listener_filter_error", 0),
        ("downstream_listener_filter_remote_close", shaken.get(Reason.PEER_LOST, 0)),
        ("downstream_pre_cx_timeout", shaken.get(Reason.FIRST_BYTE_TIMEOUT, 0)),
        # Where STRICT is in force Istio's proxy has no filter chain for plaintext.
        ("no_filter_chain_match", _failed(arrived, arrival, [Reason.STRICT_PLAINTEXT])),
    ):
        yield Stat(f"{prefix}.{name}", value)
    begun = bool(arrival is Arrival.HBONE and (arrived.handshakes or shaken))
    yield Stat(f"{prefix}.downstream_pre_cx_active", handshaking, gauge=True, used=begun)


def _ssl(prefix: str, arrived: Arrived) -> Iterator[Stat]:
    def failures(*reasons: Reason) -> int:
        return sum(arrived.handshake_failures[reason] for reason in reasons)

    for name, value in (
        ("connection_error", failures(*_TLS_ERRORS)),
        # Certificates are not pinned.
        ("fail_verify_cert_hash", 0),
        ("fail_verify_error", failures(*_CERTIFICATE_REFUSED)),
        ("fail_verify_no_cert", failures(Reason.CERT_MISSING)),
        ("fail_verify_san", failures(Reason.TRUST_DOMAIN)),
        ("handshake", arrived.handshakes),
        # A client without certificate is refused, no response of OCSP is stapled, and no session
        # resumed: each would go past the certificates' end or withdrawal.
        ("no_certificate", 0),
        ("ocsp_staple_failed", 0),
        ("ocsp_staple_omitted", 0),
        ("ocsp_staple_requests", 0),
        ("ocsp_staple_responses", 0),
        ("session_reused", 0),
        ("versions.TLSv1.3", arrived.handshakes),
    ):
        yield Stat(f"{prefix}.ssl.{name}", value)
    for name, value in (
        ("downstream_context_secrets_not_ready", failures(Reason.NO_CREDENTIAL)),
        ("ssl_context_update_by_sds", arrived.certificates),
        # A context of servers.
        ("upstream_context_secrets_not_ready", 0),
    ):
        yield Stat(f"{prefix}.server_ssl_socket_factory.{name}", value)


def _inspector(arrived: Arrived) -> Iterator[Stat]:
    found = _total(arrived, Arrival.HBONE)
    for name, value in (
        # HBONE is negotiated as "h2": nothing else becomes a connection.
        ("alpn_found", found),
        ("alpn_not_found", arrived.handshake_failures[Reason.TLS_ALPN]),
        # There is no buffer that a hello must fit: one too large for TLS is `ssl.connection_error`.
        ("client_hello_too_large", 0),
        ("connection_closed", arrived.handshake_failures[Reason.PEER_LOST]),
        # A client that resets is one that closes.
        ("read_error", 0),
        # HBONE has no server name, and one that is sent is not read.
        ("sni_found", 0),
        ("sni_not_found", found),
        ("tls_found", found),
        ("tls_not_found", _total(arrived, Arrival.PLAINTEXT)),
    ):
        yield Stat(f"tls_inspector.{name}", value)


# --- what was asked -------------------------------------------------------------------------------


class QueryError(ValueError):
    """The query cannot be answered; the text says what to write."""


class Query(NamedTuple):
    """`workload` is a uid, None for the whole node; `matches` says which names are wanted."""

    workload: str | None = None
    matches: Callable[[str], bool] = lambda _name: True
    as_json: bool = False
    used_only: bool = False
    gauges: bool = True
    counters: bool = True


_KNOWN: Final = "workload=NAMESPACE/NAME, filter=REGEX, usedonly, format=text|json, type=TYPE"
_TYPES: Final = {
    "all": (True, True),
    "counters": (False, True),
    "gauges": (True, False),
}


def parse(text: str) -> Query:
    """Read the query of a URL, without its question mark. Raises QueryError."""
    try:
        pairs = parse_qsl(text, keep_blank_values=True, max_num_fields=MAX_PARAMETERS)
    except ValueError:
        raise QueryError(f"too many parameters; there are {_KNOWN}") from None
    query = Query()
    for name, value in pairs:
        match name:
            case "workload":
                query = query._replace(workload=value)
            case "filter":
                query = query._replace(matches=_matcher(value))
            case "usedonly":
                query = query._replace(used_only=True)
            case "format" if value in ("text", "json"):
                query = query._replace(as_json=value == "json")
            case "format":
                raise QueryError("format: text or json; for Prometheus there is /metrics")
            case "type" if value.lower() in _TYPES:
                gauges, counters = _TYPES[value.lower()]
                query = query._replace(gauges=gauges, counters=counters)
            case "type":
                raise QueryError("type: Counters, Gauges or All; there are no others here")
            case _:
                raise QueryError(f"no such parameter; there are {_KNOWN}")
    return query


def _matcher(pattern: str) -> Callable[[str], bool]:
    """Return a search for `pattern`, in the dialect and with the guarantees that Envoy has."""
    if len(pattern) > MAX_FILTER:
        raise QueryError(f"filter: at most {MAX_FILTER} characters")
    import re2  # noqa: PLC0415 - 3 MB that a daemon nobody filters need not have

    options = re2.Options()
    options.max_mem = FILTER_MEMORY
    options.log_errors = False
    try:
        compiled = re2.compile(pattern, options)
    except re2.error as error:
        raise QueryError(f"filter: no regular expression of RE2 ({_plain(error)})") from None
    return lambda name: compiled.search(name) is not None


def _plain(error: Exception) -> str:
    said = error.args[0] if error.args else ""
    return said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)


def render(query: Query, found: Iterable[Stat]) -> bytes:
    """Spell what is wanted of `found`, as Envoy does."""
    wanted = [
        stat
        for stat in found
        if (query.gauges if stat.gauge else query.counters)
        and (stat.used or not query.used_only)
        and query.matches(stat.name)
    ]
    if not query.as_json:
        return "".join(f"{stat.name}: {stat.value}\n" for stat in wanted).encode()
    return json.dumps(
        {"stats": [{"name": stat.name, "value": stat.value} for stat in wanted]},
        separators=(",", ":"),
    ).encode()
