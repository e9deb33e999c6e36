"""A unix socket on a port of loopback, for clients that know no unix sockets.

This module owns a listener and the threads that carry its connections. It promises that both end
with the context.
"""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path

__all__ = ["forwarded"]


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    target: Path


class _Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        server = self.server
        assert isinstance(server, _Server)
        with socket.socket(socket.AF_UNIX) as there, contextlib.suppress(OSError):
            there.connect(str(server.target))
            back = threading.Thread(target=_carry, args=(there, self.request))
            back.start()
            _carry(self.request, there)
            back.join()


def _carry(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def forwarded(target: Path) -> Iterator[str]:
    """Give the address ("http://127.0.0.1:PORT") of what listens on the unix socket `target`."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.target = target
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
