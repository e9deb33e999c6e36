"""The tunnel's HTTP ports: /metrics, /stats, /healthz/ready and /healthz/live.

This module owns two small servers for GET and HEAD. It promises that a client costs a bounded
amount of memory and time (connections, header bytes, deadlines, also if it reads nothing), that who
is silent keeps nobody out, that a probe is answered on the
event loop itself, so that an answer shows that the loop turns, and that readiness is true only when
traffic would pass, and that a page in a browser cannot reach a loopback address by DNS rebinding
(Host check). It may not change anything.
"""

from __future__ import annotations

import asyncio
import http
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Final, NamedTuple

import h11
import structlog

from ztunnel import address

__all__ = ["Asked", "Check", "Page", "Server", "health_page", "parse_address"]

_log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("ztunnel.admin")

MAX_CONNECTIONS: Final = 32
"""Of one server. Prometheus, the kubelet and a person are three."""

MAX_HEADER_BYTES: Final = 8192
"""Of one request: probes and Prometheus send a few hundred."""

REQUEST_SECONDS: Final = 5.0
"""For a request to arrive, keep-alive pauses included in `IDLE_SECONDS`."""

IDLE_SECONDS: Final = 60.0
"""Between requests of one connection: Prometheus asks every 15 to 60 seconds."""

ANSWER_SECONDS: Final = 15.0
"""To make an answer and have it read."""

GOODBYE_SECONDS: Final = 5.0
"""For what is written to be read when a connection ends: a socket's buffer and some 64 KB."""

READ_BYTES: Final = 4096
LOOPBACK_HOSTS: Final = frozenset({"127.0.0.1", "[::1]", "localhost"})
MAX_PORT: Final = 65535


class Page:
    """An answer: status, media type, body.

    `rest` are portions of the body behind `body`, each made on a thread when the one before it is
    on its way, so that a large answer is never held as a whole.
    """

    __slots__ = ("body", "media", "rest", "status")

    def __init__(
        self, status: int, media: str, body: bytes, rest: Iterator[bytes] | None = None
    ) -> None:
        self.status = status
        self.media = media
        self.body = body
        self.rest = rest


class Asked(NamedTuple):
    """What a page may depend on: behind the path's "?", and the header Accept; else empty."""

    query: str = ""
    accept: str = ""


Check = tuple[str, str]
"""A check's name and what is wrong, "" when nothing is."""


def health_page(checks: list[Check]) -> Page:
    """200 when every check passes, else 503; the body names each, for people."""
    failing = [problem for _, problem in checks if problem]
    lines = [f"{name}: {problem or 'ok'}" for name, problem in checks]
    head = "not ready" if failing else "ok"
    body = "\n".join([head, *lines, ""]).encode("utf-8", "replace")
    return Page(503 if failing else 200, "text/plain; charset=utf-8", body)


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of "A.B.C.D:P" or "[V6]:P". Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit()) or int(port) > MAX_PORT:
        raise ValueError(f"{text!r} is no ADDRESS:PORT")
    if host.startswith("[") and host.endswith("]"):
        return host[1:-1], int(port)
    if ":" in host:
        raise ValueError(f"{text!r}: an IPv6 address needs brackets")
    return host, int(port)


Handler = Callable[[Asked], Awaitable[Page]]


