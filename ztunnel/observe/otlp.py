"""Spans as OpenTelemetry's receivers take them: OTLP over HTTP, in protobuf.

This module owns the spelling of a span and the talk with one receiver. It promises that an attempt
is bounded in time and in what it reads, that what a receiver refuses for good is counted and not
sent again, that what it cannot take now is, when it wants it, and that no redirect is followed. It
may not be loaded while traces are off, and is used on the writer's thread alone.

Sources: OTLP 1.x (opentelemetry.io/docs/specs/otlp, "OTLP/HTTP"), and the names of OpenTelemetry's
semantic conventions where there is one: what is the mesh's own begins with "ztunnel.".
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import select
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import structlog
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1 import trace_pb2

from ztunnel import lean
from ztunnel.observe import labels
from ztunnel.observe.access_log import Line
from ztunnel.observe.traces import Node, Span
from ztunnel.reasons import NO_FLAG, RESPONSE_FLAGS
from ztunnel.release import release
from ztunnel.settings import Receiver

if TYPE_CHECKING:
    import ssl

__all__ = ["Collector", "encode", "retry_after"]

_log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("ztunnel.observe.otlp")

ANSWER_SECONDS: Final = 10.0
"""OTLP's default: for each address of the receiver to be connected to, and for one request from its
first byte to the last of its answer, a handshake of TLS included."""

FIRST_PAUSE_SECONDS: Final = 1.0
MAX_PAUSE_SECONDS: Final = 30.0
"""A receiver that takes nothing now is left in peace for twice as long each time."""
MAX_ASKED_SECONDS: Final = 300.0
"""If it says itself for how long, at most so long: it may be wrong, or not the one it should be."""
_MOST_DIGITS: Final = 9

MAX_WORDS: Final = 200
"""Characters of a receiver's words in the log."""

MAX_ANSWER: Final = 64 * 1024
"""Bytes of an answer that are read: a successful one has a few."""

PATH: Final = "/v1/traces"
PROTOBUF: Final = "application/x-protobuf"

_LATER: Final = frozenset({429, 502, 503, 504})
"""Answers after which the same request is sent again; after any other it is not."""

_NANOSECONDS: Final = 1_000_000_000


def encode(span: Span) -> bytes:
    """Return the span as a message of its own."""
    line = span.line
    start = round(line.start * _NANOSECONDS)
    made = trace_pb2.Span(
        trace_id=span.trace,
        span_id=span.id,
        parent_span_id=span.parent,
        flags=trace_pb2.SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK
        | (trace_pb2.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK if span.server and span.parent else 0)
        | 1,
        name=_name(span),
        kind=trace_pb2.Span.SPAN_KIND_SERVER if span.server else trace_pb2.Span.SPAN_KIND_CLIENT,
        start_time_unix_nano=start,
        end_time_unix_nano=start + line.duration_us * 1000,
        attributes=[KeyValue(key=key, value=_value(value)) for key, value in _attributes(line)],
    )
    if span.opened is not None:
        made.events.add(name="open", time_unix_nano=round(span.opened * _NANOSECONDS))
    if RESPONSE_FLAGS[line.reason] != NO_FLAG:
        made.status.code = trace_pb2.Status.STATUS_CODE_ERROR
        made.status.message = line.error
    return made.SerializeToString()


def _name(span: Span) -> str:
    """Return what many connections have in common, as the conventions ask of a span's name."""
    line = span.line
    called = labels.value(line.labels, "destination_service") or _workload(line, "destination")
    return f"tcp {line.direction} {called or 'outside the mesh'}"


def _workload(line: Line, side: str) -> str:
    name = labels.value(line.labels, f"{side}_workload")
    return f"{labels.value(line.labels, f'{side}_workload_namespace')}/{name}" if name else ""


