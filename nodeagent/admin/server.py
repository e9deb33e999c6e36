"""The admin listeners: HTTP on loopback and on a unix socket, reading only.

This module owns the HTTP surface. It promises that no request changes anything, that a page in a
browser cannot reach it by DNS rebinding (Host check), that other users of the node get metrics and
health but no configuration, that a slow or greedy client is cut off by deadlines and limits, and
that what is dumped holds no key. It may not know where the answers come from (`Backend`).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import re
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Protocol

import msgspec
import structlog
from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware

from nodeagent.admin.bounded import Limited, TlsListener
from nodeagent.admin.configuration import Configuration
from nodeagent.admin.metrics import CONTENT_TYPE, OPENMETRICS_TYPE
from nodeagent.admin.model import Status
from nodeagent.page import HOME, Files, Gate, add_routes, behind, wants_page
from ztunnel import protocol

__all__ = [
    "AdminServer",
    "Backend",
    "NoAnswerError",
    "Page",
    "Question",
    "Relay",
    "Relayed",
    "Window",
    "dump_resource",
    "socket_owner",
]

log = structlog.get_logger()

MAX_AGE_DIGITS: Final = 10
"""Of a number of seconds: three hundred years."""

MAX_LINE: Final = 4096
"""Bytes of the request line and of one header."""

_QUALITY: Final = re.compile(r"[01](?:\.[0-9]{0,3})?")

_PRIVATE: Final = frozenset({"/status", "/config_dump", "/configuration", "/flows"})
"""Paths that tell who runs here: on loopback for root (and this daemon's user) alone. So are those
of a `Window`, a `Page` and a `Question`."""


class Page(msgspec.Struct, frozen=True):
    """An answer in JSON that asks for nothing. `text` says what it is."""

    text: str
    answer: Callable[[], Awaitable[bytes]]


class Window(msgspec.Struct, frozen=True):
    """An answer in JSON about the last so many seconds. `text` says what it is.

    `answer` raises NoAnswerError.
    """

    text: str
    answer: Callable[[int], Awaitable[bytes]]


class Relayed(msgspec.Struct, frozen=True):
    """A page that ztunnel has made: HTTP status, media type, text."""

    status: int
    media: str
    body: str


class Relay(msgspec.Struct, frozen=True):
    """A page of ztunnel's, for a URL's query as it came: for everybody. `text` says what it is."""

    text: str
    answer: Callable[[str], Awaitable[Relayed]]


class Question(msgspec.Struct, frozen=True):
    """An answer in JSON to a query's parameters. `text` says what it is.

    `answer` raises ValueError, which says what is wrong with them, and NoAnswerError.
    """

    text: str
    answer: Callable[[Mapping[str, str]], Awaitable[bytes]]


class NoAnswerError(Exception):
    """There is no answer now; the message says why."""


class Backend(Protocol):
    """Where the answers come from."""

    async def status(self) -> Status:
        """The whole picture, ztunnel's own part included; bounded in time."""

    async def missing(self) -> tuple[str, ...]:
        """What keeps the node from being ready; empty when it is."""

    def stuck(self) -> str:
        """Why this process should be restarted; empty while it is alive."""

    async def metrics(self, *, openmetrics: bool) -> bytes:
        """Text for Prometheus, in its own format or as OpenMetrics."""

    def resources(self) -> tuple[protocol.Resource, ...]:
        """The state that ztunnel is to hold."""

    def configuration(self) -> Configuration | None:
        """The documents that the state is made of; None before there are any."""

    async def flows(self, age: int) -> bytes:
        """JSON of the callers that were seen in the last `age` seconds."""


class AdminServer:
    """Serves a Backend, and by path what else there is, on any number of listening sockets."""

    def __init__(
        self,
        backend: Backend,
        windows: Mapping[str, Window] | None = None,
        pages: Mapping[str, Page] | None = None,
        relays: Mapping[str, Relay] | None = None,
        questions: Mapping[str, Question] | None = None,
        files: Files | None = None,
    ) -> None:
        """`files` are those of the web page; None: the installed ones. Raises OSError."""
        self._backend = backend
        self._files = files or Files.installed()
        windows, pages, relays = windows or {}, pages or {}, relays or {}
        questions = questions or {}
        self._private = _PRIVATE | windows.keys() | pages.keys() | questions.keys()
        self._texts = {
            path: f"{window.text}; ?seconds=3600 says since when"
            for path, window in windows.items()
        }
        self._texts |= {path: page.text for path, page in pages.items()}
        self._texts |= {path: relay.text for path, relay in relays.items()}
        self._texts |= {path: question.text for path, question in questions.items()}
        self._handlers = {
            **{path: _window(window) for path, window in windows.items()},
            **{path: _page(page) for path, page in pages.items()},
            **{path: _relay(relay) for path, relay in relays.items()},
            **{path: _question(question) for path, question in questions.items()},
        }
        self._servers: list[asyncio.Server | TlsListener] = []
        self._runner = self._make(self._guard)
        self._gated: list[web.AppRunner] = []

    def _make(self, guard: Middleware) -> web.AppRunner:
        """Return a runner of all paths, for the listeners that `guard` stands before."""
        app = web.Application(middlewares=[_errors, guard], client_max_size=1)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/healthz/ready", self._ready)
        app.router.add_get("/healthz/live", self._live)
        app.router.add_get("/status", self._status)
        app.router.add_get("/config_dump", self._config_dump)
        app.router.add_get("/configuration", self._configuration)
        app.router.add_get("/flows", self._flows)
        for path, handler in self._handlers.items():
            app.router.add_get(path, handler)
        add_routes(app.router, self._files)
        app.router.add_get("/", self._index)
        app.on_response_prepare.append(_close_after)
        return web.AppRunner(
            app,
            handle_signals=False,
            access_log=None,
            logger=_silent(),
            max_line_size=MAX_LINE,
            max_field_size=MAX_LINE,
        )

    async def serve(self, listening: socket.socket) -> None:
        """Begin to serve on `listening` (unix or TCP), which becomes this server's."""
        if self._runner.server is None:
            await self._runner.setup()
        await self._listen(self._runner, listening)

    async def serve_page(
        self, listening: socket.socket, gate: Gate, context: ssl.SSLContext | None
    ) -> None:
        """Show the page, and what it asks for, to whom `gate` admits; over TLS by `context`."""
        runner = self._make(behind(gate))
        await runner.setup()
        self._gated.append(runner)
        if context is None:
            await self._listen(runner, listening)
        else:
            self._servers.append(TlsListener(Limited(runner), listening, context))

    async def _listen(self, runner: web.AppRunner, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        self._servers.append(await loop.create_server(Limited(runner), sock=listening))

    async def close(self) -> None:
        """Stop listening and end what is open."""
        for server in self._servers:
            server.close()
        for runner in (self._runner, *self._gated):
            await runner.cleanup()

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        connected = request.transport and request.transport.get_extra_info("socket")
        if not connected or connected.family == socket.AF_UNIX:
            return await handler(request)
        if not _own_host(request.headers.get(hdrs.HOST, "")):
            raise web.HTTPMisdirectedRequest(
                text="the Host header must name the loopback address: use http://127.0.0.1\n"
            )
        if request.path in self._private:
            owner = await asyncio.to_thread(
                socket_owner, connected.getpeername(), connected.getsockname()
            )
            if owner not in {0, os.geteuid()}:
                raise web.HTTPForbidden(
                    text="for root only: this names every workload of the node\n"
                )
        return await handler(request)

    async def _metrics(self, request: web.Request) -> web.Response:
        openmetrics = _takes_openmetrics(request.headers.get(hdrs.ACCEPT, ""))
        body = await self._backend.metrics(openmetrics=openmetrics)
        media = OPENMETRICS_TYPE if openmetrics else CONTENT_TYPE
        return web.Response(body=body, headers={hdrs.CONTENT_TYPE: media})

    async def _ready(self, _request: web.Request) -> web.Response:
        missing = await self._backend.missing()
        if missing:
            return web.Response(
                status=503, text="".join(f"not ready: {line}\n" for line in missing)
            )
        return web.Response(text="ready\n")

    async def _live(self, _request: web.Request) -> web.Response:
        reason = self._backend.stuck()
        if reason:
            return web.Response(status=503, text=f"stuck: {reason}\n")
        return web.Response(text="alive\n")

    async def _status(self, _request: web.Request) -> web.Response:
        status = await self._backend.status()
        return web.Response(body=msgspec.json.encode(status), content_type="application/json")

    async def _config_dump(self, _request: web.Request) -> web.Response:
        dump: dict[str, list[dict[str, Any]]] = {}
        for resource in self._backend.resources():
            document = dump_resource(resource)
            dump.setdefault(str(document.pop("t")), []).append(document)
        body = json.dumps({"schema": 1, "resources": dump}, indent=1, sort_keys=True)
        return web.Response(text=body + "\n", content_type="application/json")

    async def _configuration(self, _request: web.Request) -> web.Response:
        found = self._backend.configuration()
        if found is None:
            return web.Response(status=503, text="no configuration is in force yet\n")
        # Tens of megabytes in a large mesh.
        body = await asyncio.to_thread(msgspec.json.encode, found)
        return web.Response(body=body, content_type="application/json")

    async def _index(self, request: web.Request) -> web.Response:
        if wants_page(request):
            raise web.HTTPFound(HOME)
        paths: Mapping[str, str] = {
            HOME: "the web page",
            "/metrics": "Prometheus metrics",
            "/healthz/ready": "200 when traffic would pass, else 503 and what is missing",
            "/healthz/live": "200 while the process works",
            "/status": "the whole picture as JSON",
            "/config_dump": "the state that ztunnel is to hold, without keys",
            "/configuration": "the documents in force, for nodeagent policy",
            "/flows": "who has called the workloads of this node; ?seconds=3600 says since when",
            **self._texts,
        }
        return web.Response(text="".join(f"{path:16} {text}\n" for path, text in paths.items()))

    async def _flows(self, request: web.Request) -> web.Response:
        return web.Response(
            body=await self._backend.flows(_age(request)), content_type="application/json"
        )


def _page(page: Page) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(_request: web.Request) -> web.Response:
        return web.Response(body=await page.answer(), content_type="application/json")

    return handle


def _relay(relay: Relay) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(request: web.Request) -> web.Response:
        page = await relay.answer(request.rel_url.raw_query_string)
        return web.Response(
            status=page.status, body=page.body.encode(), headers={hdrs.CONTENT_TYPE: page.media}
        )

    return handle


def _window(window: Window) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(request: web.Request) -> web.Response:
        try:
            body = await window.answer(_age(request))
        except NoAnswerError as error:
            raise web.HTTPServiceUnavailable(text=f"{error}\n") from None
        return web.Response(body=body, content_type="application/json")

    return handle


def _question(question: Question) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(request: web.Request) -> web.Response:
        if len(set(request.query)) != len(request.query):
            raise web.HTTPBadRequest(text="a parameter is there twice\n")
        try:
            body = await question.answer(request.query)
        except ValueError as error:
            raise web.HTTPBadRequest(text=f"{error}\n") from None
        except NoAnswerError as error:
            raise web.HTTPServiceUnavailable(text=f"{error}\n") from None
        return web.Response(body=body, content_type="application/json")

    return handle


def _age(request: web.Request) -> int:
    """Return the seconds that a request asks for. Raises HTTPBadRequest."""
    age = request.query.get("seconds", "3600")
    if not (age.isascii() and age.isdigit() and len(age) <= MAX_AGE_DIGITS):
        raise web.HTTPBadRequest(text="seconds: write a whole number, as in ?seconds=3600\n")
    return int(age)


def dump_resource(resource: protocol.Resource) -> dict[str, Any]:
    """Return the resource as JSON values: no private key, DER as SHA-256 fingerprints."""
    if isinstance(resource, protocol.Credential):
        return {
            "t": "credential",
            "uid": resource.uid,
            "chain_sha256": [hashlib.sha256(der).hexdigest() for der in resource.chain],
            "not_before": resource.not_before,
            "not_after": resource.not_after,
        }
    if isinstance(resource, protocol.TrustBundle):
        roots = [hashlib.sha256(der).hexdigest() for der in resource.roots]
        return {"t": "trust_bundle", "uid": resource.uid, "roots_sha256": roots}
    document = msgspec.to_builtins(resource, str_keys=True)
    assert isinstance(document, dict)  # noqa: S101 - a struct becomes a dict
    return document


def socket_owner(client: Any, server: Any, root: str = "/proc/self/net") -> int | None:  # noqa: ANN401 - as the socket module gives them
    """Return the user id of the process that holds the client's end of a TCP connection.

    `client` and `server` are socket addresses as `getpeername` gives them. None if the kernel's
    table (proc(5), /proc/net/tcp) does not list the connection.
    """
    wanted = [_table_form(*client[:2]), _table_form(*server[:2])]
    name = "tcp6" if ":" in client[0] else "tcp"
    with open(f"{root}/{name}", encoding="ascii") as table:  # noqa: PTH123 - procfs
        for line in table:
            fields = line.split()
            if fields[1:3] == wanted:
                return int(fields[7])
    return None


def _table_form(host: str, port: int) -> str:
    packed = socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"


def _takes_openmetrics(accept: str) -> bool:
    """Who takes it gets it, unless text is preferred (RFC 9110, 12.5.1: quality values)."""
    quality = {"application/openmetrics-text": 0.0, "text/plain": 0.0}
    for each in accept.split(","):
        kind, *parameters = (part.strip().lower() for part in each.split(";"))
        if kind in quality:
            said = next((each[2:] for each in parameters if each.startswith("q=")), "1")
            weight = float(said) if _QUALITY.fullmatch(said) else 1.0
            quality[kind] = max(quality[kind], weight)
    return 0 < quality["application/openmetrics-text"] >= quality["text/plain"]


def _own_host(host: str) -> bool:
    name, colon, port = host.rpartition(":")
    if not colon or host.endswith("]"):
        name, port = host, "0"
    return name in {"127.0.0.1", "localhost", "[::1]"} and port.isascii() and port.isdigit()


def _silent() -> logging.Logger:
    # The library writes a traceback with the client's bytes for every malformed request. What our
    # own handlers do wrong is logged by `_errors`.
    logger = logging.getLogger("nodeagent.admin.http")
    logger.setLevel(logging.CRITICAL)
    return logger


async def _close_after(_request: web.Request, response: web.StreamResponse) -> None:
    response.force_close()
    response.headers[hdrs.SERVER] = "nodeagent"
    response.headers.setdefault(hdrs.CACHE_CONTROL, "no-store")
    response.headers["X-Content-Type-Options"] = "nosniff"


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException:
        raise
    except Exception as error:
        log.exception("admin request failed", path=request.path)
        raise web.HTTPInternalServerError(text=f"{type(error).__name__}; see the log\n") from error
