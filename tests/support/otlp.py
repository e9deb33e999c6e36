"""A receiver of OTLP over HTTP: an HTTP server that decodes spans by OpenTelemetry's own messages.

Owns the other side of traces in tests. It answers as a test wants it to: with a status, not at all,
or with a partial success. It shares no code with the product.
"""

from __future__ import annotations

import http.server
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Message

__all__ = ["Receiver", "Span", "receiver"]


class Span(NamedTuple):
    """A span with what is around it; times in nanoseconds since the epoch."""

    message: Message
    resource: dict[str, Any]
    attributes: dict[str, Any]

    @property
    def trace(self) -> str:
        return self.message.trace_id.hex()

    @property
    def id(self) -> str:
        return self.message.span_id.hex()

    @property
    def parent(self) -> str:
        return self.message.parent_span_id.hex()

    @property
    def server(self) -> bool:
        return self.message.kind == Message.SPAN_KIND_SERVER


class Receiver:
    """`statuses` are the next answers, 200 once they are used up."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.requests: list[tuple[str, dict[str, str]]] = []
        """Path and header fields of each."""
        self.spans: list[Span] = []
        self.statuses: list[int] = []
        self.fields: dict[str, str] = {}
        """Further header fields of each answer."""
        self.rejects = 0
        self.silent = threading.Event()
        """While set, nothing is answered."""

    def take(self, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
        self.requests.append((path, headers))
        status = self.statuses.pop(0) if self.statuses else 200
        if status != 200:
            return status, b""
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            resource = _values(group.resource.attributes)
            for scope in group.scope_spans:
                assert scope.scope.name == "ztunnel"
                self.spans += (
                    Span(each, resource, _values(each.attributes)) for each in scope.spans
                )
        answer = ExportTraceServiceResponse()
        if self.rejects:
            answer.partial_success.CopyFrom(
                ExportTracePartialSuccess(rejected_spans=self.rejects, error_message="too old")
            )
        return 200, answer.SerializeToString()


def _values(attributes: Any) -> dict[str, Any]:  # noqa: ANN401 - a repeated field
    def value(each: KeyValue) -> Any:  # noqa: ANN401 - of any type
        return getattr(each.value, str(each.value.WhichOneof("value")))

    return {each.key: value(each) for each in attributes}


@contextmanager
def receiver(listening: socket.socket, context: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    """Serve on a socket that is bound, wherever that is; it becomes this server's. With a
    `context` it speaks TLS.
    """
    made = Receiver(listening.getsockname()[1])

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if made.silent.is_set():
                self.close_connection = True
                return
            status, answer = made.take(self.path, dict(self.headers), body)
            self.send_response(status)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            for name, value in made.fields.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("", 0), Handler, bind_and_activate=False)
    server.socket.close()
    listening.listen()
    server.socket = listening
    if context is not None:
        server.socket = context.wrap_socket(listening, server_side=True)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
