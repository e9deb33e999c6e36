from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from support.netns import wait_until
from ztunnel import admin
from ztunnel.admin import Asked, Page, Server, health_page, parse_address

DEADLINE = 30


async def hello(asked: Asked) -> Page:
    return Page(200, "text/plain", f"hello{asked.query}\n".encode())


async def broken(_asked: Asked) -> Page:
    raise ZeroDivisionError


async def portions(asked: Asked) -> Page:
    made = (f"{number} {asked.query} {asked.accept}\n".encode() for number in range(3))
    return Page(200, "text/plain", b"first\n", made)


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[tuple[Server, int]]:
    server = Server({"/hello": hello, "/broken": broken, "/portions": portions})
    _, port = await server.start("127.0.0.1", 0)
    try:
        async with asyncio.timeout(DEADLINE):
            yield server, port
    finally:
        await server.stop()


async def exchange(port: int, data: bytes) -> bytes:
    """Send `data` and return everything until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        await writer.drain()
        return await reader.read()
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def asked(data: bytes) -> bytes:
    async def whole() -> bytes:
        async with serving() as (_, port):
            return await exchange(port, data)

    return asyncio.run(whole())


def request(path: str, method: str = "GET") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode()


def get(path: str, method: str = "GET") -> bytes:
    return asked(request(path, method))


def test_a_method_that_is_not_allowed_is_told_which_are() -> None:
    assert b"\r\nallow: GET, HEAD\r\n" in get("/hello", "POST")


def test_a_page_is_served() -> None:
    head, _, body = get("/hello").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert body == b"hello\n"


def test_a_page_is_given_the_query() -> None:
    assert get("/hello?x=1&y=%3D").endswith(b"\r\n\r\nhellox=1&y=%3D\n")


def test_head_has_no_body() -> None:
    head, _, body = get("/hello", "HEAD").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert b"content-length: 6" in head
    assert body == b""


@pytest.mark.parametrize(
    "path, method, status",
    [
        ("/hello?x=1", "GET", 200),
        ("/nothing", "GET", 404),
        ("/hello/../broken", "GET", 404),
        ("/hello", "POST", 405),
        ("/hello", "DELETE", 405),
        ("/broken", "GET", 500),
    ],
)
def test_other_requests_get_their_status(path: str, method: str, status: int) -> None:
    assert get(path, method).startswith(f"HTTP/1.1 {status}".encode())


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"GET /hello\r\n\r\n",
        b"GET /hello HTTP/1.1\r\nhost: localhost\r\nbad header\r\n\r\n",
        b"GET /hello HTTP/1.1\r\nx: " + b"a" * 3 * admin.MAX_HEADER_BYTES,
        b"POST /hello HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999\r\n\r\n"
        + b"a" * 100_000,
    ],
    ids=["tls", "no version", "bad header", "long header", "long body"],
)
def test_nonsense_is_refused_and_the_connection_closed(data: bytes) -> None:
    with contextlib.suppress(ConnectionError):
        found = asked(data)
        assert found == b"" or found.startswith(b"HTTP/1.1 4")


def test_one_connection_carries_several_requests() -> None:
    request = b"GET /hello HTTP/1.1\r\nhost: localhost\r\n\r\n"
    last = b"GET /hello HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    assert asked(request + last).count(b"hello\n") == 2


def test_a_client_that_stalls_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "REQUEST_SECONDS", 0.02)
    assert asked(b"GET /hel") == b""


def test_who_is_silent_gives_way_and_keeps_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "MAX_CONNECTIONS", 2)

    async def whole() -> None:
        async with serving() as (server, port):
            silent, other = await asyncio.open_connection("127.0.0.1", port)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /hello HTTP/1.1\r\nhost: localhost\r\n\r\n")
            await reader.readuntil(b"hello\n")
            # Of two that ask for nothing now it is the one that has been silent for longer.
            assert b"hello" in await exchange(port, request("/hello"))
            with contextlib.suppress(ConnectionResetError):
                assert await silent.read() == b""
            writer.write(b"GET /hello HTTP/1.1\r\nhost: localhost\r\n\r\n")
            await reader.readuntil(b"hello\n")
            assert server.refused == 0
            for each in (other, writer):
                each.close()

    asyncio.run(whole())


def test_connections_at_work_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "MAX_CONNECTIONS", 1)
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow(_asked: Asked) -> Page:
        begun.set()
        await go_on.wait()
        return Page(200, "text/plain", b"slow\n")

    async def whole() -> None:
        server = Server({"/slow": slow, "/hello": hello})
        _, port = await server.start("127.0.0.1", 0)
        first = asyncio.create_task(exchange(port, request("/slow")))
        await begun.wait()
        with contextlib.suppress(ConnectionResetError):
            assert await exchange(port, request("/hello")) == b""
        assert server.refused == 1
        go_on.set()
        assert b"slow" in await first
        assert b"hello" in await exchange(port, request("/hello"))
        await server.stop()

    asyncio.run(whole())


def test_who_asks_and_never_reads_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than all buffers hold: the connection must not stay, uncounted, until it is read."""
    monkeypatch.setattr(admin, "ANSWER_SECONDS", 0.2)
    begun = asyncio.Event()

    def endless() -> Iterator[bytes]:
        while True:
            begun.set()
            yield b"x" * 65536

    async def asked_for(_asked: Asked) -> Page:
        return Page(200, "text/plain", b"first\n", endless())

    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    async def whole() -> None:
        server = Server({"/endless": asked_for})
        _, port = await server.start("127.0.0.1", 0)
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.setblocking(False)
            without = descriptors()
            await asyncio.get_running_loop().sock_sendall(client, request("/endless"))
            await begun.wait()
            await asyncio.to_thread(
                wait_until, lambda: descriptors() <= without, "the connection is closed"
            )
        await server.stop()

    asyncio.run(whole())


