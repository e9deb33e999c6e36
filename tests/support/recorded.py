"""An agent's admin socket that gives recorded answers: what a node once said, byte for byte.

The answers are files, recorded from a lab; nothing in here computes one.
"""

from __future__ import annotations

import contextlib
import http.server
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path

__all__ = ["answering"]


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True

    def __init__(self, path: Path, answers: Path) -> None:
        self.answers = answers
        super().__init__(str(path), _Handler)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].strip("/").replace("/", "_")
        file = self.server.answers / f"{name}.json"
        found = file.is_file()
        body = file.read_bytes() if found else b"no such answer\n"
        self.send_response(200 if found else 404)
        self.send_header("Content-Type", "application/json" if found else "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments: object) -> None:
        """Say nothing."""

    def address_string(self) -> str:
        return "unix"


@contextlib.contextmanager
def answering(directory: Path, answers: Path) -> Iterator[Path]:
    """Answer from the files in `answers` on an admin socket in `directory`, a run directory."""
    with _Server(directory / "admin.sock", answers) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield directory
        finally:
            server.shutdown()
            thread.join()
            (directory / "admin.sock").unlink()
