"""What ztunnel's own metrics say, read from its port: it answers while nodeagent is down, too.

This module owns that request and the few series that are read. It promises a bounded answer in a
bounded time, and that metrics it does not know are passed over. It runs in the calling thread's
network namespace, which must be the node's.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from collections.abc import Iterable
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

from nodeagent.doctor.facts import TunnelCounts

__all__ = ["SilentError", "counts", "counts_of"]

HOST: Final = "127.0.0.1"
PORT: Final = 15020
"""Where the unit has ztunnel serve its metrics."""

SECONDS: Final = 5.0
"""Of silence."""
WHOLE_SECONDS: Final = 20.0
"""For the answer to its end: whoever has the port may be another program."""
MOST: Final = 256 * 1024 * 1024
"""Bytes of an answer: 200,000 series."""

_MOST_VALUE: Final = 253_402_300_799
"""A sample beyond it is none of ztunnel's: as a time it is the end of the year 9999."""

_BLOCKED: Final = 'response_flags="NETWORK_POLICY"'
_OWN: Final = (
    "ztunnel_build_info",
    "ztunnel_descriptors",
    "ztunnel_svid_expiry_timestamp_seconds",
    "ztunnel_tls_handshake_failures_total",
)


class SilentError(Exception):
    """It takes a connection and says nothing, or never comes to an end."""


def counts() -> TunnelCounts:
    """Ask ztunnel. Raises OSError, http.client.HTTPException and SilentError."""
    connection = http.client.HTTPConnection(HOST, PORT, timeout=SECONDS)
    connection.connect()
    # The connection lets go of it where the answer is to be its last, and reads on.
    sock: socket.socket = connection.sock
    late = threading.Event()

    def cut() -> None:
        late.set()
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    watchdog = threading.Timer(WHOLE_SECONDS, cut)
    watchdog.daemon = True
    watchdog.start()
    try:
        connection.request("GET", "/metrics")
        with connection.getresponse() as answer:
            body = answer.read(MOST)
    except (OSError, http.client.HTTPException) as error:
        if late.is_set() or isinstance(error, TimeoutError):
            raise SilentError from None
        raise
    finally:
        watchdog.cancel()
        connection.close()
    if late.is_set():  # cut off, an answer looks like a whole one
        raise SilentError
    if answer.status != http.HTTPStatus.OK:
        raise http.client.HTTPException(f"it answered {answer.status}")
    return counts_of(body.decode("utf-8", "replace").splitlines())


def counts_of(lines: Iterable[str]) -> TunnelCounts:
    """Read the exposition text. Raises ValueError where it is none."""
    # Chosen before they are parsed: of 50,000 series a dozen are read.
    wanted = [
        line
        for line in lines
        if line.startswith(_OWN)
        or (line.startswith("istio_tcp_connections_failed_total{") and _BLOCKED in line)
    ]
    failures: dict[str, int] = {}
    expiries: dict[str, float] = {}
    release, blocked, descriptors, most = "", 0, 0, 0
    for family in text_string_to_metric_families("\n".join(wanted) + "\n"):
        for sample in family.samples:
            if not 0 <= sample.value <= _MOST_VALUE:  # NaN neither
                continue
            match sample.name:
                case "ztunnel_build_info":
                    release = sample.labels.get("version", "")
                case "ztunnel_descriptors":
                    descriptors = int(sample.value)
                case "ztunnel_descriptors_limit":
                    most = int(sample.value)
                case "ztunnel_svid_expiry_timestamp_seconds":
                    expiries[sample.labels.get("identity", "")] = sample.value
                case "ztunnel_tls_handshake_failures_total":
                    failures[sample.labels.get("reason", "")] = int(sample.value)
                case "istio_tcp_connections_failed_total":
                    blocked += int(sample.value)
    return TunnelCounts(
        release=release,
        handshake_failures=failures,
        blocked=blocked,
        descriptors=descriptors,
        descriptors_most=most,
        expiries=expiries,
    )