class Server:
    """Serves `pages` (path to handler) on one address."""

    def __init__(self, pages: Mapping[str, Handler]) -> None:
        self._pages = pages
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()
        self._silent: dict[asyncio.Task[None], None] = {}
        """Of these, those whose next request has not come yet, the longest silent first."""
        self.refused = 0
        """Connections closed because too many were open and all of them at work."""

    async def start(self, host: str, port: int) -> tuple[str, int]:
        """Listen; return the address, with the port that was chosen for port 0. Raises OSError."""
        self._server = await asyncio.start_server(
            self._accept, host, port, limit=MAX_HEADER_BYTES, backlog=MAX_CONNECTIONS
        )
        name = self._server.sockets[0].getsockname()
        return str(name[0]), int(name[1])

    def release(self) -> None:
        """Give the port up at once, and end the connections that are open."""
        if self._server is not None:
            self._server.close()
        for task in self._open:
            task.cancel()

    async def stop(self) -> None:
        self.release()
        await asyncio.gather(*self._open, return_exceptions=True)
        if self._server is not None:
            await self._server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or not self._has_room():
            self.refused += 1
            writer.transport.abort()
            return
        self._open.add(task)
        try:
            await self._serve(reader, writer, task)
            await _goodbye(writer)
        except (OSError, TimeoutError, h11.RemoteProtocolError, asyncio.CancelledError):
            # A client that went, stalled, spoke nonsense or gave way: it gets no further answer.
            pass
        except Exception:  # noqa: BLE001 - the daemon must not end by a page
            _log.exception("an admin page broke off")
        finally:
            # If it has not said goodbye: to wait until it has read would be to wait for ever.
            writer.transport.abort()
            self._open.discard(task)
            self._silent.pop(task, None)

    def _has_room(self) -> bool:
        if len(self._open) < MAX_CONNECTIONS:
            return True
        longest = next(iter(self._silent), None)
        if longest is None:
            return False
        longest.cancel()
        del self._silent[longest]
        self._open.discard(longest)
        return True

    async def _serve(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        task: asyncio.Task[None],
    ) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEADER_BYTES)
        wait = REQUEST_SECONDS
        while True:
            self._silent[task] = None
            try:
                async with asyncio.timeout(wait):
                    request = await _request(connection, reader)
            except h11.RemoteProtocolError as error:
                await _answer_error(connection, writer, error)
                return
            finally:
                self._silent.pop(task, None)
            if request is None:
                return
            async with asyncio.timeout(ANSWER_SECONDS):
                await self._answer(connection, writer, request)
            if connection.our_state is not h11.DONE:
                return
            connection.start_next_cycle()
            wait = IDLE_SECONDS

    async def _answer(
        self, connection: h11.Connection, writer: asyncio.StreamWriter, request: h11.Request
    ) -> None:
        method = request.method.decode("ascii")
        path, _, query = request.target.decode("ascii", "replace").partition("?")
        handler = self._pages.get(path)
        if not _host_fits(request, writer.get_extra_info("sockname")[0]):
            page = Page(421, "text/plain", b"the Host header must name the loopback address\n")
        elif method not in ("GET", "HEAD"):
            page = Page(405, "text/plain", b"only GET and HEAD\n")
        elif handler is None:
            known = "".join(f"{known}\n" for known in sorted(self._pages))
            page = Page(404, "text/plain", f"not here; try:\n{known}".encode())
        else:
            asked = Asked(query, _header(request, b"accept"))
            page = await self._page(path, handler, asked)
        await _send(connection, writer, page, head=method == "HEAD")

    async def _page(self, path: str, handler: Handler, asked: Asked) -> Page:
        try:
            return await handler(asked)
        except Exception:  # noqa: BLE001 - the daemon must not end by a page
            _log.exception("an admin page failed", path=path)
            return Page(500, "text/plain", b"internal error: see the log\n")


def _host_fits(request: h11.Request, local: str) -> bool:
    """On loopback the Host must be loopback's; elsewhere nobody knows all names of the node.

    A browser that was told that some site's name is 127.0.0.1 still sends that name.
    """
    # Without the scope id of a link-local address.
    if not address.is_local_only(address.pack(local.partition("%")[0])):
        return True
    host = _header(request, b"host")
    name, colon, port = host.rpartition(":")
    if not colon or host.endswith("]"):
        name, port = host, "0"
    return name in LOOPBACK_HOSTS and port.isascii() and port.isdigit()


def _header(request: h11.Request, wanted: bytes) -> str:
    return next((value.decode("latin-1") for name, value in request.headers if name == wanted), "")


async def _request(connection: h11.Connection, reader: asyncio.StreamReader) -> h11.Request | None:
    """Return the next request, its body read and dropped; None at the end of the connection."""
    request: h11.Request | None = None
    seen = 0
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            data = await reader.read(READ_BYTES)
            seen += len(data)
            if seen > 2 * MAX_HEADER_BYTES:
                raise h11.RemoteProtocolError("request too large", error_status_hint=413)
            connection.receive_data(data)
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.EndOfMessage):
            return request
        elif isinstance(event, h11.ConnectionClosed):
            return None


async def _goodbye(writer: asyncio.StreamWriter) -> None:
    """Close when what is written has gone. Raises TimeoutError, OSError."""
    writer.close()
    async with asyncio.timeout(GOODBYE_SECONDS):
        await writer.wait_closed()


async def _answer_error(
    connection: h11.Connection, writer: asyncio.StreamWriter, error: h11.RemoteProtocolError
) -> None:
    if connection.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
        return
    page = Page(error.error_status_hint, "text/plain", b"bad request\n")
    async with asyncio.timeout(ANSWER_SECONDS):
        await _send(connection, writer, page, head=False, close=True)


async def _send(
    connection: h11.Connection,
    writer: asyncio.StreamWriter,
    page: Page,
    *,
    head: bool,
    close: bool = False,
) -> None:
    headers = [
        ("content-type", page.media),
        ("cache-control", "no-store"),
        ("x-content-type-options", "nosniff"),
    ]
    if page.status == http.HTTPStatus.METHOD_NOT_ALLOWED:
        headers.append(("allow", "GET, HEAD"))
    if page.rest is None:
        headers.append(("content-length", str(len(page.body))))
    reason = http.HTTPStatus(page.status).phrase
    if close:
        headers.append(("connection", "close"))
    response = h11.Response(status_code=page.status, headers=headers, reason=reason)
    writer.write(connection.send(response) or b"")
    if not head:
        writer.write(connection.send(h11.Data(data=page.body)) or b"")
        while page.rest and (portion := await asyncio.to_thread(next, page.rest, b"")):
            writer.write(connection.send(h11.Data(data=portion)) or b"")
            await writer.drain()
    writer.write(connection.send(h11.EndOfMessage()) or b"")
    await writer.drain()
