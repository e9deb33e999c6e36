"""What runs in the pods of the interop tests: HTTP, and the ways in which plain TCP can end.

Owns five ports on both families. Promises that what is sent back is what arrived, and that all of
them listen once 8080 does. It is a program of its own, started in a pod (`python application.py`).

    2525  a real SMTP server (aiosmtpd): it speaks first
    8080  HTTP: POST anything is answered with its body; GET /received with what 8082 has received
    8081  reads to the end, then answers with the length and SHA-256 of what came
    8082  greets, ends its own side at once, and reads to the end
    8083  sends back what comes, as it comes
"""

from __future__ import annotations

import asyncio
import hashlib
import socket
import socketserver
import threading
from http.server import BaseHTTPRequestHandler
from typing import ClassVar, Final

from aiosmtpd.handlers import Sink
from aiosmtpd.smtp import SMTP

SMTP_PORT: Final = 2525
HTTP_PORT: Final = 8080
DIGEST_PORT: Final = 8081
GREET_PORT: Final = 8082
ECHO_PORT: Final = 8083

GREETING: Final = b"welcome\n"
CHUNK: Final = 65536


def digest(data: bytes) -> bytes:
    """Return how DIGEST_PORT and /received tell of `data`."""
    return f"{len(data)} {hashlib.sha256(data).hexdigest()}\n".encode()


def _read(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(CHUNK), b""))


def _listen(port: int) -> socket.socket:
    return socket.create_server(
        ("::", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True
    )


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True

    def __init__(self, port: int, handler: type[socketserver.BaseRequestHandler]) -> None:
        super().__init__(("::", port), handler, bind_and_activate=False)
        self.socket.close()
        self.socket = _listen(port)


class _Http(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._answer(b"".join(_Greet.received))

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers["Content-Length"])))


class _Digest(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.sendall(digest(_read(self.request)))


class _Greet(socketserver.BaseRequestHandler):
    received: ClassVar[list[bytes]] = []

    def handle(self) -> None:
        self.request.sendall(GREETING)
        self.request.shutdown(socket.SHUT_WR)
        self.received.append(digest(_read(self.request)))


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        for data in iter(lambda: self.request.recv(CHUNK), b""):
            self.request.sendall(data)


async def serve() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: SMTP(Sink(), hostname="application"), sock=_listen(SMTP_PORT)
    )
    # HTTP is the last, and the one whose port says that all of them listen.
    handlers = {DIGEST_PORT: _Digest, GREET_PORT: _Greet, ECHO_PORT: _Echo, HTTP_PORT: _Http}
    for port, handler in handlers.items():
        threading.Thread(target=_Server(port, handler).serve_forever, daemon=True).start()
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve())