def test_what_breaks_off_does_not_look_complete() -> None:
    def breaking() -> Iterator[bytes]:
        yield b"some\n"
        raise ZeroDivisionError

    async def broken_off(_asked: Asked) -> Page:
        return Page(200, "text/plain", b"first\n", breaking())

    async def whole() -> None:
        server = Server({"/breaking": broken_off})
        _, port = await server.start("127.0.0.1", 0)
        said = await exchange(port, request("/breaking"))
        assert b"some" in said
        # RFC 9112, 7.1: the last chunk is missing.
        assert not said.endswith(b"0\r\n\r\n")
        await server.stop()

    asyncio.run(whole())


def test_stopping_ends_open_connections() -> None:
    async def whole() -> None:
        async with serving() as (_, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /hello HTTP/1.1\r\nhost: localhost\r\n\r\n")
            await reader.readuntil(b"hello\n")
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()

    asyncio.run(whole())


def test_health_names_what_fails() -> None:
    page = health_page([("state", ""), ("workers", "worker 0 has not turned for 9 s")])
    assert page.status == 503
    assert page.body == b"not ready\nstate: ok\nworkers: worker 0 has not turned for 9 s\n"
    assert health_page([("state", "")]).status == 200


@pytest.mark.parametrize(
    "text, found",
    [
        ("127.0.0.1:15020", ("127.0.0.1", 15020)),
        ("[::1]:0", ("::1", 0)),
        (":15020", ("", 15020)),
    ],
)
def test_addresses_are_read(text: str, found: tuple[str, int]) -> None:
    assert parse_address(text) == found


@pytest.mark.parametrize("text", ["15020", "::1:15020", "a:15_020", "a:65536", "a:٣", "a:", "a: 1"])
def test_other_texts_are_no_address(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_address(text)


def test_an_answer_in_portions_depends_on_what_was_asked() -> None:
    answer = asked(
        b"GET /portions?a=b HTTP/1.1\r\nhost: localhost\r\naccept: x/y\r\nconnection: close\r\n\r\n"
    )
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head.lower()
    pieces = body.split(b"\r\n")
    assert [each for each in pieces if b" " in each or b"f" in each] == [
        b"first\n",
        b"0 a=b x/y\n",
        b"1 a=b x/y\n",
        b"2 a=b x/y\n",
    ]
    assert body.endswith(b"0\r\n\r\n")
    assert b"first" not in get("/portions", "HEAD")


def test_an_old_client_gets_portions_until_the_connection_ends() -> None:
    answer = asked(b"GET /portions HTTP/1.0\r\nhost: localhost\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-length" not in head.lower()
    assert body == b"first\n0  \n1  \n2  \n"
