"""Spans as OpenTelemetry's receivers take them: OTLP over HTTP, in protobuf.

This module owns the spelling of a span and the talk with one receiver. It promises that an attempt
is bounded in time and in what it reads, that what a receiver refuses for good is not sent again,
and that what it cannot take now is. It may not be loaded while traces are off, and is used on the
writer's thread alone.

Sources: OTLP 1.x (opentelemetry.io/docs/specs/otlp, "OTLP/HTTP"), and the names of OpenTelemetry's
semantic conventions where there is one: what is the mesh's own begins with "ztunnel.".
"""

from __future__ import annotations

import http.client
from collections.abc import Iterator, Sequence
from typing import Final

import structlog
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1 import trace_pb2

from ztunnel.address import authority, pack
from ztunnel.observe import labels
from ztunnel.observe.access_log import Line
from ztunnel.observe.traces import Node, Span
from ztunnel.reasons import NO_FLAG, RESPONSE_FLAGS
from ztunnel.release import release
from ztunnel.settings import Receiver

__all__ = ["Collector", "encode"]

_log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("ztunnel.observe.otlp")

ANSWER_SECONDS: Final = 10.0
"""For one request, connecting included: OTLP's default."""

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


class Collector:
    """One receiver, over one connection that is kept open (`log_writer.Destination`)."""

    def __init__(self, endpoint: Receiver, node: Node) -> None:
        self._endpoint = endpoint
        self._where = authority(pack(endpoint.address), endpoint.port)
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
        self._connection: http.client.HTTPConnection | None = None

    def open(self) -> None:
        self.close()
        self._connection = http.client.HTTPConnection(
            self._endpoint.address, self._endpoint.port, timeout=ANSWER_SECONDS
        )

    def send(self, messages: Sequence[bytes], /) -> int:
        """Send all; what the receiver refuses for good counts as sent, and the log says so."""
        request = ExportTraceServiceRequest()
        group = request.resource_spans.add(resource=self._resource)
        scope = group.scope_spans.add(scope=InstrumentationScope(name="ztunnel", version=release()))
        for message in messages:
            scope.spans.add().ParseFromString(message)
        status, answer = self._ask(request.SerializeToString())
        if status in _LATER:
            raise self._problem(f"it answers {status}")
        if status != http.client.OK:
            _log.error(
                "spans were refused", receiver=self._where, status=status, spans=len(messages)
            )
        else:
            self._look(answer)
        return len(messages)

    def _ask(self, body: bytes) -> tuple[int, bytes]:
        connection = self._connection
        assert connection is not None  # noqa: S101 - opened before
        try:
            connection.request("POST", self._endpoint.path + PATH, body, {"Content-Type": PROTOBUF})
            response = connection.getresponse()
            answer = response.read(MAX_ANSWER)
            if not response.isclosed():
                # More than anybody has to say: what follows would be taken for the next answer.
                connection.close()
        except TimeoutError:
            # Not slow, as a socket is that takes no more now: this connection is of no use.
            raise self._problem(f"no answer within {ANSWER_SECONDS:g} s") from None
        except http.client.HTTPException as error:
            raise self._problem(f"no HTTP ({type(error).__name__})") from None
        except OSError as error:
            raise self._problem(error.strerror or type(error).__name__) from None
        return response.status, answer

    def _problem(self, what: str) -> OSError:
        self.close()
        problem = OSError(what)
        problem.filename = self._where
        return problem

    def _look(self, answer: bytes) -> None:
        try:
            partial = ExportTraceServiceResponse.FromString(answer).partial_success
        except DecodeError:
            return  # its status has said that all is well
        if partial.rejected_spans:
            _log.error(
                "some spans were refused",
                receiver=self._where,
                spans=partial.rejected_spans,
                said=partial.error_message[:200],
            )

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
