"""What the exercises' HTTP servers have in common.

This module owns listening and answering: IPv4 and IPv6 on one port, HTTP/1.1 with connections kept
open, one thread a connection, one line a request on standard output. It promises an answer to every
request, also when the program behind it fails. It may not know what is answered.
"""

from __future__ import annotations

import http.client
import json
import socket
import socketserver
import sys
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from typing import Final, NamedTuple

__all__ = ["Answer", "Request", "as_json", "fetch", "serve"]

MAX_BODY: Final = 16 * 1024 * 1024
"""Bytes of a request's body: enough for any exercise, and no program of ours grows beyond it."""
CONNECTION_SECONDS: Final = 300.0
"""An idle connection ends after this, as in common servers."""
CALL_SECONDS: Final = 10.0
"""A call to another service of the exercise fails after this."""


class Request(NamedTuple):
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    client: str
    server: str


class Answer(NamedTuple):
    body: bytes
    status: int = 200
    kind: str = "text/plain; charset=utf-8"


def as_json(value: object, status: int = 200) -> Answer:
    return Answer((json.dumps(value, indent=2) + "\n").encode(), status, "application/json")


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    address_family = socket.AF_INET6
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 1024
    program: Callable[[Request], Answer]

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


def serve(port: int, program: Callable[[Request], Answer]) -> None:
    """Answer every request on `port` with what `program` returns, until the process ends."""
    with _Server(("::", port), _Handler) as server:
        server.program = program
        server.serve_forever()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "lab"
    timeout = CONNECTION_SECONDS
    server: _Server

    def _respond(self) -> None:
        length = self.headers.get("Content-Length", "0")
        if not length.isdecimal() or int(length) > MAX_BODY:
            self.send_error(413)
            return
        body = self.rfile.read(int(length))
        own = self.connection.getsockname()[0]
        request = Request(
            self.command,
            self.path,
            {name.title(): value for name, value in self.headers.items()},
            body,
            _plain(self.client_address[0]),
            _plain(own),
        )
        try:
            answer = self.server.program(request)
        except (OSError, http.client.HTTPException, ValueError) as error:
            answer = Answer(f"{type(error).__name__}: {error}\n".encode(), 503)
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _respond  # noqa: N815 - http.server's names

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        sys.stdout.write(f"{_plain(self.client_address[0])} {format % args}\n")
        sys.stdout.flush()


def _plain(address: object) -> str:
    return str(address).removeprefix("::ffff:")


def fetch(url: str) -> tuple[int, bytes]:
    """GET `url` ("host:port", a path may follow). Raises OSError or HTTPException."""
    host, _, path = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=CALL_SECONDS)
    try:
        connection.request("GET", f"/{path}")
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()