def _attributes(line: Line) -> Iterator[tuple[str, str | int]]:
    """Yield what is known, with the names of the conventions first."""
    called = line.hbone_destination or line.destination
    found: list[tuple[str, str | int]] = [
        ("network.transport", "tcp"),
        ("network.type", "ipv6" if called.startswith("[") else "ipv4"),
        ("server.address", _name_or_address(called, line)),
        ("server.port", int(called.rpartition(":")[2])),
        *_end("client", line.source),
        *_end("source", line.source),
        *_end("destination", called),
        ("ztunnel.direction", line.direction),
        (
            "ztunnel.connection_security_policy",
            labels.value(line.labels, "connection_security_policy"),
        ),
        ("ztunnel.source.workload", _workload(line, "source")),
        ("ztunnel.source.identity", labels.value(line.labels, "source_principal")),
        ("ztunnel.destination.workload", _workload(line, "destination")),
        ("ztunnel.destination.identity", labels.value(line.labels, "destination_principal")),
        ("ztunnel.destination.service", labels.value(line.labels, "destination_service")),
        ("ztunnel.hbone.address", line.destination if line.hbone_destination else ""),
        ("ztunnel.policy", line.policy),
        ("ztunnel.reason", line.reason.value),
        ("error.type", line.reason.value if RESPONSE_FLAGS[line.reason] != NO_FLAG else ""),
        ("ztunnel.bytes_received", line.received),
        ("ztunnel.bytes_sent", line.sent),
    ]
    for key, value in found:
        if value != "":
            yield key, value


def _end(side: str, place: str) -> Iterator[tuple[str, str | int]]:
    host, _, port = place.rpartition(":")
    yield f"{side}.address", host.strip("[]")
    yield f"{side}.port", int(port)


def _value(value: str | int) -> AnyValue:
    return AnyValue(int_value=value) if isinstance(value, int) else AnyValue(string_value=value)


def _name_or_address(called: str, line: Line) -> str:
    """Return `server.address`: the name that was called, if the mesh has one for it."""
    return labels.value(line.labels, "destination_service") or called.rpartition(":")[0].strip("[]")


class _Connection(http.client.HTTPConnection):
    """With TLS if there is a `context`; another thread can cut it off, whatever is said on it."""

    def __init__(self, endpoint: Receiver, context: ssl.SSLContext | None) -> None:
        super().__init__(endpoint.address, endpoint.port, timeout=ANSWER_SECONDS)
        self._context = context
        self._cut: socket.socket | None = None
        """Kept for `cut`: http.client lets go of it where an answer is to be the last, and reads on
        from it.
        """

    def connect(self) -> None:
        super().connect()
        self._cut = self.sock
        if self._context is not None:
            # Not shaken hands with yet: `cut` has to reach it while that lasts.
            self.sock = self._context.wrap_socket(
                self.sock, server_hostname=self.host, do_handshake_on_connect=False
            )
            self._cut = self.sock
            self.sock.do_handshake()

    def renew(self) -> None:
        """Close what the other side has closed meanwhile: the next request connects anew."""
        if self.sock is not None and select.select([self.sock], [], [], 0)[0]:
            self.close()

    def cut(self) -> None:
        """Have everything that waits on the connection end; from another thread."""
        if self._cut is not None:
            with contextlib.suppress(OSError):
                # Not `SSLSocket.shutdown`, which makes a socket without TLS of it.
                socket.socket.shutdown(self._cut, socket.SHUT_RDWR)


