"""Connections of the admin listeners, bounded in number and life.

This module owns what a client may take of the daemon before it has asked for anything. It promises
that every connection ends in time whatever it does, that no more than so many are open at one
listener, where the oldest gives way to the newest, and that no more than so many are in the middle
of a TLS handshake: the library would accept as many as come. It may not know what is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from typing import Final

import structlog
from aiohttp import web

__all__ = ["Limited", "TlsListener"]

log = structlog.get_logger()

CONNECTION_SECONDS: Final = 30.0
"""Life of one connection, whatever it does: every answer is one small document."""

HANDSHAKE_SECONDS: Final = 5.0
"""For TLS, before the life of a connection begins to count: a few round trips."""

MAX_CONNECTIONS: Final = 32
"""Open at a time and listener: Prometheus, probes and a few people."""

RETRY_SECONDS: Final = 1.0
"""After an accept that failed, most likely for want of descriptors: others close some."""


class Limited:
    """Makes protocols whose connections are bounded in number and life."""

    def __init__(self, runner: web.AppRunner) -> None:
        self._runner = runner
        self._open: dict[asyncio.Transport, None] = {}
        """The oldest first."""

    def opened(self, transport: asyncio.Transport) -> None:
        """Have the oldest give way: who opens many and asks nothing shuts nobody out."""
        if len(self._open) >= MAX_CONNECTIONS:
            oldest = next(iter(self._open))
            del self._open[oldest]
            oldest.abort()
        self._open[transport] = None

    def closed(self, transport: asyncio.Transport) -> None:
        self._open.pop(transport, None)

    def __call__(self) -> asyncio.Protocol:
        server = self._runner.server
        assert server is not None  # noqa: S101 - set up before the first listener
        return _Bounded(self, server())


class _Bounded(asyncio.Protocol):
    """Passes everything on to the HTTP protocol, and ends the connection when its time is up."""

    def __init__(self, limits: Limited, http: asyncio.Protocol) -> None:
        self._limits = limits
        self._http = http
        self._transport: asyncio.Transport | None = None
        self._expiry: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - a stream's
        self._transport = transport
        self._limits.opened(transport)
        self._http.connection_made(transport)
        loop = asyncio.get_running_loop()
        self._expiry = loop.call_later(CONNECTION_SECONDS, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport is not None:
            self._limits.closed(self._transport)
        if self._expiry is not None:
            self._expiry.cancel()
        self._http.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._http.data_received(data)

    def eof_received(self) -> bool | None:
        return self._http.eof_received()

    def pause_writing(self) -> None:
        self._http.pause_writing()

    def resume_writing(self) -> None:
        self._http.resume_writing()


class TlsListener:
    """Accepts from `listening` until it is closed, and hands on who has finished a handshake."""

    def __init__(self, limits: Limited, listening: socket.socket, context: ssl.SSLContext) -> None:
        self._limits = limits
        self._listening = listening
        self._context = context
        self._shaking: set[asyncio.Task[None]] = set()
        listening.setblocking(False)
        self._accepting = asyncio.ensure_future(self._accept())

    def close(self) -> None:
        """Stop listening, and end the handshakes that are under way."""
        for task in (self._accepting, *self._shaking):
            task.cancel()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        # Closed here, not by `close`: first the loop must have let go of it.
        with self._listening:
            while True:
                try:
                    accepted, _ = await loop.sock_accept(self._listening)
                except OSError as error:
                    log.warning("the page accepts nobody for a moment", error=str(error))
                    await asyncio.sleep(RETRY_SECONDS)
                    continue
                if len(self._shaking) >= MAX_CONNECTIONS:
                    accepted.close()
                    continue
                task = asyncio.ensure_future(self._shake(accepted))
                self._shaking.add(task)
                task.add_done_callback(self._shaking.discard)

    async def _shake(self, accepted: socket.socket) -> None:
        # Whoever knocks and goes, or speaks no TLS, is no event: only his connection ends.
        with contextlib.suppress(OSError, ssl.SSLError):
            await asyncio.get_running_loop().connect_accepted_socket(
                self._limits,
                accepted,
                ssl=self._context,
                ssl_handshake_timeout=HANDSHAKE_SECONDS,
            )
