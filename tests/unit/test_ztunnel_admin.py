from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

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


def get(path: str, method: str = "GET") -> bytes:
    return asked(
        f"{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode()
    )


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


def test_connections_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "MAX_CONNECTIONS", 1)

    async def whole() -> None:
        async with serving() as (server, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /hello HTTP/1.1\r\nhost: localhost\r\n\r\n")
            await reader.readuntil(b"hello\n")
            assert await exchange(port, b"") == b""
            assert server.refused == 1
            writer.close()
            await writer.wait_closed()

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