class Collector:
    """One receiver, over one connection that is kept open (`log_writer.Destination`)."""

    def __init__(self, endpoint: Receiver, ca_file: str, node: Node) -> None:
        self._endpoint = endpoint
        self._ca_file = ca_file
        self._where = f"{endpoint.address}:{endpoint.port}"
        self._resource = Resource(
            attributes=[
                KeyValue(key=key, value=_value(value))
                for key, value in (
                    ("service.name", "ztunnel"),
                    ("service.version", release()),
                    ("service.instance.id", node.name),
                    ("host.name", node.name),
                    ("k8s.cluster.name", node.cluster),
                )
            ]
        )
        self._connection: _Connection | None = None
        self._pause = 0.0
        self._not_before = 0.0
        self._said = 0
        self.taken = 0
        """Spans."""
        self.refused = 0
        """Spans, for good."""

    def open(self) -> None:
        self.close()
        left = self._not_before - time.monotonic()
        if left > 0:
            raise self._problem(f"it is given {left:.0f} s before it is asked again")
        context = None
        if self._endpoint.tls:
            try:
                context = lean.system_ssl().create_default_context(cafile=self._ca_file or None)
            except OSError as error:
                raise self._problem(f"{self._ca_file}: {_words(error)}") from None
        self._connection = _Connection(self._endpoint, context)

    def send(self, messages: Sequence[bytes], /) -> int:
        """Send all; what the receiver refuses for good is counted, and the log says so."""
        request = ExportTraceServiceRequest()
        group = request.resource_spans.add(resource=self._resource)
        scope = group.scope_spans.add(scope=InstrumentationScope(name="ztunnel", version=release()))
        for message in messages:
            scope.spans.add().ParseFromString(message)
        status, after, answer = self._ask(request.SerializeToString())
        if status in _LATER:
            wait = self._wait(after)
            raise self._problem(f"it answers {status}, and is asked again in {wait:.0f} s")
        self._pause = 0.0
        rejected, said = len(messages), ""
        if status == http.client.OK:
            rejected, said = _partial(answer)
        rejected = min(max(rejected, 0), len(messages))
        self.refused += rejected
        self.taken += len(messages) - rejected
        if rejected and self._said != status:
            _log.error(
                "spans were refused; further ones are counted",
                log="traces",
                receiver=self._where,
                status=status,
                spans=rejected,
                said=said,
            )
        self._said = status if rejected else 0
        return len(messages)

    def _wait(self, after: float | None) -> float:
        """Have the receiver left in peace for as long as it says, or ever longer."""
        if after is None:
            after = self._pause = min(max(2 * self._pause, FIRST_PAUSE_SECONDS), MAX_PAUSE_SECONDS)
        self._not_before = time.monotonic() + after
        return after

    def _ask(self, body: bytes) -> tuple[int, float | None, bytes]:
        """Return status, `Retry-After` in seconds, and what was answered. Raises OSError."""
        connection = self._connection
        assert connection is not None  # noqa: S101 - opened before
        late = threading.Event()

        def cut() -> None:
            late.set()
            connection.cut()

        watchdog = threading.Timer(ANSWER_SECONDS, cut)
        watchdog.daemon = True
        watchdog.start()
        try:
            connection.renew()
            connection.request("POST", self._endpoint.path + PATH, body, {"Content-Type": PROTOBUF})
            with connection.getresponse() as response:
                answer = response.read(MAX_ANSWER)
                if not response.isclosed():
                    # More than anybody has to say: what follows would be taken for the next answer.
                    connection.close()
        except (OSError, http.client.HTTPException) as error:
            # A time-out is not slow, as a socket is that takes no more now: this connection is of
            # no use.
            if late.is_set() or isinstance(error, TimeoutError):
                raise self._problem(f"no answer within {ANSWER_SECONDS:g} s") from None
            raise self._problem(_words(error)) from None
        finally:
            watchdog.cancel()
        if late.is_set():  # cut off, an answer looks like a whole one
            raise self._problem(f"no answer within {ANSWER_SECONDS:g} s")
        after = retry_after(response.getheader("Retry-After", ""), datetime.now(UTC))
        return response.status, after, answer

    def _problem(self, what: str) -> OSError:
        self.close()
        problem = OSError(what)
        problem.filename = self._where
        return problem

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()


def retry_after(text: str, now: datetime) -> float | None:
    """Return the seconds that an answer asks to wait (RFC 9110, 10.2.3), within bounds; None if it
    says none.
    """
    if text.isascii() and text.isdigit():
        seconds = float(text[:_MOST_DIGITS])
    else:
        try:
            until = email.utils.parsedate_to_datetime(text)
        except ValueError:
            return None
        seconds = (until.replace(tzinfo=until.tzinfo or UTC) - now).total_seconds()
    return min(max(seconds, 0.0), MAX_ASKED_SECONDS)


def _partial(answer: bytes) -> tuple[int, str]:
    """Return how many spans a receiver that has taken the others refused, and its words."""
    try:
        partial = ExportTraceServiceResponse.FromString(answer).partial_success
    except DecodeError:
        return 0, ""  # its status has said that all is well
    return partial.rejected_spans, partial.error_message[:MAX_WORDS]


def _words(error: Exception) -> str:
    # The module ssl is not loaded without need: its errors are known by what they have.
    if message := getattr(error, "verify_message", ""):
        return f"its certificate is not accepted: {message}"
    if type(error).__module__ == "ssl":
        return f"no TLS ({getattr(error, 'reason', '') or type(error).__name__})"
    if isinstance(error, http.client.HTTPException):
        return f"no HTTP ({type(error).__name__})"
    return getattr(error, "strerror", None) or type(error).__name__
