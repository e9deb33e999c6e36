"""A node's admin listener with a picture of our making, for the page to be looked at.

This module owns the real server in a thread of its own, and what is behind it. It promises that the
page under test talks to what a daemon serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path

import msgspec

from nodeagent.admin import AdminServer, Configuration, NoAnswerError, Question, Status, Window
from nodeagent.page import Files, Gate
from support.picture import Picture
from ztunnel import protocol

__all__ = ["Files", "Site", "admin_server", "site", "static_files"]


def static_files() -> Path:
    """Return the directory of the page's own files."""
    return Path(__file__).parents[2] / "nodeagent/page/static"


class _Backend:
    def __init__(self, picture: Picture) -> None:
        self.picture = picture

    async def status(self) -> Status:
        return self.picture.status()

    async def missing(self) -> tuple[str, ...]:
        return self.picture.missing

    def stuck(self) -> str:
        return ""

    async def metrics(self, *, openmetrics: bool) -> bytes:
        raise NotImplementedError(f"the page asks for no metrics ({openmetrics=})")

    def resources(self) -> tuple[protocol.Resource, ...]:
        return ()

    def configuration(self) -> Configuration | None:
        return None

    async def flows(self, age: int) -> bytes:
        raise NotImplementedError(f"the page asks for no flows of {age} s")

    async def plaintext(self, seconds: int) -> bytes:
        self.picture.asked.append(seconds)
        return msgspec.json.encode(self.picture.plaintext)

    async def asdex(self, _seconds: int) -> bytes:
        return msgspec.json.encode(self.picture.asdex())

    async def connections(self, query: Mapping[str, str]) -> bytes:
        self.picture.queries.append(dict(query))
        wanted = protocol.ConnectionFilter.read(query)
        if self.picture.mute:
            raise NoAnswerError(self.picture.mute)
        return msgspec.json.encode(self.picture.open(wanted))

    async def graph(self, seconds: int) -> bytes:
        self.picture.asked.append(seconds)
        return msgspec.json.encode(self.picture.graph(seconds))


class Site(msgspec.Struct, frozen=True):
    """A running server. `picture` is what it shows, `address` where ("http://127.0.0.1:PORT")."""

    address: str
    picture: Picture


def admin_server(
    picture: Picture, *, files: Files | None = None, graph: bool = True
) -> AdminServer:
    """Return the product's server with `picture` behind it; it listens nowhere yet."""
    backend = _Backend(picture)
    windows = {
        "/report/plaintext": Window("who calls without identity", backend.plaintext),
        "/asdex": Window("how well connections are protected", backend.asdex),
    }
    if graph:
        windows["/graph"] = Window("who talked to whom", backend.graph)
    questions = {"/connections": Question("what is open", backend.connections)}
    return AdminServer(backend, windows, questions=questions, files=files)


@contextlib.contextmanager
def site(
    *,
    files: Files | None = None,
    gate: Gate | None = None,
    graph: bool = True,
    unix: Path | None = None,
    context: ssl.SSLContext | None = None,
) -> Iterator[Site]:
    """Serve a picture on loopback: behind `gate` if there is one, then over TLS if there is a
    `context`; with `/graph` or without; or on the unix socket `unix`.
    """
    picture = Picture()
    if unix is None:
        listening = socket.create_server(("127.0.0.1", 0))
        scheme = "http" if context is None else "https"
        address = f"{scheme}://127.0.0.1:{listening.getsockname()[1]}"
    else:
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(os.fspath(unix))
        address = ""

    async def serve(admin: AdminServer) -> None:
        if gate is None:
            await admin.serve(listening)
        else:
            await admin.serve_page(listening, gate, context)

    with _loop() as run:
        admin = admin_server(picture, files=files, graph=graph)
        run(serve(admin))
        try:
            yield Site(address, picture)
        finally:
            run(admin.close())


@contextlib.contextmanager
def _loop() -> Iterator[Callable[[Awaitable[None]], None]]:
    """Run an event loop in a thread, and give what runs something in it."""
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def last() -> None:
        ended = asyncio.Event()
        started.set_result((asyncio.get_running_loop(), ended))
        await ended.wait()

    async def awaited(work: Awaitable[None]) -> None:
        await work

    # `asyncio.run` also ends what connections have left behind.
    thread = threading.Thread(target=lambda: asyncio.run(last()))
    thread.start()
    loop, ended = started.result()
    try:
        yield lambda work: asyncio.run_coroutine_threadsafe(awaited(work), loop).result(20)
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
